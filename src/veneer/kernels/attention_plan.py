"""What paged attention decides before it touches a key: Triton's tile sizes, and the torch path's gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TARGET_PROGRAMS = 528  # four for each multiprocessor of an H100
MIN_SPLIT = 256  # keys; a shorter split costs more in merging than it wins
MAX_SPLITS = 32
TILE_BYTES = 1 << 14  # of queries, keys or values in shared memory; two stages of keys and values
SAME_GROUP = 64  # keys; decode rows up to this length are padded to each other


@dataclass(frozen=True)
class AttentionPlan:
    """Tile sizes of one launch. Depends on nothing that changes between replays of a graph."""

    block_m: int  # rows of a tile: (query, head of the group) pairs
    block_q: int  # queries of a tile
    block_n: int  # keys
    block_d: int  # head_dim as a power of two
    splits: int  # of the keys, in decode; a power of two
    programs: int  # for each sequence and key-value head
    num_warps: int


def plan(
    decode: bool,
    sequences: int,
    max_queries: int,
    max_keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    element_size: int,
) -> AttentionPlan:
    """Choose tiles that fit 99 KiB of shared memory (compute capability 8.6 and 12.0 have no more)."""
    group = heads // kv_heads
    block_d = _power_of_two(head_dim)
    row_bytes = block_d * element_size
    block_m = max(16, _power_of_two(group))
    if not decode:
        block_m = max(block_m, min(64, TILE_BYTES // row_bytes))
    block_q = 1 if decode else block_m // group
    wanted = min(TARGET_PROGRAMS // (sequences * kv_heads), max_keys // MIN_SPLIT, MAX_SPLITS)
    # Of powers of two there are few, so that none is compiled for the first time in somebody's request.
    splits = 1 << max(wanted, 1).bit_length() - 1 if decode else 1
    return AttentionPlan(
        block_m=block_m,
        block_q=block_q,
        block_n=max(16, min(64, TILE_BYTES // row_bytes)),
        block_d=block_d,
        splits=splits,
        programs=splits if decode else -(-max_queries // block_q),
        num_warps=4,
    )


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


@dataclass(frozen=True)
class KeyGroup:
    """Decode rows that share one padded gather, or one prefill chunk."""

    decode: bool
    rows: torch.Tensor | slice  # rows of q; int64 [sequences], or the chunk's rows
    slots: torch.Tensor  # int64 [sequences * keys] or [keys], into the cache seen as a row of slots
    mask: torch.Tensor  # bool, True = seen: [sequences, 1, 1, keys] or [queries, keys]


def key_groups(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_table: torch.Tensor,
    page_size: int,
    window: int | None,
) -> list[KeyGroup]:
    """Cut a batch into calls of dense attention: decode rows by the power of two of their key count.

    Padding repeats a sequence's own first key, so no sequence ever reads what another one wrote.
    """
    decode: dict[int, list[tuple[int, int]]] = {}
    groups = []
    row = 0
    for sequence, (queries, keys) in enumerate(zip(query_lens, kv_lens, strict=True)):
        if queries == 1:
            seen = keys if window is None else min(keys, window)
            decode.setdefault(max(seen, SAME_GROUP).bit_length(), []).append((sequence, row))
        elif queries > 1:
            groups.append(
                _chunk(slice(row, row + queries), queries, keys, block_table[sequence], page_size, window)
            )
        row += queries
    lens = torch.tensor(kv_lens, device=block_table.device)
    groups += [_decode_group(members, lens, block_table, page_size, window) for members in decode.values()]
    return groups


def _chunk(
    rows: slice, queries: int, keys: int, pages: torch.Tensor, page_size: int, window: int | None
) -> KeyGroup:
    start = 0 if window is None else max(keys - queries - window + 1, 0)
    key = torch.arange(start, keys, device=pages.device)
    position = torch.arange(keys - queries, keys, device=pages.device)[:, None]
    mask = key <= position
    if window is not None:
        mask &= position - key < window
    return KeyGroup(False, rows, pages[key // page_size] * page_size + key % page_size, mask)


def _decode_group(
    members: list[tuple[int, int]],
    lens: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    window: int | None,
) -> KeyGroup:
    sequences, rows = torch.tensor(members, device=block_table.device).unbind(1)
    keys = lens[sequences][:, None]
    start = torch.zeros_like(keys) if window is None else (keys - window).clamp(min=0)
    key = start + torch.arange(int((keys - start).max()), device=keys.device)
    mask = key < keys
    key = torch.where(mask, key, start)
    slots = block_table[sequences].gather(1, key // page_size) * page_size + key % page_size
    return KeyGroup(True, rows, slots.flatten(), mask[:, None, None])
