"""Changes of a whole weight: the cheapest form in which they are served exactly.

A change D [out, in] of rank r takes r (in + out) numbers as a product, in · out in full, and by its n entries n
numbers and n + out + 1 indices of four bytes. What takes the fewest bytes is served; decode steps wait for bytes.
"""

from __future__ import annotations

import torch

from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import low_rank
from veneer.adapters.program import Site, SiteProgram, SparseMatrix
from veneer.errors import AdapterRefused

_SPARE_PROBES = 8  # vectors beyond the largest rank that `_factor` looks with
_RANK_TOLERANCE = 3e-7  # of the largest singular value: the noise of a matrix that was computed in float32


def change(site: Site, delta: torch.Tensor, max_rank: int, base: Base) -> SiteProgram:
    """A change [out, in] of a site's weight as a product where that is exact and smaller, else in full.

    Raises:
        AdapterRefused: a value is not finite in float32, or the change is too large in either form.
    """
    if not delta.float().isfinite().all():
        raise AdapterRefused(f"The change of {site.name} overflows; the adapter's values are too large.")
    largest = _largest_rank(site, max_rank)
    found = _factor(delta.double(), largest) if largest else None
    if found is not None:
        return low_rank(site, *found)
    check_change(site, largest + 1, max_rank, base)
    return SiteProgram(dense=delta.float().contiguous())


def sparse_change(
    site: Site, places: torch.Tensor, values: torch.Tensor, max_rank: int, base: Base
) -> SiteProgram:
    """A change with `values` [entries] at `places` [2 (row, column), entries], which add up where they coincide.

    Raises:
        AdapterRefused: as `change`.
    """
    shape = (site.out_features, site.in_features)
    matrix = torch.sparse_coo_tensor(places, values.double(), shape, check_invariants=True).coalesce()
    (rows, columns), found = matrix.indices(), matrix.values()
    keep = found != 0
    rows, columns, found = rows[keep], columns[keep], found[keep].float()
    starts = torch.searchsorted(rows.contiguous(), torch.arange(site.out_features + 1))
    if not found.isfinite().all():
        raise AdapterRefused(f"The change of {site.name} overflows; the adapter's values are too large.")
    if len(found) * (4 + base.dtype.itemsize) + 4 * len(starts) >= matrix.shape.numel() * base.dtype.itemsize:
        return change(site, matrix.to_dense(), max_rank, base)
    return SiteProgram(sparse=SparseMatrix(starts.int(), columns.int().contiguous(), found.contiguous()))


def is_product(site: Site, rank: int, max_rank: int) -> bool:
    """Whether a change of this rank is served as a product."""
    return rank <= _largest_rank(site, max_rank)


def check_change(site: Site, rank: int, max_rank: int, base: Base) -> None:
    """Refuse a change of this rank, or more, where it fits neither as a product nor in full."""
    if not is_product(site, rank, max_rank):
        what = f"The change of {site.name} is no product of rank {_largest_rank(site, max_rank)} or less, and"
        check_module(what, (site.out_features, site.in_features), base)


def _largest_rank(site: Site, max_rank: int) -> int:
    """Of a product that is allowed and smaller than the change in full."""
    return min(max_rank, (site.in_features * site.out_features - 1) // (site.in_features + site.out_features))


def check_module(what: str, shape: tuple[int, ...], base: Base) -> None:
    """Refuse `what` when a tensor of `shape` is over the limit."""
    itemsize = base.dtype.itemsize
    size = torch.Size(shape).numel() * itemsize
    if size > base.limits.module_bytes:
        raise AdapterRefused(
            f"{what} takes {size} bytes in full, {list(shape)} numbers of {itemsize} bytes. The limit is "
            f"{base.limits.module_bytes} (--max-module-bytes); raise it, or train fewer parameters."
        )


def _factor(delta: torch.Tensor, max_rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Float64 [out, in] as a [rank, in] and b [rank, out], b^T a = delta, float32; None when `max_rank` is too low.

    The rank is that of `delta` up to the rounding of float32: the range is found with random probes, which
    takes seconds where a whole SVD takes minutes, and what the probes leave out is measured.
    https://doi.org/10.1137/090771806 (Halko, Martinsson, Tropp 2011, algorithm 4.1)
    """
    num_probes = min(max_rank + _SPARE_PROBES, *delta.shape)
    probes = torch.randn(delta.shape[1], num_probes, dtype=delta.dtype, generator=torch.Generator())
    span = torch.linalg.qr(delta @ probes).Q  # [out, probes]
    inner = span.T @ delta
    if not torch.linalg.norm(delta - span @ inner) <= 4 * _RANK_TOLERANCE * torch.linalg.norm(delta):
        return None
    u, s, v = torch.linalg.svd(inner, full_matrices=False)
    rank = max(1, int((s > _RANK_TOLERANCE * s[0]).sum()))
    if rank > max_rank:
        return None
    root = s[:rank].sqrt()[:, None]
    return (v[:rank] * root).float().contiguous(), ((span @ u[:, :rank]).T * root).float().contiguous()
