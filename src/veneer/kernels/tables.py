"""The static device buffers that describe resident adapters and a step's rows to the kernels.

The buffers keep their addresses for the life of the engine, so a captured graph can replay any mix of
adapters: what changes between steps is only their content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

COLUMNS = 18  # of an entry
A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK, IN_OFFSET, IN_BLOCK, OUT_OFFSET, OUT_PAIR = range(8)
INNER_OFFSET, ACTIVATION, GROUP, DETAIL = range(8, 12)
DENSE_OFFSET, SPARSE_OFFSET, TOKENS_OFFSET, TOKENS = range(12, 16)
RANK_SCALE, UPDATE_SCALE = range(16, COLUMNS)
OFFSETS = [
    *(A_OFFSET, B_OFFSET, BIAS_OFFSET, IN_OFFSET, OUT_OFFSET, DENSE_OFFSET, SPARSE_OFFSET, TOKENS_OFFSET),
    *(INNER_OFFSET, RANK_SCALE, UPDATE_SCALE),
]
ABSENT = -1  # an offset of a tensor that the adapter does not have at a site
BASE_SLOT = -1  # the slot of rows without an adapter
SLOTS_EACH = 2  # of an adapter: what acts, then what acts on a prompt's last tokens instead, if it has that
MAX_BLOCK = 256  # features of a rotation; a larger one would cost as much as the base's product
ALIGNED = 16  # elements; offsets are multiples, so that kernels load whole vectors
ELEMENTWISE = ("", "relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu")
ACTIVATIONS = (*ELEMENTWISE, "softmax", "arrow", "fusion")  # by their number in ACTIVATION; "" is none
MAX_CHOICES = 32  # among which an arrow or a fusion chooses: a kernel holds all their scores at once


class Deltas(NamedTuple):
    """The sites at which an adapter changes the base's weight by more than a product of low rank."""

    dense: frozenset[int]
    sparse: frozenset[int]


class Transforms(NamedTuple):
    """The sites at which an adapter, or some adapter of a step, changes the base's input or output."""

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


NO_TRANSFORMS = Transforms()


@dataclass(frozen=True)
class AdapterTables:
    """All resident adapters. Offsets count elements from the start of the arena.

    An adapter takes `SLOTS_EACH` neighbouring slots.

    At `entries[slot, site]` stand, by column:

    A_OFFSET, B_OFFSET, RANK: A [rank, in] and B [rank, out]; rank 0 means no low-rank part.
    BIAS_OFFSET: the bias [out].
    IN_OFFSET, IN_BLOCK: R - I, [in / block, block, block], of the blocks R that turn the base's input.
    OUT_OFFSET, OUT_PAIR: scale - 1 [out] of the base's output; with a pair over 0 the weights [out] of each
        feature's partner follow (see kernels/transform.py).
    DENSE_OFFSET: a change [out, in] of the base's weight (see kernels/dense.py).
    SPARSE_OFFSET: one with few entries, by rows (see kernels/sparse.py).
    TOKENS_OFFSET, TOKENS: so many rows that replace those of the embedding or the output head (see
        kernels/token_rows.py).
    ACTIVATION, GROUP, DETAIL, INNER_OFFSET: what becomes of A x before B, and the d [rank] that is added to it
        first (see kernels/activation.py).
    RANK_SCALE, UPDATE_SCALE: the factors [rank] of A x and [out] of B^T h. Where they are, A and B are shared with
        other adapters, which lie elsewhere in the arena (see kernels/shared.py).

    Tensors are row-major. Offsets that are not ABSENT must be multiples of ALIGNED: kernels rely on it unchecked.
    What multiplies is stored as its difference from the identity: it is mostly close to it, and bfloat16, which
    has 8 bits from 1 on, would round most of what was learned away.
    """

    arena: torch.Tensor  # [elements], the engine's dtype
    entries: torch.Tensor  # int64 [slots, sites, COLUMNS], on the arena's device
    entries_host: torch.Tensor  # the same on the CPU, for launches that need a rank on the host
    transforms: dict[int, Transforms] = field(default_factory=dict)  # host: by slot, where there are any
    deltas: dict[int, Deltas] = field(default_factory=dict)  # likewise
    hidden: dict[int, frozenset[int]] = field(default_factory=dict)  # likewise, see `find_hidden`
    acting: set[int] = field(default_factory=set)  # host: slots of adapters that have anything at some site
    kin: dict[int, bytes] = field(
        default_factory=dict
    )  # host: by slot, of those that share A and B: `find_kin`

    @cached_property
    def ints(self) -> torch.Tensor:
        """The arena as int32, for the whole numbers in it: int32 takes `int_elements` of the arena's."""
        return self.arena.view(torch.int32)

    def has_tokens(self, segments: Sequence[Segment], site: int) -> bool:
        """Whether an adapter of these segments has rows for tokens at the embedding or the head, or an update of
        the embedding; true in a captured graph (no segments)."""
        slots = {segment.slot for segment in segments} - {BASE_SLOT}
        return not segments or any(self.entries_host[slot, site, [TOKENS, RANK]].any() for slot in slots)

    def delta(self, segments: Iterable[Segment]) -> bool:
        """Whether an adapter of these segments has a dense or sparse change anywhere."""
        return any(segment.slot in self.deltas for segment in segments)

    def delta_at(self, segments: Sequence[Segment], site: int) -> tuple[bool, bool]:
        """Whether they have a dense and a sparse change at a site; both in a captured graph (no segments)."""
        found = [self.deltas[segment.slot] for segment in segments if segment.slot in self.deltas]
        return (
            not segments or any(site in sites.dense for sites in found),
            not segments or any(site in sites.sparse for sites in found),
        )

    def acting_in(self, segments: Iterable[Segment]) -> list[Segment]:
        """The segments, those of adapters that have nothing at any site (only virtual tokens) as the base's."""
        return [s if s.slot in self.acting else s._replace(slot=BASE_SLOT) for s in segments]

    def transforms_of(self, slots: Iterable[int]) -> Transforms:
        """The sites at which an adapter in one of these slots changes the base's input or output."""
        found = [self.transforms[slot] for slot in slots if slot in self.transforms]
        return Transforms(*(frozenset[int]().union(*sites) for sites in zip(*found, strict=True)))

    def has_hidden(self, segments: Iterable[Segment]) -> bool:
        """Whether an adapter of these segments has an activation, or a part at a hidden state."""
        return any(segment.slot in self.hidden for segment in segments)

    def hidden_at(self, segments: Sequence[Segment], site: int) -> bool:
        """Whether one has at this site; True in a captured graph (no segments)."""
        return not segments or any(site in self.hidden.get(segment.slot, ()) for segment in segments)


