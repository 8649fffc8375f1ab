"""Encoded rows to the tensors of a forward pass: padded, or several rows packed into one sequence.

    batch = collate(rows, padding=stops[0], multiple=8)
    batch = collate_pairs(pairs, padding=stops[0])                   # all chosen, then all rejected
    batch = collate_packed([[a, b], [c]], padding=stops[0], length=4096, mask=packing_mask(model.config))
    loss = model(**batch.to(device).inputs()).loss

In a packed sequence every row's positions begin at 0 and attention stays within it. A transformers model is told
so by an explicit mask, which goes to every attention layer as it is and so is for models without sliding windows:
`bool` for sdpa, a floating dtype for eager attention, which adds it. Or by the positions alone (None), from which
it makes the mask of each layer's kind. Packing is not for virtual tokens (prefix, prompt, P-tuning): PEFT refuses
the explicit mask, and with its cache of keys and values the positions would not be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from veneer.errors import InvalidRequest
from veneer.training.data.encoding import IGNORED, Encoded, EncodedPair

Mask = Literal["bool"] | torch.dtype | None


@dataclass(frozen=True)
class Batch:
    """`tokens` of rows, padding not counted; `learnt` of them have a label."""

    input_ids: torch.Tensor  # int64 [B, L]
    labels: torch.Tensor  # int64 [B, L], IGNORED where nothing is learnt; the model shifts them
    position_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor | None  # int64 [B, L]; packed: bool or floating [B, 1, L, L], or None
    tokens: int
    learnt: int
    cu_seqlens: torch.Tensor | None = (
        None  # int32 [rows + 1] over the flattened batch, padding as rows of its own
    )

    def inputs(self) -> dict[str, Any]:
        """The arguments of a transformers model. With a cache it would not look at positions for packed rows."""
        names = ("input_ids", "labels", "position_ids", "attention_mask")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**given, "use_cache": False}

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            entry.name: value.to(device, non_blocking=True)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), torch.Tensor)
        }
        return replace(self, **moved)


def collate(rows: Sequence[Encoded], padding: int, *, multiple: int = 1) -> Batch:
    """Pad on the right to the longest row, and on to a multiple of `multiple` tokens."""
    width = _up(max(row.length for row in rows), multiple)
    lengths = torch.tensor([row.length for row in rows])
    places = torch.arange(width)
    labels = [row.labels for row in rows]
    return Batch(
        input_ids=_padded([row.ids for row in rows], width, padding),
        labels=_padded(labels, width, IGNORED),
        position_ids=places.expand(len(rows), width).contiguous(),
        attention_mask=(places < lengths[:, None]).long(),
        tokens=int(lengths.sum()),
        learnt=_learnt(labels),
    )


def collate_pairs(pairs: Sequence[EncodedPair], padding: int, *, multiple: int = 1) -> Batch:
    """The chosen rows of all pairs, then the rejected ones, in the same order: B is twice the pairs."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return collate(rows, padding, multiple=multiple)


def collate_packed(
    packs: Sequence[Sequence[Encoded]],
    padding: int,
    *,
    length: int | None = None,
    multiple: int = 1,
    mask: Mask,
) -> Batch:
    """Put the rows of each pack into one sequence, one after the other.

    `length` is that of every sequence; by default the longest pack's, and on to a multiple of `multiple`. Padding
    is a row of its own behind the others.

    Raises:
        InvalidRequest: a pack is longer than `length`.
    """
    longest = max(sum(row.length for row in pack) for pack in packs)
    width = length or _up(longest, multiple)
    if longest > width:
        raise InvalidRequest(f"a pack has {longest} tokens, more than a sequence's length {width}")
    sizes = [[row.length for row in pack] for pack in packs]
    sizes = [[*pack, width - sum(pack)] if sum(pack) < width else pack for pack in sizes]
    labels = [[label for row in pack for label in row.labels] for pack in packs]
    ends = torch.tensor([0, *(size for pack in sizes for size in pack)], dtype=torch.int32).cumsum(0)
    return Batch(
        input_ids=_padded([[token for row in pack for token in row.ids] for pack in packs], width, padding),
        labels=_padded(labels, width, IGNORED),
        position_ids=torch.stack([torch.cat([torch.arange(size) for size in pack]) for pack in sizes]),
        attention_mask=None if mask is None else packed_mask(sizes, mask),
        tokens=sum(row.length for pack in packs for row in pack),
        learnt=_learnt(labels),
        cu_seqlens=ends.int(),
    )


def packing_mask(config: Any) -> Mask:
    """The `mask` that a transformers model of this config must be given, by its attention implementation."""
    text = config.get_text_config()
    windows = getattr(text, "sliding_window", None) or "sliding_attention" in (
        getattr(text, "layer_types", None) or ()
    )
    if windows or text._attn_implementation not in ("sdpa", "eager"):
        return None
    return "bool" if text._attn_implementation == "sdpa" else text.dtype or torch.float32


def packed_mask(sizes: Sequence[Sequence[int]], mask: Literal["bool"] | torch.dtype) -> torch.Tensor:
    """Causal attention within each of the rows whose lengths are given: [B, 1, L, L].

    As bool, True where a token (dim 2) attends to another (dim 3); as a floating dtype 0 there and its least value
    elsewhere.
    """
    owners = torch.stack([torch.arange(len(pack)).repeat_interleave(torch.tensor(pack)) for pack in sizes])
    attends = (owners[:, :, None] == owners[:, None, :]).tril()[:, None]
    if mask == "bool":
        return attends
    return torch.zeros(attends.shape, dtype=mask).masked_fill_(~attends, torch.finfo(mask).min)


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _padded(sequences: Sequence[list[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in sequences])


def _learnt(labels: Sequence[Sequence[int]]) -> int:
    return sum(label != IGNORED for row in labels for label in row)
