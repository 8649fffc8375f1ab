"""PEFT's TINYLORA: y += B (Σ_j v_j P_j) A x, with A and B from the SVD of the weight that was trained on.

A, B and the fixed random P are in the file, so the served base's weight is not needed. Without save_projection
P is drawn again from projection_seed plus the number of the layer. Layers may share v (weight_tying).
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/tinylora/layer.py

Keys are `base_model.model.<module>.tinylora_A` [r, in], `tinylora_B` [out, r], `tinylora_P` [u, r, r], and
`base_model.tinylora_v.<group>` [u].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from msgspec import Meta

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    BASE_BIASES,
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    check_rank,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site

_DRAWN_LIMIT = 1 << 26  # entries of one P that is not in the file


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["TINYLORA"]
    r: int = 2
    u: Annotated[int, Meta(ge=1)] = 64
    weight_tying: Annotated[float, Meta(ge=0, le=1)] = 0.0
    projection_seed: Annotated[int, Meta(ge=-(2**62), le=2**62)] = (
        42  # plus a layer it stays a seed for torch
    )
    save_projection: bool = True


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    fan_in_fan_out: bool = False
    init_v_bound: float = 0.02
    init_weights: bool | str = True
    tinylora_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "exclude_modules": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT TinyLoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "TinyLoraConfig")
    check_rank(config.r, max_rank)
    if not config.save_projection and config.u * config.r**2 > _DRAWN_LIMIT:
        raise wrong("u", config.u, f"u·r² may be at most {_DRAWN_LIMIT} where save_projection is false")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".tinylora_", warnings)
    groups = [f"base_model.tinylora_v.{group}" for group in _groups(len(sites), config.weight_tying)]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(groups, (config.u,))
    for site in sites:
        rank = _rank(config, site)
        shapes[f"{PREFIX}{site.name}.tinylora_A"] = (rank, site.in_features)
        shapes[f"{PREFIX}{site.name}.tinylora_B"] = (site.out_features, rank)
        if config.save_projection:
            shapes[f"{PREFIX}{site.name}.tinylora_P"] = (config.u, rank, rank)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".tinylora_", base))
    if not config.save_projection:
        warnings.append(
            "save_projection: false; the projections were drawn again from projection_seed, which gives those "
            "of the training as long as torch's generator stays the same. Save them to be sure."
        )
    programs = {}
    for index, (site, group) in enumerate(zip(sites, groups, strict=True)):
        key, rank = f"{PREFIX}{site.name}", _rank(config, site)
        p = checkpoint.read(f"{key}.tinylora_P") if config.save_projection else _draw(config, rank, index)
        mixed = torch.einsum("u,ujk->jk", checkpoint.read(group), p)
        b = checkpoint.read(f"{key}.tinylora_B") @ mixed
        programs[site.name] = low_rank(site, checkpoint.read(f"{key}.tinylora_A"), b.T)
    return Program(
        kind="tinylora",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _rank(config: Honoured, site: Site) -> int:
    return min(config.r, site.in_features, site.out_features)


def _groups(num_sites: int, tying: float) -> list[int]:
    """The v of each site, by peft's rule."""
    num_groups = max(1, round(num_sites * (1.0 - tying)))
    size = max(1, num_sites // num_groups)
    return [min(index // size, num_groups - 1) for index in range(num_sites)]


def _draw(config: Honoured, rank: int, index: int) -> torch.Tensor:
    """P [u, rank, rank] of the site number `index`, as peft draws it."""
    generator = torch.Generator().manual_seed(config.projection_seed + index)
    return torch.normal(mean=0.0, std=rank**-0.5, size=(config.u, rank, rank), generator=generator)