def find_hidden(entries: torch.Tensor, linear_sites: int) -> frozenset[int]:
    """The sites of an adapter's entries [sites, COLUMNS] with an activation, and the hidden ones with anything."""
    used, states = entries[:, ACTIVATION] > 0, entries[linear_sites:-1]
    used[linear_sites:-1] |= (states[:, RANK] > 0) | (states[:, BIAS_OFFSET] != ABSENT)
    return frozenset(used.nonzero().flatten().tolist())


def find_kin(entries: torch.Tensor) -> bytes | None:
    """What an adapter's entries [sites, COLUMNS] are apart from its factors; None when it has no such factors.

    It is equal for adapters that differ by their factors alone, as offsets of anything else are an adapter's own:
    their rows may be in one tile.
    """
    scales = [RANK_SCALE, UPDATE_SCALE]
    if not bool((entries[:, scales] != ABSENT).any()):
        return None
    rest = entries.clone()
    rest[:, scales] = 0
    return hashlib.sha256(rest.numpy().tobytes()).digest()


def find_transforms(entries: torch.Tensor) -> Transforms:
    """Read from an adapter's entries, int64 [sites, COLUMNS] on the CPU."""
    return Transforms(_present(entries, IN_OFFSET), _present(entries, OUT_OFFSET))


def find_deltas(entries: torch.Tensor) -> Deltas:
    """Read from an adapter's entries, int64 [sites, COLUMNS] on the CPU."""
    return Deltas(_present(entries, DENSE_OFFSET), _present(entries, SPARSE_OFFSET))


def _present(entries: torch.Tensor, column: int) -> frozenset[int]:
    return frozenset((entries[:, column] != ABSENT).nonzero().flatten().tolist())


def int_elements(count: int, itemsize: int) -> int:
    """Elements of `itemsize` bytes (2 or 4) that `count` int32 take in the arena, in whole ALIGNED."""
    return -(-count * 4 // (itemsize * ALIGNED)) * ALIGNED


def absent_entries(*shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Entries without an adapter, int64 [*shape, COLUMNS]."""
    entries = torch.zeros(*shape, COLUMNS, dtype=torch.int64, device=device)
    entries[..., OFFSETS] = ABSENT
    return entries


class Segment(NamedTuple):
    """Neighbouring rows of a step that use the same adapter, or the base alone."""

    slot: int  # BASE_SLOT for rows without an adapter
    start: int  # first row
    stop: int  # one past the last row


def join_kin(segments: Iterable[Segment], kin: Mapping[int, bytes]) -> list[Segment]:
    """The segments, neighbours of one kin as one, in the slot of the first."""
    joined: list[Segment] = []
    for segment in segments:
        own = kin.get(segment.slot)
        if joined and own is not None and own == kin.get(joined[-1].slot):
            joined[-1] = joined[-1]._replace(stop=segment.stop)
        else:
            joined.append(segment)
    return joined


@dataclass(frozen=True)
class RowTiles:
    """Which rows of x use which slot. Rows of one adapter are neighbours, and every row is in one tile.

    Adapters of one kin are as one: the tile has the slot of one of them, `row_slots` that of each row.

    `tiles[i] = (slot, first_row, rows)` cuts the segments into at most `tile_rows` rows each. Kernels read
    `used` on the device and loop over that many tiles, so a captured graph replays any mix.
    """

    segments: tuple[Segment, ...]  # host; may be empty in a captured graph
    tiles: torch.Tensor  # int32 [capacity, 3], on the arena's device; past the used ones anything
    used: torch.Tensor  # int32 [1], on the arena's device: tiles in use
    adapted: bool  # host: some row may have an adapter
    tile_rows: int
    transforms: Transforms = NO_TRANSFORMS  # host: where some row may have its base's input or output changed
    deltas: bool = False  # host: some row may have a dense or sparse change of the base's weight
    hidden: bool = False  # host: some row may have an activation, or a part at a hidden state
    row_slots: torch.Tensor | None = (
        None  # int32 [rows], on the arena's device; None: no row's adapter has kin
    )

    def turned(self, site: int, sites: int = 1) -> bool:
        """Whether some row may have its base's input changed at one of these neighbouring sites."""
        return not self.transforms.inputs.isdisjoint(range(site, site + sites))

    def scaled(self, site: int, sites: int = 1) -> bool:
        """The same of the base's output."""
        return not self.transforms.outputs.isdisjoint(range(site, site + sites))
