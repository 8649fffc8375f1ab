"""Lays the tensors of an adapter out as one blob, so that loading it is one copy to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from veneer.adapters.arena import align
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused
from veneer.kernels.tables import A_OFFSET, ABSENT, B_OFFSET, BIAS_OFFSET, RANK


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in host memory as it will lie in the arena, at its true ranks."""

    blob: torch.Tensor  # [elements] of the engine's dtype, pinned when it goes to a GPU
    entries: torch.Tensor  # int64 [sites, 4], rows of kernels/tables.py with offsets from the blob's start

    @property
    def size(self) -> int:
        """Elements, a multiple of the alignment."""
        return self.blob.numel()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory. PyTorch takes pinned memory in powers of two, and they count in full."""
        taken = self.blob.nbytes
        if self.blob.is_pinned():
            taken = 1 << (taken - 1).bit_length()
        return taken + self.entries.nbytes

    def entries_at(self, start: int) -> torch.Tensor:
        """The entries for a blob that lies at `start` in the arena, int64 [sites, 4], pinned as the blob is."""
        moved = self.entries.clone()
        offsets = moved[:, :RANK]
        offsets += (offsets != ABSENT) * start
        return moved.pin_memory() if self.blob.is_pinned() else moved


def packed_size(program: Program) -> int:
    """Elements that `pack` will take, known before anything is allocated."""
    return sum(align(tensor.numel()) for site in program.sites.values() for _, tensor in _tensors(site))


def pack(program: Program, sites: Sequence[Site], dtype: torch.dtype, pin: bool) -> PackedAdapter:
    """Copy a program into one zeroed blob, each tensor aligned, converted to `dtype`.

    `sites` are the base's, in the order of the tables. Raises `AdapterRefused` for a value that `dtype` cannot
    hold, and ValueError for a program that does not fit the sites: that is a fault of the method that made it.
    """
    if unknown := program.sites.keys() - {site.name for site in sites}:
        raise ValueError(f"the program has tensors at {sorted(unknown)}, which the base does not have")
    blob = torch.zeros(packed_size(program), dtype=dtype, pin_memory=pin)
    entries = torch.full((len(sites), 4), ABSENT, dtype=torch.int64)
    entries[:, RANK] = 0
    offset = 0
    for index, site in enumerate(sites):
        part = program.sites.get(site.name)
        if part is None:
            continue
        _check_shapes(part, site)
        entries[index, RANK] = part.rank
        for column, tensor in _tensors(part):
            target = blob[offset : offset + tensor.numel()]
            target.copy_(tensor.reshape(-1))
            if dtype.itemsize < tensor.dtype.itemsize and not target.isfinite().all():
                raise AdapterRefused(
                    f"at {site.name} the adapter's largest value {tensor.abs().max().item():.6g} is beyond "
                    f"{torch.finfo(dtype).max:.6g}, the largest that the server's {dtype} holds; "
                    "serve with --dtype float32"
                )
            entries[index, column] = offset
            offset += align(tensor.numel())
    return PackedAdapter(blob, entries)


def _tensors(part: SiteProgram) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensors that are there, each with its column of the tables."""
    for column, tensor in ((A_OFFSET, part.a), (B_OFFSET, part.b), (BIAS_OFFSET, part.bias)):
        if tensor is not None and tensor.numel():
            yield column, tensor


def _check_shapes(part: SiteProgram, site: Site) -> None:
    """Kernels trust the tables: a wrong shape would read another adapter's memory."""
    rank, wide = part.rank, (part.a, part.b, part.bias)
    wanted = ((rank, site.in_features), (rank, site.out_features), (site.out_features,))
    for name, tensor, shape in zip(("A", "B", "bias"), wide, wanted, strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} at {site.name} is {list(tensor.shape)}, not {list(shape)}")
    if (part.a is None) != (part.b is None):
        raise ValueError(f"{site.name} has only one of A and B")
