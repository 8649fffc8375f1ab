"""PEFT's HIRA: ΔW = W0 ⊙ (B A), with the weight W0 that is served, as in peft on the same base.

The rank of ΔW is up to r times that of W0: it is served where the limit of ranks allows for that.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/hira/layer.py

Keys are `base_model.model.<module>.hira_A` [r, in] and `hira_B` [out, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import change
from veneer.adapters.methods.common import (
    CAUSAL,
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
from veneer.adapters.program import Program, Site


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["HIRA"]
    r: int = 32


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers, and its 0.21
    makes every layer of rank r, whatever rank_pattern says."""

    fan_in_fan_out: bool = False
    hira_dropout: float = 0.0
    init_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = None


REFUSED: Mapping[str, Refusal] = {"modules_to_save": WHOLE_MODULES, "task_type": CAUSAL}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT HiRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "HiraConfig")
    if config.r < 1:
        raise wrong("r", config.r, "it must be at least 1")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".hira_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        shapes[f"{PREFIX}{site.name}.hira_A"] = (config.r, site.in_features)
        shapes[f"{PREFIX}{site.name}.hira_B"] = (site.out_features, config.r)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".hira_", base))
    return Program(
        kind="hira",
        sites={site.name: change(site, _delta(checkpoint, base, site), max_rank, base) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional",
    )


def _delta(checkpoint: Checkpoint, base: Base, site: Site) -> torch.Tensor:
    key = f"{PREFIX}{site.name}.hira"
    product = checkpoint.read(f"{key}_B").double() @ checkpoint.read(f"{key}_A").double()
    return product * base.weight(site.name)
