"""What an adapter is after lowering: primitives at sites, and nothing about the method it came from.

A site is a linear layer of the base. For a row that uses the adapter, with x [in] and y = W0 x + b [out]:

    y += B^T (A x) + beta            A: [rank, in], B: [rank, out] with the scale folded in, beta: [out]

Both factors carry the rank first, so a weighted blend of adapters is the concatenation of their rows.
A new primitive is a new field of `SiteProgram`, packed by residency.py and applied by engine/layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Site(NamedTuple):
    """A linear layer of the base that adapters can target."""

    name: str  # module path in the transformers model, e.g. "model.layers.0.self_attn.q_proj"
    in_features: int
    out_features: int


@dataclass(frozen=True)
class SiteProgram:
    """The primitives of one adapter at one site. Tensors are contiguous, on the CPU, float32."""

    a: torch.Tensor | None = None  # [rank, in]
    b: torch.Tensor | None = None  # [rank, out], scale folded in
    bias: torch.Tensor | None = None  # [out], added to y

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


@dataclass(frozen=True)
class Program:
    """An adapter lowered to primitives."""

    kind: str
    sites: Mapping[str, SiteProgram]
    base_model: str = ""  # the base's name according to the adapter's config
    warnings: tuple[str, ...] = field(default=())

    @property
    def rank(self) -> int:
        """The largest rank over the sites."""
        return max((site.rank for site in self.sites.values()), default=0)

    @property
    def primitives(self) -> tuple[str, ...]:
        found = []
        if any(site.rank for site in self.sites.values()):
            found.append("low_rank")
        if any(site.bias is not None for site in self.sites.values()):
            found.append("bias")
        return tuple(found)

    @property
    def is_identity(self) -> bool:
        """True when no site can change the output: each product has a zero factor, each bias is zero."""
        return not any(_acts(site) for site in self.sites.values())

    @property
    def num_elements(self) -> int:
        """Numbers stored over all sites."""
        return sum(t.numel() for s in self.sites.values() for t in (s.a, s.b, s.bias) if t is not None)


def _acts(site: SiteProgram) -> bool:
    if site.bias is not None and bool(site.bias.any()):
        return True
    return site.a is not None and site.b is not None and bool(site.a.any()) and bool(site.b.any())
