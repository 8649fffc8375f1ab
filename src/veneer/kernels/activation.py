"""What becomes of h = A x of adapters between `shrink` and the epilogue: h <- phi(h + d).

phi is named by the table's entry of a slot and site, so each row has its adapter's, and rows without an
activation keep their h. By ACTIVATION, the number of a kind in `tables.ACTIVATIONS`, where COUNT follows from the
rank and GROUP:

    elementwise     relu, silu, gelu, gelu_tanh, tanh, sigmoid, leaky_relu with slope 0.01
    softmax         over each GROUP of neighbouring ranks
    arrow           h = (scores [COUNT], experts [COUNT, GROUP]) -> (0, gate_e expert_e)
                    gate = softmax of the DETAIL largest |scores|, of the lowest number among equals; 0 elsewhere
    fusion          h = (start [COUNT], bottlenecks [COUNT, GROUP], keys [COUNT, GROUP])
                    -> (gates, gate_k psi(bottleneck_k), 0)    psi: the elementwise kind DETAIL, 0 is the identity
                    gate = softmax over k of start_k + sum of psi(bottleneck_k) key_k

Everything is computed in float32. As in kernels/low_rank.py the Triton path reads nothing on the host: its grid
follows from shapes, the capacity of the tile table and the bound of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.low_rank import DECODE_TILE, MAX_PARTS, PROGRAMS, Workspace
from veneer.kernels.tables import (
    ABSENT,
    ACTIVATION,
    ACTIVATIONS,
    BASE_SLOT,
    DETAIL,
    ELEMENTWISE,
    GROUP,
    INNER_OFFSET,
    MAX_CHOICES,
    RANK,
    AdapterTables,
    RowTiles,
)

ELEMENTWISE_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda h: h,
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": functional.leaky_relu,
}


def activate(
    tables: AdapterTables, tiles: RowTiles, site: int, sites: int, rows: int, workspace: Workspace
) -> None:
    """Replace the held h of `sites` neighbouring sites by phi(h + d), in one plane. Call `shrink` for them first.

    Raises ValueError when the workspace does not hold them.
    """
    device = tables.arena.device
    run = activate_triton if resolve(device).name == "triton" else activate_torch
    run(tables, tiles, site, sites, rows, workspace)


def activate_torch(
    tables: AdapterTables, tiles: RowTiles, site: int, sites: int, rows: int, workspace: Workspace
) -> None:
    """Reference of `activate`."""
    planes = workspace.held(site, sites, rows)
    out = workspace.hold_one(site, sites, rows)[:, 0]
    for slot, start, stop in tiles.segments:
        for index in range(sites if slot != BASE_SLOT else 0):
            entry = workspace.entries[slot, site + index].tolist()
            h = planes[index, :, start:stop, : entry[RANK]].sum(0)
            out[index, start:stop, : entry[RANK]] = activated(h, entry, tables.arena)


def activated(h: torch.Tensor, entry: list[int], arena: torch.Tensor) -> torch.Tensor:
    """phi(h + d) [rows, rank] by an entry of the tables; float32 where there is an activation."""
    kind = ACTIVATIONS[entry[ACTIVATION]]
    if not kind:
        return h
    h = h.float()
    if (offset := entry[INNER_OFFSET]) != ABSENT:
        h = h + arena[offset : offset + h.shape[1]].float()
    if kind in ELEMENTWISE_FUNCTIONS:
        return ELEMENTWISE_FUNCTIONS[kind](h)
    rank, group, detail = h.shape[1], entry[GROUP], entry[DETAIL]
    if kind == "softmax":
        return h.view(len(h), -1, group).softmax(-1).flatten(1)
    if kind == "arrow":
        return _arrow(h, group, rank // (1 + group), detail)
    return _fusion(h, group, rank // (1 + 2 * group), ELEMENTWISE_FUNCTIONS[ELEMENTWISE[detail]])


def _arrow(h: torch.Tensor, group: int, count: int, top_k: int) -> torch.Tensor:
    # A stable sort leaves equals in order, which topk does not.
    score, expert = h[:, :count].abs().sort(dim=1, descending=True, stable=True)
    kept = score[:, :top_k].softmax(1)
    gates = torch.zeros_like(score).scatter_(1, expert[:, :top_k], kept)
    experts = h[:, count:].view(len(h), count, group) * gates[:, :, None]
    return torch.cat([torch.zeros_like(score), experts.flatten(1)], 1)


def _fusion(
    h: torch.Tensor, group: int, count: int, inner: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    start, bottlenecks, keys = torch.split(h, [count, count * group, count * group], 1)
    made = inner(bottlenecks).view(len(h), count, group)
    gates = (start + (made * keys.view_as(made)).sum(2)).softmax(1)
    return torch.cat([gates, (made * gates[:, :, None]).flatten(1), torch.zeros_like(keys)], 1)


def activate_triton(
    tables: AdapterTables, tiles: RowTiles, site: int, sites: int, rows: int, workspace: Workspace
) -> None:
    """`activate` in Triton: a program has some of the ranks of one tile of rows at one site."""
    from veneer.kernels.jit import activation as jit

    planes = workspace.held(site, sites, rows)
    out = workspace.hold_one(site, sites, rows)
    if not rows:
        return
    capacity, prefill = tiles.tiles.shape[0], tiles.tile_rows > DECODE_TILE
    block_r = 16 if workspace.rank_bound <= 16 else 32
    parts = min(-(-workspace.rank_bound // block_r), MAX_PARTS)
    jit.activate[(min(capacity * sites * parts, PROGRAMS),)](
        planes, out, tables.arena, tables.entries, tiles.tiles, tiles.used, site, rows, capacity,
        planes.shape[1], workspace.rank_stride, tables.entries.stride(0),
        SITES=sites, PARTS=parts, BLOCK_M=tiles.tile_rows, BLOCK_R=block_r,
        CHOICES=MAX_CHOICES, num_warps=8 if prefill else 2, **launch_options(tables.arena.device),
    )  # fmt: skip
