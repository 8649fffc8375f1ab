"""What an adapter changes at a site, as numbers of the base's own shapes: the true ΔW and Δb.

    y = OUT(W0 x' + b) + B^T A x + beta + D x = (W0 + ΔW) x + b + Δb          (program.py)
    ΔW = OUT(W0 R) - W0 + B^T A + D,  Δb = OUT(b) - b + beta

Differences are taken before products, so that what is close to the identity keeps its digits. Activations have no
ΔW. At the embedding ΔW is [hidden, vocabulary]. Float32, on the CPU.
"""

from __future__ import annotations

import torch

from veneer.adapters.methods.base import Base
from veneer.adapters.program import EMBEDDING, HEAD, Site, SiteProgram, SparseMatrix
from veneer.errors import AdapterRefused


def weight_change(
    part: SiteProgram, site: Site, base: Base, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """ΔW [out, in] of a site, or its `rows` (int64) alone.

    Raises:
        AdapterRefused: the site has an activation.
    """
    if part.activation is not None:
        raise AdapterRefused(
            f"{site.name} has an activation ({part.activation.kind}) between its factors, so that what the adapter "
            "does there is no change of a weight. It can be blended, and merged by method linear."
        )
    part = part.folded()
    wanted = slice(None) if rows is None else rows
    count = site.out_features if rows is None else len(rows)
    change = torch.zeros(count, site.in_features)
    if part.a is not None and part.b is not None:
        change.addmm_(part.b[:, wanted].T, part.a)
    if part.dense is not None:
        change += part.dense[wanted]
    if part.sparse is not None:
        change += in_full(part.sparse, site)[wanted]
    if part.rotate_in is not None or part.scale_out is not None:
        change += transform_change(part, base.weight(site.name))[wanted]
    if part.tokens is not None:
        _put_tokens(change, part, site, base, rows)
    return change


def bias_change(part: SiteProgram, site: Site, base: Base) -> torch.Tensor | None:
    """Δb [out], or None where there is none."""
    own = base.bias(site.name) if part.scale_out is not None and site.name in base.sites else None
    change = None if own is None else output_change(part, own)
    if part.bias is None or change is None:
        return part.bias if change is None else change
    return part.bias + change


def transform_change(part: SiteProgram, weight: torch.Tensor) -> torch.Tensor:
    """OUT(W0 R) - W0 for the `weight` W0 [out, in]."""
    if part.rotate_in is None:
        return output_change(part, weight)
    blocks, size = part.rotate_in.shape[:2]
    turn = part.rotate_in - torch.eye(size)
    change = torch.einsum("onj,nij->oni", weight.view(len(weight), blocks, size), turn).reshape(weight.shape)
    return change + output_change(part, weight + change)


def output_change(part: SiteProgram, y: torch.Tensor) -> torch.Tensor:
    """OUT(y) - y for y [out, …]."""
    shape = (-1, *[1] * (y.ndim - 1))
    if part.scale_out is None:
        return torch.zeros_like(y)
    change = (part.scale_out - 1).view(shape) * y
    if part.cross_out is not None:
        halves = y.view(-1, 2, part.pair // 2, *y.shape[1:])
        change += part.cross_out.view(shape) * halves.flip(1).reshape(y.shape)
    return change


def in_full(matrix: SparseMatrix, site: Site) -> torch.Tensor:
    """[out, in]"""
    full = torch.zeros(site.out_features, site.in_features)
    rows = torch.repeat_interleave(matrix.starts.long().diff())
    return full.index_put_((rows, matrix.columns.long()), matrix.values, accumulate=True)


def base_rows(site: str, ids: torch.Tensor, base: Base) -> torch.Tensor:
    """The base's rows [ids, hidden] as rows of tokens stand for them (`TokenRows`)."""
    return base.token_rows(site, ids) * (base.embedding_scale if site == EMBEDDING else 1.0)


def _put_tokens(
    change: torch.Tensor, part: SiteProgram, site: Site, base: Base, rows: torch.Tensor | None
) -> None:
    """Rows of tokens in place of the base's: at the head they are all that counts for their tokens."""
    assert part.tokens is not None
    ids = part.tokens.ids.long()
    known = ids < base.embedding.in_features
    if not known.all():
        raise AdapterRefused(
            f"the adapter adds {int((~known).sum())} tokens to the vocabulary, which the base has no rows for, so "
            "they have no weight and no sum"
        )
    moved = part.tokens.rows - base_rows(site.name, ids, base)
    if site.name != HEAD:
        change[:, ids] += moved.T
    elif rows is None:
        change[ids] = moved
    else:
        place = torch.searchsorted(ids, rows).clamp_(max=len(ids) - 1)
        own = ids[place] == rows
        change[own] = moved[place[own]]
