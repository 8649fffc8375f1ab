"""Arrow (LoRA's `arrow_config`): each token of each layer chooses among experts, which are LoRAs themselves.

    y += sum_e gate_e s_e B_e A_e x      gate: softmax over the top_k largest |p_e x| / T, 0 for the others

p_e, the prototype, is the first right singular vector of B_e A_e, T the temperature. PEFT finds p_e by 15 power
iterations from a random vector: with `rng_seed` the same ones are done here, as PEFT does them on a CPU; without
it PEFT routes a little differently after each load, and here the exact vectors are used. GenKnowSub (`use_gks`)
takes the mean of general experts' A and of their B from each expert's first.
https://arxiv.org/abs/2405.11157, https://aclanthology.org/2025.acl-short.54,
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/arrow.py

PEFT saves the router and each expert in folders of their own, `arrow_router`, `task_0`, …, `gks_0`, …, and can
load only the experts, by create_arrow_model. `pack` makes one adapter of such a folder: the router's config with
`arrow_experts`, the config of each expert by name, and every tensor of an expert under `<name>.<its key>`. The
router's own tensors are random and never used; they are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint, TensorInfo, shown
from veneer.adapters.methods import lora, lora_config
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import PREFIX, add_head_copy, choose_sites, wrong
from veneer.adapters.names import CONFIG_FILE
from veneer.adapters.program import Activation, Program, Site, SiteProgram
from veneer.errors import AdapterRefused
from veneer.kernels.tables import MAX_CHOICES

ROUTER = "arrow_router"  # its folder, as create_arrow_model calls it
_ITERATIONS, _EPSILON = 15, 1e-8  # of PEFT's power iteration
_UNUSED = (
    "ensure_weight_tying",
    "trainable_token_indices",
    "lora_bias",
    "bias",
    *(name for name in lora_config.VARIANTS if name != "arrow_config"),
)
_GENERAL = re.compile(r"gks_[0-9]+")
Names = Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_CHOICES)]


class Router(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEFT's ArrowConfig, with its defaults."""

    task_adapter_names: Names
    gks_adapter_names: Annotated[list[str], msgspec.Meta(max_length=MAX_CHOICES)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=1)] = 3
    router_temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    use_gks: bool = False
    rng_seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None

    @property
    def general(self) -> list[str]:
        """The experts whose mean is taken from the others."""
        return (self.gks_adapter_names or []) if self.use_gks else []


class Expert(NamedTuple):
    """An expert as it stands in the file."""

    name: str
    config: lora_config.Honoured
    sites: list[lora.Scaled]


class _Factors(NamedTuple):
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]


