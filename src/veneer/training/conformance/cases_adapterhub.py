"""Cases of AdapterHub's kinds, made by its library's restatement in adapterhub.py, bottlenecks.py and reft.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.names import WEIGHTS_FILE
from veneer.training.conformance.adapterhub import (
    LORA,
    PREFIX,
    Config,
    add_lora,
    add_prefix,
    full_config,
    load_tensors,
    run_prefix,
    save,
)
from veneer.training.conformance.cases import Case


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


CASES = [
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
]
