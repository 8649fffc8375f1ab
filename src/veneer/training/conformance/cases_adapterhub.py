"""Cases of AdapterHub's kinds, made by its library's restatement in adapterhub.py, bottlenecks.py and reft.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.pyreft import repack_pyreft
from veneer.training.conformance.adapterhub import (
    NAME,
    add_lora,
    add_prefix,
    full_config,
    load_tensors,
    run_prefix,
    save,
)
from veneer.training.conformance.adapterhub_configs import BOTTLENECK, FUSION, LORA, PREFIX, REFT, Config
from veneer.training.conformance.bottlenecks import add_bottlenecks
from veneer.training.conformance.cases import Case
from veneer.training.conformance.pyreft import Ends, add_interventions, load_interventions, save_interventions
from veneer.training.conformance.reft import add_reft, run_reft


def adapterhub_case(
    kind: str, variant: str, add: Callable[[Any, Config], Any], config: Config, **fields: Any
) -> Case:
    """A case of one adapter: what hangs it on a model, and the method's config."""

    def make(model: Any) -> Any:
        return add(model, config)

    def write(model: Any, folder: Path) -> None:
        save(model, folder, full_config(model, config))

    def load(model: Any, folder: Path) -> Any:
        return load_tensors(add(model, config), folder / WEIGHTS_FILE)

    def run(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens).logits
        return logits

    return Case(
        f"{kind} {variant}".strip(), kind, make, **{"save": write, "load": load, "run": run, **fields}
    )


def move_far(model: Any) -> None:
    """A prefix starts far from what the base makes of text."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


def _lora(variant: str, **config: Any) -> Case:
    return adapterhub_case("ADAPTERHUB_LORA", variant, add_lora, LORA | config)


def _prefix(variant: str, *, refused: bool = False, **config: Any) -> Case:
    fields: dict[str, Any] = {"randomize": move_far, "run": run_prefix, "refused": refused}
    return adapterhub_case("ADAPTERHUB_PREFIX_TUNING", variant, add_prefix, PREFIX | config, **fields)


def _bottleneck(variant: str, *, refused: bool = False, **config: Any) -> Case:
    def add(model: Any, whole: Config) -> Any:
        return add_bottlenecks(model, {NAME: whole})

    whole = BOTTLENECK | {"reduction_factor": 8} | config
    return adapterhub_case("ADAPTERHUB_BOTTLENECK", variant, add, whole, refused=refused)


def _fusion(variant: str, adapters: dict[str, Config], **config: Any) -> Case:
    """Several bottlenecks and what fuses them, as `veneer adapters convert --fusion` writes them."""
    whole, layer = {name: BOTTLENECK | each for name, each in adapters.items()}, FUSION | config

    def add(model: Any, _: Config) -> Any:
        return add_bottlenecks(model, whole, layer)

    def write(model: Any, folder: Path) -> None:
        fusion = full_config(model, layer, ",".join(whole)) | {"adapter_names": list(whole)}
        parts = [full_config(model, each, name) for name, each in whole.items()]
        save(model, folder, {"peft_type": "ADAPTERHUB_FUSION", "adapters": parts, "fusion": fusion})

    return adapterhub_case("ADAPTERHUB_FUSION", variant, add, layer, save=write)


def _reft(variant: str, *, refused: bool = False, **config: Any) -> Case:
    return adapterhub_case(
        "ADAPTERHUB_REFT", variant, add_reft, REFT | config, run_prompt=run_reft, refused=refused
    )


def _pyreft(kind: str, variant: str, ends: Ends, act_fn: str | None = None) -> Case:
    """Interventions of pyreft, which `veneer adapters convert` writes as bottlenecks of our own format."""

    def make(model: Any) -> Any:
        return add_interventions(model, kind, ends, rank=4, act_fn=act_fn)

    def source(folder: Path) -> Path:
        return folder.with_name(f"{folder.name}-pyreft")

    def write(model: Any, folder: Path) -> None:
        save_interventions(model, source(folder), kind, ends.layers)
        repack_pyreft(source(folder), folder, first=ends.first, last=ends.last, activation=act_fn)

    def load(model: Any, folder: Path) -> Any:
        return load_interventions(make(model), source(folder))

    method = f"BOTTLENECK pyreft's {variant}"
    return Case(method, "BOTTLENECK", make, save=write, load=load, run_prompt=run_reft)


HOULSBY: Config = {"mh_adapter": True, "non_linearity": "swish"}
PFEIFFER: Config = {"original_ln_before": True}
COMPACTER: Config = HOULSBY | {"phm_layer": True, "non_linearity": "gelu"}
UNTIED: Config = {"orthogonality": False, "subtract_projection": True}

CASES = [
    _bottleneck("Houlsby", **HOULSBY),
    _bottleneck("Pfeiffer", **PFEIFFER),
    _bottleneck(
        "AdapterPlus", **PFEIFFER, original_ln_after=False, residual_before_ln=False, scaling="channel"
    ),
    _bottleneck("parallel", is_parallel=True, scaling=4.0),
    _bottleneck("scaled parallel", is_parallel=True, scaling="learned", mh_adapter=True),
    _bottleneck("Compacter", **COMPACTER),
    _bottleneck("Compacter++", **PFEIFFER, phm_layer=True, shared_phm_rule=False, factorized_phm_rule=True),
    _bottleneck("by layer", **PFEIFFER, leave_out=[0], reduction_factor={"1": 4, "default": 2}),
    _bottleneck("use_gating", **PFEIFFER, use_gating=True, refused=True),
    _bottleneck("no residual", original_ln_after=False, refused=True),
    _fusion("", {"one": PFEIFFER, "two": PFEIFFER | {"reduction_factor": 32}}),
    _fusion("static", {"one": HOULSBY, "two": HOULSBY, "three": HOULSBY}, value=False),
    _lora(""),
    _lora(
        "all matrices", attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, r=4, alpha=16
    ),
    _lora("leave_out", leave_out=[0], r=2),
    _lora("DoRA", use_dora=True, r=4, alpha=8),
    _lora("VeRA", vera_d=0.1, vera_b=0.1, attn_matrices=["q"], r=4),
    _lora("IA3", composition_mode="scale", r=1, alpha=1, attn_matrices=["k", "v"], intermediate_lora=True),
    _prefix("", prefix_length=12, bottleneck_size=32),
    _prefix("flat", prefix_length=18, flat=True),
    _prefix("leave_out", prefix_length=4, flat=True, leave_out=[1], refused=True),
    _reft("LoReFT", r=4),
    _reft("LoReFT, both ends", r=2, prefix_positions=2, suffix_positions=3),
    _reft("NoReFT, tied", r=4, suffix_positions=2, tied_weights=True, **UNTIED),
    _reft("NoReFT, ReLU", r=2, non_linearity="relu", **UNTIED),
    _reft("DiReFT", r=4, suffix_positions=4, orthogonality=False, subtract_projection=False),
    _reft("DiReFT or NoReFT", r=4, orthogonality=False, refused=True),
    _pyreft("Loreft", "LoReFT, both ends", Ends([0, 1, 0, 1], 2, 3)),
    _pyreft("Noreft", "NoReFT, GELU", Ends([0, 1], 3, 0), "gelu"),
    _pyreft("Consreft", "ConsReFT", Ends([1], 4, 2)),
    _pyreft("Lobireft", "LobiReFT", Ends([0, 1], 3, 2)),
    _pyreft("Direft", "DiReFT, tanh", Ends([0, 1], 0, 4), "tanh"),
    _pyreft("Nodireft", "NodiReFT", Ends([0], 2, 2)),
]
