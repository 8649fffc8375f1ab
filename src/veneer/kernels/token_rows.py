"""Tokens with embeddings and logits of an adapter's own, and low-rank updates of the embedding.

At TOKENS_OFFSET stand int32 [TOKENS] ascending token ids and, from the next multiple of ALIGNED elements on, a row
[TOKENS, hidden] for each. For each row of each segment with an adapter, at the embedding:

    out = the token's row, if it has one, else the base's;  out += B^T A[:, token]    A: [rank, vocabulary]

and at the output head, for each of its tokens t:  logits[t] = x · the row of t

A token from the base's vocabulary's size on is one that the adapter adds. Its logits go to columns of their own,
which only rows of this adapter are sampled with. Updates leave added tokens alone. Sums run in float32.

As in kernels/low_rank.py the Triton path never synchronizes, and its programs loop over the tiles in use.
"""

from __future__ import annotations

import torch

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.low_rank import DECODE_TILE, PROGRAMS
from veneer.kernels.tables import (
    A_OFFSET,
    B_OFFSET,
    BASE_SLOT,
    RANK,
    TOKENS,
    TOKENS_OFFSET,
    AdapterTables,
    RowTiles,
    int_elements,
)

HEAD_PROGRAMS = 264  # two for each multiprocessor of an H100: most adapters have few tokens of their own


def embed_rows(
    ids: torch.Tensor,
    out: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    vocabulary: int,
) -> None:
    """Turn the base's embeddings into those of each row's adapter, in place. Other rows are not touched.

    ids: int64 [rows]; out: [rows, hidden], contiguous, of the arena's dtype; `vocabulary`: the base's, in tokens.
    Raises ValueError otherwise.
    """
    if ids.dtype != torch.int64 or ids.shape != out.shape[:1]:
        raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}; they must be int64 [{out.shape[0]}]")
    if out.dtype != tables.arena.dtype or out.ndim != 2 or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; it must be contiguous {tables.arena.dtype}")
    run = embed_rows_triton if resolve(out.device).name == "triton" else embed_rows_torch
    run(ids, out, tables, tiles, site, vocabulary)


def token_logits(
    x: torch.Tensor, y: torch.Tensor, added: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int
) -> None:
    """Write the logits of the adapters' own tokens: into y, and those of added tokens into `added`.

    x: [rows, hidden], contiguous; y: [rows, vocabulary], contiguous; added: [rows or more, any number], contiguous;
    all of the arena's dtype. Added tokens beyond its columns are left out. Raises ValueError otherwise.
    """
    dtype = tables.arena.dtype
    for name, tensor in (("x", x), ("y", y), ("added", added)):
        if tensor.dtype != dtype or tensor.ndim != 2 or not tensor.is_contiguous() or len(tensor) < len(x):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be contiguous {dtype}, {len(x)} rows"
            )
    run = token_logits_triton if resolve(x.device).name == "triton" else token_logits_torch
    run(x, y, added, tables, tiles, site)


def _read(tables: AdapterTables, entry: list[int], hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, int64 [tokens], and rows [tokens, hidden] of an entry with tokens."""
    offset, count, itemsize = entry[TOKENS_OFFSET], entry[TOKENS], tables.arena.itemsize
    at = offset * itemsize // 4
    start = offset + int_elements(count, itemsize)
    return tables.ints[at : at + count].long(), tables.arena[start : start + count * hidden].view(count, -1)


def embed_rows_torch(
    ids: torch.Tensor,
    out: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    vocabulary: int,
) -> None:
    """Reference of `embed_rows`, and what CPU serving runs."""
    for slot, start, stop in tiles.segments:
        if slot == BASE_SLOT:
            continue
        entry = tables.entries_host[slot, site].tolist()
        tokens, rows = ids[start:stop], out[start:stop]
        if entry[TOKENS]:
            own, values = _read(tables, entry, out.shape[1])
            place = torch.searchsorted(own, tokens).clamp_(max=len(own) - 1)
            known = own[place] == tokens
            rows[known] = values[place[known]]
        if rank := entry[RANK]:
            a = torch.as_strided(tables.arena, (rank, vocabulary), (vocabulary, 1), entry[A_OFFSET])
            b = torch.as_strided(tables.arena, (rank, out.shape[1]), (out.shape[1], 1), entry[B_OFFSET])
            columns = a[:, tokens.clamp(max=vocabulary - 1)] * (tokens < vocabulary)
            rows.addmm_(columns.T, b)


def token_logits_torch(
    x: torch.Tensor, y: torch.Tensor, added: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int
) -> None:
    """Reference of `token_logits`, and what CPU serving runs."""
    vocabulary = y.shape[1]
    for slot, start, stop in tiles.segments:
        entry = [] if slot == BASE_SLOT else tables.entries_host[slot, site].tolist()
        if entry and entry[TOKENS]:
            own, values = _read(tables, entry, x.shape[1])
            logits = x[start:stop] @ values.T
            inside, beyond = own < vocabulary, (own >= vocabulary) & (own < vocabulary + added.shape[1])
            y[start:stop, own[inside]] = logits[:, inside]
            added[start:stop, own[beyond] - vocabulary] = logits[:, beyond]


def embed_rows_triton(
    ids: torch.Tensor,
    out: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    vocabulary: int,
) -> None:
    """`embed_rows` in Triton: a program has a block of columns of one tile of rows."""
    from veneer.kernels.jit import token_rows as jit

    rows, hidden = out.shape
    if rows:
        capacity, block_n = tiles.tiles.shape[0], 64
        jit.embed_rows[(min(capacity * -(-hidden // block_n), PROGRAMS),)](
            ids, out, tables.arena, tables.ints, tables.entries, tiles.tiles, tiles.used, site, capacity,
            hidden, vocabulary, tables.entries.stride(0), PER_INT=4 // tables.arena.itemsize,
            BLOCK_M=tiles.tile_rows, BLOCK_N=block_n, BLOCK_R=16, num_warps=4, **launch_options(out.device),
        )  # fmt: skip


def token_logits_triton(
    x: torch.Tensor, y: torch.Tensor, added: torch.Tensor, tables: AdapterTables, tiles: RowTiles, site: int
) -> None:
    """`token_logits` in Triton: a program has blocks of an adapter's tokens, for one tile of rows each."""
    from veneer.kernels.jit import token_rows as jit

    rows, hidden = x.shape
    if rows:
        decode = tiles.tile_rows <= DECODE_TILE
        jit.token_logits[(HEAD_PROGRAMS,)](
            x, y, added, tables.arena, tables.ints, tables.entries, tiles.tiles, tiles.used, site,
            tiles.tiles.shape[0], hidden, y.shape[1], added.shape[1], tables.entries.stride(0),
            PER_INT=4 // tables.arena.itemsize, BLOCK_M=tiles.tile_rows, BLOCK_N=16 if decode else 32,
            BLOCK_K=128 if decode else 64, num_warps=4, **launch_options(x.device),
        )  # fmt: skip
