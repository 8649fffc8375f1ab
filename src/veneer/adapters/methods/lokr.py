"""PEFT's LOKR: y += α/r · (w1 ⊗ w2) x, a Kronecker product whose factors are whole or products of rank r.

With w1 = L1 R1 and w2 = L2 R2, w1 ⊗ w2 = (L1 ⊗ L2)(R1 ⊗ R2): its rank is the product of the factors' ranks. A
whole factor is the product of itself with the identity on its shorter side. Where that rank is too large, w1 ⊗ w2
is served in full.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lokr/layer.py

Keys are `base_model.model.<module>.lokr_w1` [out1, in1], or `lokr_w1_a` [out1, r] and `lokr_w1_b` [r, in1], and
the same with w2, where out1 · out2 = out and in1 · in2 = in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import change, check_change, is_product
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
    low_rank,
    per_site,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site

_RANK_LIMIT = 1 << 31  # r of whole factors only divides alpha and may be large


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["LOKR"]
    r: int = 8
    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; use_effective_conv2d acts on convolutions only."""

    init_weights: bool | Literal["lycoris"] = True
    module_dropout: float = 0.0
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    use_effective_conv2d: bool = False


REFUSED: Mapping[str, Refusal] = {"modules_to_save": WHOLE_MODULES, "task_type": CAUSAL}


class _Factor(NamedTuple):
    """One side of the Kronecker product."""

    name: str  # "lokr_w1" | "lokr_w2"
    shape: tuple[int, int]
    rank: int | None  # of its two tensors, or None when it is whole

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.shape
        if self.rank is None:
            return {self.name: self.shape}
        return {f"{self.name}_a": (rows, self.rank), f"{self.name}_b": (self.rank, columns)}

    @property
    def inner(self) -> int:
        """The size between `left` and `right`."""
        return min(self.shape) if self.rank is None else self.rank

    def read(self, checkpoint: Checkpoint, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor as left [rows, inner] and right [inner, columns]."""
        tensors = [checkpoint.read(f"{prefix}.{name}") for name in self.tensors]
        if self.rank is not None:
            return tensors[0], tensors[1]
        one = torch.eye(self.inner)
        return (one, tensors[0]) if self.shape[0] <= self.shape[1] else (tensors[0], one)


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT LoKr. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "LoKrConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".lokr_", warnings)
    ranks = per_site(sites, "rank_pattern", config.rank_pattern, config.r, warnings)
    alphas = per_site(sites, "alpha_pattern", config.alpha_pattern, config.alpha, warnings)
    factors = [_factors(config, site, rank) for site, rank in zip(sites, ranks, strict=True)]
    shapes: dict[str, tuple[int, ...]] = {}
    for site, rank, (one, two) in zip(sites, ranks, factors, strict=True):
        field = "r" if rank == config.r else "rank_pattern"
        if not 1 <= rank <= _RANK_LIMIT:
            raise wrong(field, rank, f"it must be from 1 to {_RANK_LIMIT}")
        check_change(site, one.inner * two.inner, max_rank, base)
        for name, shape in (one.tensors | two.tensors).items():
            shapes[f"{PREFIX}{site.name}.{name}"] = shape
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".lokr_", base))
    programs = {}
    for site, rank, alpha, (one, two) in zip(sites, ranks, alphas, factors, strict=True):
        left1, right1 = one.read(checkpoint, f"{PREFIX}{site.name}")
        left2, right2 = two.read(checkpoint, f"{PREFIX}{site.name}")
        if is_product(site, one.inner * two.inner, max_rank):
            b = torch.kron(left1 * (alpha / rank), left2).T
            programs[site.name] = low_rank(site, torch.kron(right1, right2), b)
        else:
            delta = torch.kron(
                (left1 * (alpha / rank)).double() @ right1.double(), left2.double() @ right2.double()
            )
            programs[site.name] = change(site, delta, max_rank, base)
    return Program(
        kind="lokr",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _factors(config: Honoured, site: Site, rank: int) -> tuple[_Factor, _Factor]:
    """Which tensors peft makes for a layer."""
    in1, in2 = factorization(site.in_features, config.decompose_factor)
    out1, out2 = factorization(site.out_features, config.decompose_factor)
    whole1 = not (config.decompose_both and rank < max(out1, in1) / 2)
    whole2 = not rank < max(out2, in2) / 2
    return (
        _Factor("lokr_w1", (out1, in1), None if whole1 else rank),
        _Factor("lokr_w2", (out2, in2), None if whole2 else rank),
    )


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Two numbers, the smaller one first unless `factor` divides, whose product is `dimension`.

    With factor -1 they are as equal as can be, else the first is `factor` or the next smaller divisor.
    peft.tuners.lokr.layer.factorization
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    if factor == -1:
        factor = dimension
    m, n = 1, dimension
    length = m + n
    while m < n:
        new_m = m + 1
        while dimension % new_m != 0:
            new_m += 1
        new_n = dimension // new_m
        if new_m + new_n > length or new_m > factor:
            break
        m, n = new_m, new_n
    return (m, n) if m <= n else (n, m)
