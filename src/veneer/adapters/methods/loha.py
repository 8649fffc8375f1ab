"""PEFT's LOHA: y += α/r · ((w1_a w1_b) ⊙ (w2_a w2_b)) x, a Hadamard product of two products of rank r.

It is one product of rank r²: row (j, k) of A is row j of w1_b times row k of w2_b, element by element, and
column (j, k) of B is column j of w1_a times column k of w2_a.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/loha/layer.py

Keys are `base_model.model.<module>.hada_w1_a`, `hada_w2_a` [out, r] and `hada_w1_b`, `hada_w2_b` [r, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    CAUSAL,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    check_need,
    check_rank,
    choose_sites,
    explain_for,
    low_rank,
    per_site,
    read_fields,
)
from veneer.adapters.program import Program


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["LOHA"]
    r: int = 8
    alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; use_effective_conv2d acts on convolutions only."""

    init_weights: bool = True
    module_dropout: float = 0.0
    rank_dropout: float = 0.0
    use_effective_conv2d: bool = False


REFUSED: Mapping[str, Refusal] = {"modules_to_save": WHOLE_MODULES, "task_type": CAUSAL}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT LoHa. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "LoHaConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".hada_", warnings)
    ranks = per_site(sites, "rank_pattern", config.rank_pattern, config.r, warnings)
    alphas = per_site(sites, "alpha_pattern", config.alpha_pattern, config.alpha, warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site, rank in zip(sites, ranks, strict=True):
        field = "r" if rank == config.r else "rank_pattern"
        check_rank(rank, max_rank, field)
        check_need(site, rank**2, max_rank, field, rank)
        for name in ("hada_w1", "hada_w2"):
            shapes[f"{PREFIX}{site.name}.{name}_a"] = (site.out_features, rank)
            shapes[f"{PREFIX}{site.name}.{name}_b"] = (rank, site.in_features)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".hada_", base))
    programs = {}
    for site, rank, alpha in zip(sites, ranks, alphas, strict=True):
        w1_a, w1_b, w2_a, w2_b = (
            checkpoint.read(f"{PREFIX}{site.name}.hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b")
        )
        a = _rows(w1_b, w2_b)
        programs[site.name] = low_rank(site, a, _rows(w1_a.T * (alpha / rank), w2_a.T))
    return Program(
        kind="loha",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Each row of `left` [r, n] times each row of `right` [r, n]: [r², n]."""
    return (left[:, None] * right[None]).flatten(0, 1)
