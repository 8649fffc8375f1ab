"""PEFT's SHIRA: ΔW is sparse, r (in + out) entries at positions that the file names.

https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/shira/layer.py

Keys are `base_model.model.<module>.shira_weight` [n] and `shira_indices` [2, n], rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import sparse_change
from veneer.adapters.methods.common import (
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    check_count,
    choose_sites,
    explain_for,
    read_fields,
)
from veneer.adapters.program import Program, Site


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["SHIRA"]
    r: int = 32


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference: the file holds the positions that mask_type chose; PEFT sets
    fan_in_fan_out to false for linear layers."""

    fan_in_fan_out: bool = False
    init_weights: bool = True
    mask_type: str = "random"
    random_seed: int | None = None


REFUSED: Mapping[str, Refusal] = {
    "exclude_modules": NO_FIELD,
    "layers_pattern": NO_FIELD,
    "layers_to_transform": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT SHiRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "ShiraConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".shira_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        count = config.r * (site.in_features + site.out_features)
        check_count("r", config.r, count, site)
        shapes[f"{PREFIX}{site.name}.shira_weight"] = (count,)
        shapes[f"{PREFIX}{site.name}.shira_indices"] = (2, count)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".shira_", base))
    return Program(
        kind="shira",
        sites={site.name: sparse_change(site, *_entries(checkpoint, site), max_rank, base) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _entries(checkpoint: Checkpoint, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    key = f"{PREFIX}{site.name}.shira"
    places = checkpoint.read_indices(f"{key}_indices", site.out_features, site.in_features)
    return places, checkpoint.read(f"{key}_weight")
