"""PEFT's ROAD: pairs of outputs are turned and scaled, the base's bias with them; read as peft 0.21 writes it.

Within a group of group_size outputs, i and j = i + group_size / 2 are a pair:

    y_i = α_i cos θ_i z_i − α'_i sin θ'_i z_j    y_j = α_j cos θ_j z_j + α'_j sin θ'_j z_i    z = W0 x + b

road_1 has one α = α' and θ = θ' for a pair, road_2 one for each output, road_4 four for each output.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/road/layer.py

Keys are `base_model.model.<module>.road_theta` and `road_alpha`, [out / 2], [out] or [2 out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from msgspec import Meta

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    choose_sites,
    explain_for,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, SiteProgram


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["ROAD"]
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Annotated[int, Meta(ge=2, multiple_of=2)] = 64


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "exclude_modules": NO_FIELD,
    "layers_pattern": NO_FIELD,
    "layers_to_transform": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}
_NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}  # of θ, and of α, for a pair of outputs


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT RoAd. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "RoadConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".road_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        if site.out_features % config.group_size:
            rule = f"it must divide the {site.out_features} outputs of {site.name}"
            raise wrong("group_size", config.group_size, rule)
        for name in ("theta", "alpha"):
            size = site.out_features // 2 * _NUMBERS[config.variant]
            shapes[f"{PREFIX}{site.name}.road_{name}"] = (size,)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".road_", base))
    return Program(
        kind="road",
        sites={site.name: _read(checkpoint, f"{PREFIX}{site.name}.road_", config) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional",
    )


def _read(checkpoint: Checkpoint, prefix: str, config: Honoured) -> SiteProgram:
    half = config.group_size // 2
    # groups, which of the two weights, which half of the group, pair
    shape = (-1, max(_NUMBERS[config.variant] // 2, 1), min(_NUMBERS[config.variant], 2), half)
    theta = checkpoint.read(f"{prefix}theta").view(shape).expand(-1, -1, 2, -1)
    alpha = checkpoint.read(f"{prefix}alpha").view(shape).expand(-1, -1, 2, -1)
    own, partner = alpha * theta.cos(), alpha * theta.sin()
    sign = torch.tensor([-1.0, 1.0])[:, None]
    return SiteProgram(
        scale_out=own[:, 0].flatten(),
        cross_out=(partner[:, -1] * sign).flatten(),
        pair=config.group_size,
    )