class _Part:
    """The tensors of one expert, under the names that it has alone: as much of a `Checkpoint` as lowering asks."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._prefix = f"{name}."
        self.header: Mapping[str, TensorInfo] = {
            key.removeprefix(self._prefix): info
            for key, info in checkpoint.header.items()
            if key.startswith(self._prefix)
        }


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a packed Arrow router. See `veneer.adapters.methods.base.Method`."""
    config = lora_config.read_config(checkpoint.config)
    router = _router(config)
    _check_plain(config)
    warnings: list[str] = []
    first = _Part(checkpoint, router.task_adapter_names[0])
    routed = choose_sites(config, base, first.header, ".lora_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    experts = {}
    for name in [*router.task_adapter_names, *router.general]:
        experts[name] = _expert(checkpoint, config, name, base, max_rank, warnings)
        found = lora.shapes_of(experts[name].config, experts[name].sites)
        part = _Part(checkpoint, name)
        add_head_copy(found, part.header, routed, warnings)
        shapes |= {f"{name}.{key}": shape for key, shape in found.items()}
    _check_alike(list(experts.values()), routed)
    rank = _check_rank(router, experts[router.task_adapter_names[0]], max_rank)
    checkpoint.require(shapes, _explain)
    sites = {
        site.name: _site(checkpoint, router, experts, index, rank[index]) for index, site in enumerate(routed)
    }
    if router.rng_seed is None:
        warnings.append(
            "arrow_config.rng_seed is null: PEFT starts its prototypes from random numbers and routes a little "
            "differently after each load. The exact singular vectors are used."
        )
    if router.use_gks:
        warnings.append(
            "arrow_config.use_gks: the general experts are taken from the others when the adapter is loaded. PEFT "
            "does so in place at the first forward pass: the files must have been saved before it."
        )
    return Program(
        kind="lora",
        sites=sites,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _router(config: lora_config.Honoured) -> Router:
    if config.arrow_experts is None:
        raise wrong(
            "arrow_config",
            config.arrow_config,
            "this is the router alone, and its experts are other adapters. `veneer adapters convert FOLDER "
            f"--output OUT` packs a folder with {ROUTER}, task_0, task_1, … as PEFT's save_pretrained writes it",
        )
    try:
        router = msgspec.convert(config.arrow_config, Router)
    except msgspec.ValidationError as error:
        raise wrong("arrow_config", config.arrow_config, str(error)) from error
    tasks, general = router.task_adapter_names, router.general
    if router.use_gks and not general:
        raise wrong("arrow_config", config.arrow_config, "use_gks needs gks_adapter_names")
    if router.top_k > len(tasks):
        raise wrong("arrow_config", config.arrow_config, f"top_k must be at most the {len(tasks)} experts")
    unlike = [name for name in general if not _GENERAL.fullmatch(name)]
    unlike += [name for name in tasks if _GENERAL.fullmatch(name) or name == ROUTER]
    if unlike:
        rule = f"{shown(unlike[0])}: PEFT takes gks_N for general experts and all others for tasks"
        raise wrong("arrow_config", config.arrow_config, rule)
    names = [*tasks, *general]
    if len(set(names)) < len(names) or set(names) != config.arrow_experts.keys():
        rule = f"it must have the config of each of {', '.join(names)}, once, and no other"
        raise wrong("arrow_experts", list(config.arrow_experts), rule)
    return router


def _expert(
    checkpoint: Checkpoint,
    config: lora_config.Honoured,
    name: str,
    base: Base,
    max_rank: int,
    warnings: list[str],
) -> Expert:
    """An expert's config, read like that of any LoRA; Arrow uses its A, B and scale alone."""
    assert config.arrow_experts is not None
    try:
        fields = lora_config.read_config(config.arrow_experts[name])
        if fields.arrow_config is not None:
            raise wrong("arrow_config", fields.arrow_config, "an expert cannot be a router")
        _check_plain(fields)
        part = _Part(checkpoint, name)
        sites = choose_sites(fields, base, part.header, ".lora_", warnings)
        return Expert(name, fields, lora.scaled_sites(fields, sites, max_rank, warnings))
    except AdapterRefused as error:
        raise AdapterRefused(f"arrow_experts, {name}: {error.message}") from error


def _check_plain(config: lora_config.Honoured) -> None:
    for field in _UNUSED:
        if (value := getattr(config, field)) not in (None, False, "none"):
            raise wrong(field, value, "PEFT's Arrow takes A, B and the scale of each expert alone")


def _check_alike(experts: list[Expert], routed: list[Site]) -> None:
    """PEFT stacks the factors of all experts at each layer of the router."""
    for expert in experts:
        if [item.site for item in expert.sites] != routed:
            raise AdapterRefused(
                f"{CONFIG_FILE}: arrow_experts, {expert.name}: it must be at exactly the {len(routed)} layers that "
                f"the router's target_modules name, and is at {len(expert.sites)}."
            )
        for item, first in zip(expert.sites, experts[0].sites, strict=True):
            if item.rank != first.rank:
                raise AdapterRefused(
                    f"{CONFIG_FILE}: arrow_experts, {expert.name}: at {item.site.name} its rank {item.rank} is not "
                    f"that of {experts[0].name}, {first.rank}."
                )


def _check_rank(router: Router, expert: Expert, max_rank: int) -> list[int]:
    """The rank of each expert at each site."""
    count = len(router.task_adapter_names)
    for item in expert.sites:
        if (needed := count * (1 + item.rank)) > max_rank:
            rule = (
                f"{count} experts of rank {item.rank} at {item.site.name} need rank {needed}, the limit is "
                f"{max_rank} (--max-lora-rank)"
            )
            raise wrong("arrow_experts", router.task_adapter_names, rule)
    return [item.rank for item in expert.sites]


def _site(
    checkpoint: Checkpoint, router: Router, experts: Mapping[str, Expert], index: int, rank: int
) -> SiteProgram:
    def read(name: str) -> _Factors:
        key = f"{name}.{PREFIX}{experts[name].sites[index].site.name}"
        return _Factors(checkpoint.read(f"{key}.lora_A.weight"), checkpoint.read(f"{key}.lora_B.weight"))

    tasks = [read(name) for name in router.task_adapter_names]
    if router.general:
        general = [read(name) for name in router.general]
        mean = _Factors(*(torch.stack(side).mean(0) for side in zip(*general, strict=True)))
        tasks = [_Factors(a - mean.a, b - mean.b) for a, b in tasks]
    prototypes = torch.stack([prototype(each.a, each.b, router.rng_seed) for each in tasks])
    scales = [experts[name].sites[index].scale for name in router.task_adapter_names]
    scaled = [scale * each.b.T for scale, each in zip(scales, tasks, strict=True)]
    a = torch.cat([prototypes / router.router_temperature, *(each.a for each in tasks)]).contiguous()
    b = torch.cat([torch.zeros(len(tasks), scaled[0].shape[1]), *scaled]).contiguous()
    if not (a.isfinite().all() and b.isfinite().all()):
        name = experts[router.task_adapter_names[0]].sites[index].site.name
        raise AdapterRefused(f"The factors of {name} overflow; the adapter's values are too large.")
    return SiteProgram(
        a=a, b=b, activation=Activation("arrow", group=rank, count=len(tasks), top_k=router.top_k)
    )


def prototype(a: torch.Tensor, b: torch.Tensor, seed: int | None) -> torch.Tensor:
    """The first right singular vector [in] of BA, a [rank, in], b [out, rank]; with a seed PEFT's approximation."""
    gram = b.T @ b
    if seed is None:
        # BA = Q (R_b R_a^T) P^T with B = Q R_b and A^T = P R_a
        p, r_a = torch.linalg.qr(a.T)
        found = torch.linalg.svd(torch.linalg.qr(b).R @ r_a.T)
        square = found.S[0] ** 2
        # of the length to which PEFT's iteration converges
        exact: torch.Tensor = p @ found.Vh[0] * (square / (square + _EPSILON))
        return exact
    generator = torch.Generator().manual_seed(seed)
    v: torch.Tensor = torch.randn(a.shape[1], generator=generator)
    v = v / (v.norm() + _EPSILON)
    for _ in range(_ITERATIONS):
        w = a.T @ (gram @ (a @ v))
        v = w / (w.norm() + _EPSILON)
    return v


def pack(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of one adapter of the folder in which PEFT saved a router and its experts.

    Raises:
        AdapterRefused: an expert is missing, or one of the files is not as PEFT saves it.
    """
    router = Checkpoint(folder / ROUTER)
    arrow = router.config.get("arrow_config")
    if not isinstance(arrow, dict):
        raise wrong("arrow_config", arrow, f"{ROUTER} is not the router of an Arrow model")
    names: list[Any] = [*(arrow.get("task_adapter_names") or []), *(arrow.get("gks_adapter_names") or [])]
    experts: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name, re.ASCII):
            raise wrong("arrow_config", arrow, f"{shown(name)} is no name of a folder that PEFT writes")
        expert = Checkpoint(folder / name)
        experts[name] = dict(expert.config)
        tensors |= {f"{name}.{key}": expert.read(key) for key in expert.header}
    return {**router.config, "arrow_experts": experts}, tensors


def _explain(key: str) -> str:
    return "the file holds the tensors of the experts alone, each under the expert's name"
