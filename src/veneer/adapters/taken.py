"""What PiSSA, OLoRA and KaSA take out of a weight before training, as PEFT 0.21 computes it, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

DOUBT_LIMIT = 1e-3  # of `Taken.doubt`; above it the conversion warns
_NOISE = 4 * torch.finfo(torch.float32).eps  # of the largest singular value: the error of any of them


class Taken(NamedTuple):
    """What training took out of a weight, scale · b a."""

    b: torch.Tensor  # [out, rank]
    a: torch.Tensor  # [rank, in]
    doubt: float  # about how far, beside the weight's norm, it may be off where something else computed it


def _pissa(weight: torch.Tensor, rank: int, scale: float) -> Taken:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    rest = s[rank].item() if rank < len(s) else 0.0
    doubt = _doubt(rest, s[rank - 1].item() - rest, s[0].item())
    return Taken(u[:, :rank] * root, root[:, None] * v[:rank], doubt)


def _olora(weight: torch.Tensor, rank: int, scale: float) -> Taken:
    q, r = torch.linalg.qr(weight)
    rows, pivots = torch.linalg.vector_norm(r, dim=1).tolist(), r.diagonal()[:rank].abs().tolist()
    doubt = max(_doubt(row, pivot, max(rows)) for row, pivot in zip(rows, pivots, strict=False))
    return Taken(q[:, :rank], r[:rank], doubt)


def _kasa(weight: torch.Tensor, rank: int, scale: float) -> Taken:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[-rank:] / scale).sqrt()
    dropped = s[-rank].item()
    doubt = _doubt(dropped, s[-rank - 1].item() - dropped, s[0].item())
    return Taken(u[:, -rank:] * root, root[:, None] * v[-rank:], doubt)


def _doubt(size: float, gap: float, norm: float) -> float:
    """How much of a weight turns with a direction of `size` that float32 tells from the next by `gap` only.

    The angle is about the error over the gap. https://doi.org/10.1137/0707001 (Davis, Kahan 1970)
    """
    if norm == 0:
        return 0.0
    return size / norm * (min(1.0, _NOISE * norm / gap) if gap > 0 else 1.0)


TAKES: Mapping[str, Callable[[torch.Tensor, int, float], Taken]] = {
    "PiSSA": _pissa,
    "OLoRA": _olora,
    "KaSA": _kasa,
}
