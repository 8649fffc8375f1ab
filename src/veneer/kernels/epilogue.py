"""What follows the base's linears in a layer: their planes are added up, adapters expand, the rest is elementwise.

    total = OUT(sum of parts + bias) + update      update = B^T h + the adapter's bias, h from kernels/low_rank.py

Where tiles have `row_slots`, B^T h is multiplied by each row's own factors, and h must have been by `scale_ranks`
(kernels/shared.py).

OUT is the scale and the rotation of kernels/transform.py; it is applied, and its places are read, only when a call
says `scaled`. The sums run in float32 and are rounded to the engine's dtype once; what is computed of them is
rounded where separate layers would round it. Rows without an adapter have no update and no OUT. The tiles must
cover every row. When `tiles.adapted` is False nothing of the adapters is read, and no `shrink` is needed.

`parts` is [splits, rows, features]: float32 planes of a split product, or one part in the engine's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.low_rank import PROGRAMS, SHARED_TILE, Workspace
from veneer.kernels.shared import scales_of
from veneer.kernels.tables import ABSENT, BASE_SLOT, RANK, UPDATE_SCALE, AdapterTables, RowTiles
from veneer.kernels.transform import transform_output_torch

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class EpiloguePlan:
    """Tile sizes of one launch. Depends on nothing that changes between replays of a graph."""

    block_m: int  # rows
    block_n: int  # columns of each of a program's two blocks
    block_r: int  # ranks
    programs: int
    num_warps: int


def plan(
    columns: int, capacity: int, tile_rows: int, rank_bound: int, head_dim: int | None = None
) -> EpiloguePlan:
    """Choose tiles for `columns` columns of left blocks, or for all columns in blocks of a head.

    Few tiles get narrow blocks, so that there are programs for every multiprocessor. Of those of SHARED_TILE rows
    few are in use, whatever their capacity.
    """
    prefill, shared = tile_rows > SHARED_TILE, tile_rows == SHARED_TILE
    if head_dim is not None:
        block_n, blocks = 1 << (head_dim // 2 - 1).bit_length(), columns // head_dim
    else:
        many = not shared and capacity * (-(-columns // 64)) >= PROGRAMS // 2
        block_n = 64 if prefill or many else 32
        blocks = -(-columns // block_n)
    return EpiloguePlan(
        block_m=tile_rows,
        block_n=block_n,
        block_r=32 if (prefill or shared) and rank_bound > 16 else 16,
        programs=min(capacity * blocks, PROGRAMS),
        num_warps=8 if prefill else 4 if shared else 2,
    )


def add_update(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    workspace: Workspace,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scaled: bool = False,
) -> torch.Tensor:
    """total, and residual + total when there is a residual [rows, out]. Returns [rows, out].

    `out` may be the storage of parts[0] unless `scaled`, or columns of a wider tensor. `shrink` must have been
    called for (site, 1). Raises ValueError for what does not fit.
    """
    _check(parts, tables, workspace, bias)
    if scaled and out is not None and out.data_ptr() == parts.data_ptr():
        raise ValueError("out is parts[0], whose columns are read as partners of others; give another tensor")
    run = add_update_triton if resolve(parts.device).name == "triton" else add_update_torch
    return run(parts, tables, tiles, site, workspace, bias, residual, out, scaled)


def gated(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    activation: str,
    bias: torch.Tensor | None = None,
    scaled: bool = False,
) -> torch.Tensor:
    """activation(gate) * up, [rows, N / 2]; gate and up are the halves of the N features.

    sites: 2 when gate is `site` and up the next, 1 when one site makes both. activation: "silu", "gelu_tanh".
    """
    _check(parts, tables, workspace, bias, multiple=2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation is {activation!r}; it must be one of {ACTIVATIONS}")
    run = gated_triton if resolve(parts.device).name == "triton" else gated_torch
    return run(parts, tables, tiles, site, sites, workspace, activation, bias, scaled)


def rope(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    heads: int,
    kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    bias: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    scaled: bool = False,
) -> torch.Tensor:
    """q [rows, heads, head_dim] after RoPE; k after RoPE and v go to their slots of the caches.

    The features of `parts` are the heads of q, of k and of v, side by side. sites: 3 when they are neighbours
    from `site` on, 1 when one site makes all. q_norm and k_norm [head_dim] are weights of an RMSNorm over each
    head, before RoPE. cos and sin: [rows, head_dim], of the engine's dtype.

        RoPE: z cos + rotate_half(z) sin      rotate_half(z) = (-second half, first half)

    k_cache, v_cache: [pages, page_size, kv_heads, head_dim]; slot_mapping: int32 or int64 [rows].
    """
    head_dim = k_cache.shape[3]
    _check(parts, tables, workspace, bias)
    if parts.shape[2] != (heads + 2 * kv_heads) * head_dim or head_dim % 2:
        raise ValueError(f"{parts.shape[2]} features are not {heads} + 2 x {kv_heads} heads of {head_dim}")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.shape != (parts.shape[1], head_dim) or not angle.is_contiguous():
            raise ValueError(f"{name} is {list(angle.shape)}; it must be {[parts.shape[1], head_dim]}")
    run = rope_triton if resolve(parts.device).name == "triton" else rope_torch
    return run(
        parts, tables, tiles, site, sites, workspace, heads, kv_heads, cos, sin, k_cache, v_cache,
        slot_mapping, bias, q_norm, k_norm, eps, scaled,
    )  # fmt: skip


def add_update_torch(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    workspace: Workspace,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scaled: bool = False,
) -> torch.Tensor:
    """Reference of `add_update`."""
    total = _total(parts, tables, tiles, site, (parts.shape[2],), workspace, bias, scaled)
    if residual is not None:
        total = residual + total
    return total if out is None else out.copy_(total)


def gated_torch(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    activation: str,
    bias: torch.Tensor | None = None,
    scaled: bool = False,
) -> torch.Tensor:
    """Reference of `gated`."""
    features = parts.shape[2]
    widths = (features // sites,) * sites
    gate, up = _total(parts, tables, tiles, site, widths, workspace, bias, scaled).chunk(2, -1)
    return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


def rope_torch(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    heads: int,
    kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    bias: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    scaled: bool = False,
) -> torch.Tensor:
    """Reference of `rope`."""
    head_dim = k_cache.shape[3]
    counts = (heads, kv_heads, kv_heads)
    widths = tuple(count * head_dim for count in counts)
    total = _total(
        parts, tables, tiles, site, widths if sites == 3 else (sum(widths),), workspace, bias, scaled
    ).view(parts.shape[1], -1, head_dim)
    q, k, v = torch.split(total, list(counts), dim=1)
    if q_norm is not None:
        q = functional.rms_norm(q, (head_dim,), q_norm, eps)
    if k_norm is not None:
        k = functional.rms_norm(k, (head_dim,), k_norm, eps)
    q, k = (z * cos[:, None] + _rotate_half(z) * sin[:, None] for z in (q, k))
    k_cache.view(-1, kv_heads, head_dim).index_copy_(0, slot_mapping.long(), k)
    v_cache.view(-1, kv_heads, head_dim).index_copy_(0, slot_mapping.long(), v)
    return q.contiguous()


def _rotate_half(z: torch.Tensor) -> torch.Tensor:
    first, second = z.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _total(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    widths: tuple[int, ...],
    workspace: Workspace,
    bias: torch.Tensor | None,
    scaled: bool,
) -> torch.Tensor:
    """The parts, bias and updates of sites with outputs of these widths side by side, in the engine's dtype."""
    dtype = tables.arena.dtype
    total = parts.float().sum(0)
    if bias is not None:
        total += bias.float()
    if tiles.adapted:
        planes = workspace.held(site, len(widths), parts.shape[1])
        for index, columns in enumerate(torch.split(total, list(widths), -1)):
            if scaled:
                transform_output_torch(columns, tables, tiles, site + index)
            _add_expanded(columns, planes[index].sum(0).to(dtype), tables, tiles, site + index, workspace)
    return total.to(dtype)


