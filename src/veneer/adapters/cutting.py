"""Products of a lower rank: the closest one of a given rank to a product or to a change in full, and how far it is.

    B^T A = (Q_b R_b)(Q_a R_a)^T = Q_b (R_b R_a^T) Q_a^T

so the singular values of a product of rank r are those of an r x r core: exact in float64, and never of the size of
the weight. Closest in the Frobenius norm (https://doi.org/10.1007/BF02288367, Eckart and Young 1936).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from veneer.adapters.program import SiteProgram
from veneer.errors import AdapterRefused

_NOISE = 3e-7  # of the largest singular value: what float32 leaves of a 0


class Cut(NamedTuple):
    """A program of a site, and the squares of what its product lost and had (Frobenius)."""

    part: SiteProgram
    lost: float
    had: float


class Loss:
    """What was lost over several sites."""

    def __init__(self) -> None:
        self._lost = self._had = 0.0

    def add(self, lost: float, had: float) -> None:
        self._lost, self._had = self._lost + lost, self._had + had

    @property
    def relative(self) -> float:
        """Against all that there was; 0 where there was nothing."""
        return math.sqrt(self._lost / self._had) if self._had else 0.0


def cut(part: SiteProgram, rank: int, site: str) -> Cut:
    """The program with a product of at most `rank`, without the directions that are nothing but noise.

    Raises:
        AdapterRefused: there is an activation between its factors.
    """
    if part.a is None or part.b is None:
        return Cut(part, 0.0, 0.0)
    if part.activation is not None:
        if part.rank <= rank:
            return Cut(part, 0.0, 0.0)
        raise AdapterRefused(
            f"max_rank {rank}: at {site} the rank is {part.rank}, and the activation {part.activation.kind} "
            "between the factors lets no product of a lower rank stand for it; raise max_rank"
        )
    left, left_core = torch.linalg.qr(part.b.double().T)  # [out, r], [r, r]
    right, right_core = torch.linalg.qr(part.a.double().T)
    u, s, v = torch.linalg.svd(left_core @ right_core.T)
    keep = min(rank, max(1, int((s > _NOISE * s[0]).sum())))
    root = s[:keep].sqrt()
    a, b = (right @ v[:keep].T * root).T, (left @ u[:, :keep] * root).T
    found = replace(part, a=a.float().contiguous(), b=b.float().contiguous())
    return Cut(found, float((s[keep:] ** 2).sum()), float((s**2).sum()))


def product(change: torch.Tensor, rank: int) -> Cut:
    """The closest product of at most `rank` to a change [out, in], without directions that are noise."""
    wide = change.shape[1] >= change.shape[0]
    matrix = (change if wide else change.T).double()
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
    values = values.flip(0).clamp(min=0)
    keep = min(rank, max(1, int((values > (_NOISE * values[0].sqrt()) ** 2).sum())))
    span = vectors.flip(1)[:, :keep]
    rest = span.T @ matrix
    root = torch.linalg.vector_norm(rest, dim=1, keepdim=True).sqrt().clamp(min=1e-150)
    outer, inner = (span.T * root).float().contiguous(), (rest / root).float().contiguous()
    part = SiteProgram(a=inner, b=outer) if wide else SiteProgram(a=outer, b=inner)
    had = float((matrix**2).sum())
    return Cut(part, float(((matrix - span @ rest) ** 2).sum()), had)
