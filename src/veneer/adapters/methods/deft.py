"""PEFT's DEFT: W = W0 + Q(s·R − Kᵀ W0), which replaces a small subspace of the base's outputs.

decomposition_method "relu": Q = P, K = relu(P); "qr": Q = K = the orthonormal factor of P. With `para` the
injected s·R is left out. s = alpha / r, or 1. W0 is the weight that is served, as in peft on the same base.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/deft/layer.py

Keys are `base_model.model.<module>.deft_P` [out, r] and, unless `para`, `deft_R` [r, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    BASE_BIASES,
    CAUSAL,
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
)
from veneer.adapters.program import Program, Site, SiteProgram


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["DEFT"]
    r: int = 8
    alpha: float | None = None
    decomposition_method: Literal["relu", "qr"] = "relu"
    para: bool = False


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    deft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_scale: float = 1.0
    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT DEFT. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "DeftConfig")
    check_rank(config.r, max_rank)
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".deft_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        rank = min(config.r, site.out_features)
        shapes[f"{PREFIX}{site.name}.deft_P"] = (site.out_features, rank)
        if not config.para:
            shapes[f"{PREFIX}{site.name}.deft_R"] = (rank, site.in_features)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".deft_", base))
    return Program(
        kind="deft",
        sites={site.name: _read(checkpoint, config, base, site) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional",
    )


def _read(checkpoint: Checkpoint, config: Honoured, base: Base, site: Site) -> SiteProgram:
    p = checkpoint.read(f"{PREFIX}{site.name}.deft_P")
    # In float32, as peft does: the signs of the columns, which R depends on, must be the same.
    left = p if config.decomposition_method == "relu" else torch.linalg.qr(p).Q
    right = p.relu() if config.decomposition_method == "relu" else left
    a = -right.T @ base.weight(site.name)
    if not config.para:
        scale = config.alpha / p.shape[1] if config.alpha else 1.0
        a += checkpoint.read(f"{PREFIX}{site.name}.deft_R") * scale
    return low_rank(site, a, left.T)