def _add_expanded(
    total: torch.Tensor,
    h: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    workspace: Workspace,
) -> None:
    width = total.shape[1]
    for slot, start, stop in tiles.segments:
        if slot == BASE_SLOT:
            continue
        _, b_offset, bias_offset, rank = workspace.entries[slot, site, : RANK + 1].tolist()
        if rank:
            b = torch.as_strided(tables.arena, (rank, width), (width, 1), b_offset)
            update = h[start:stop, :rank].float() @ b.float()
            scales = scales_of(tables, tiles, site, UPDATE_SCALE, start, stop, width)
            total[start:stop] += update if scales is None else update * scales.float()
        if bias_offset != ABSENT:
            total[start:stop] += tables.arena[bias_offset : bias_offset + width].float()


def add_update_triton(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    workspace: Workspace,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scaled: bool = False,
) -> torch.Tensor:
    """`add_update` in Triton."""
    from veneer.kernels.jit import epilogue as jit

    _, rows, features = parts.shape
    if out is None:
        out = torch.empty(rows, features, dtype=tables.arena.dtype, device=parts.device)
    launch = _launch(parts, tables, tiles, site, 1, workspace, -(-features // 2), bias, scaled)
    in_place = out.data_ptr() == parts.data_ptr() and len(parts) == 1 and bias is None and residual is None
    if rows:
        jit.add_update[(launch.programs,)](
            parts, parts if bias is None else bias, parts if residual is None else residual, out,
            *launch.shared, features, parts.stride(0), parts.stride(1),
            0 if residual is None else residual.stride(0), out.stride(0), *launch.strides,
            HAS_RESIDUAL=residual is not None, IN_PLACE=in_place and tiles.adapted, **launch.constants,
        )  # fmt: skip
    return out


def gated_triton(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    activation: str,
    bias: torch.Tensor | None = None,
    scaled: bool = False,
) -> torch.Tensor:
    """`gated` in Triton."""
    from veneer.kernels.jit import epilogue as jit

    rows, half = parts.shape[1], parts.shape[2] // 2
    out = torch.empty(rows, half, dtype=tables.arena.dtype, device=parts.device)
    launch = _launch(parts, tables, tiles, site, sites, workspace, half, bias, scaled)
    if rows:
        jit.gated[(launch.programs,)](
            parts, parts if bias is None else bias, out, *launch.shared, half,
            parts.stride(0), parts.stride(1), *launch.strides,
            SITES=sites, ACTIVATION=activation, **launch.constants,
        )  # fmt: skip
    return out


def rope_triton(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    heads: int,
    kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    bias: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    scaled: bool = False,
) -> torch.Tensor:
    """`rope` in Triton: a program has one head of one tile of rows."""
    from veneer.kernels.jit import epilogue as jit

    rows, head_dim = parts.shape[1], k_cache.shape[3]
    q = torch.empty(rows, heads, head_dim, dtype=tables.arena.dtype, device=parts.device)
    launch = _launch(parts, tables, tiles, site, sites, workspace, parts.shape[2], bias, scaled, head_dim)
    if rows:
        jit.rope[(launch.programs,)](
            parts, parts if bias is None else bias, q, k_cache, v_cache, slot_mapping, cos, sin,
            q if q_norm is None else q_norm, q if k_norm is None else k_norm, *launch.shared, eps,
            parts.stride(0), parts.stride(1), *launch.strides,
            SITES=sites, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
            HAS_Q_NORM=q_norm is not None, HAS_K_NORM=k_norm is not None, **launch.constants,
        )  # fmt: skip
    return q


class _Launch(NamedTuple):
    """What the launches of all epilogues have in common."""

    programs: int
    shared: tuple[Any, ...]
    strides: tuple[int, int]  # of h's rows and of the entries' slots
    constants: dict[str, Any]


def _launch(
    parts: torch.Tensor,
    tables: AdapterTables,
    tiles: RowTiles,
    site: int,
    sites: int,
    workspace: Workspace,
    columns: int,
    bias: torch.Tensor | None,
    scaled: bool,
    head_dim: int | None = None,
) -> _Launch:
    count, rows, _ = parts.shape
    capacity = tiles.tiles.shape[0] if tiles.adapted else -(-rows // tiles.tile_rows)
    h = workspace.held(site, sites, rows) if tiles.adapted else workspace.planes.view(1, 1, 1, -1)
    sizes = plan(columns, capacity, tiles.tile_rows, workspace.rank_bound, head_dim)
    row_slots = tiles.row_slots if tiles.adapted else None
    of_rows = tiles.used if row_slots is None else row_slots
    tensors = (tables.arena, tables.entries, tiles.tiles, tiles.used, of_rows, h)
    constants = {
        "PARTS": 1 << (count - 1).bit_length(),
        "SPLITS": h.shape[1],
        "HAS_BIAS": bias is not None,
        "ADAPTED": tiles.adapted,
        "SCALED": scaled and tiles.adapted,
        "SHARED": row_slots is not None,
        "BLOCK_M": sizes.block_m,
        "BLOCK_N": sizes.block_n,
        "BLOCK_R": sizes.block_r,
        "num_warps": sizes.num_warps,
        "num_stages": 1,  # the kernels load ahead themselves
        **launch_options(parts.device),
    }
    strides = (workspace.rank_stride, tables.entries.stride(0))
    return _Launch(sizes.programs, (*tensors, site, rows, capacity, count), strides, constants)


def _check(
    parts: torch.Tensor,
    tables: AdapterTables,
    workspace: Workspace,
    bias: torch.Tensor | None,
    multiple: int = 1,
) -> None:
    dtype = tables.arena.dtype
    if parts.ndim != 3 or parts.stride(2) != 1 or parts.shape[2] % multiple:
        raise ValueError(
            f"parts are {list(parts.shape)}; they must be [splits, rows, features], rows contiguous and "
            f"features a multiple of {multiple}"
        )
    if parts.dtype not in (torch.float32, dtype):
        raise ValueError(f"parts are {parts.dtype}; they must be torch.float32 or the arena's {dtype}")
    if bias is not None and (bias.shape != parts.shape[2:] or not bias.is_contiguous()):
        raise ValueError(f"the bias is {list(bias.shape)}; it must be {list(parts.shape[2:])}")
    if workspace.arena is not tables.arena:
        raise ValueError("the workspace was made for another arena")
