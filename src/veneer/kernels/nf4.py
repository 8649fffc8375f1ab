"""Matmul with NF4 weights that stay packed: one resident layout for decode, prefill and training.

    y = x W^T + bias      W as nf4_layout.py defines it

Few rows decode W on its way to the matrix unit and never write it. Up to 16 rows, and without Hopper's matrix
unit, products of bf16 values are scaled and summed in float32. With more rows the values are scaled first, in bf16:
that rounds each weight as a bf16 copy of W does, and its scale once more (together a relative RMS of 2e-3 of the
output, which a bf16 output rounds by 1.7e-3). With many rows W is dequantized into a scratch, rounded to bf16
once, for a dense matmul. Rows do not influence each other. No result is added with atomics: a call gives the same
bits each time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from veneer.kernels.backend import launch_options, resolve
from veneer.kernels.nf4_layout import (
    TILE_ROWS,
    Nf4Weight,
    codebook,
    pair_table,
    permute_tables,
    unpack_nf4,
)
from veneer.kernels.nf4_plan import Device, Nf4Plan, plan

MAX_GROUPS = 3  # q, k and v


def nf4_matmul(
    x: torch.Tensor,
    weight: Nf4Weight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] W^T + bias -> [M, N], in `out` when it is given.

    `scratch` (x's type, at least N K elements) holds W when there are many rows; without it it is allocated.
    All tensors must be contiguous, and bf16 where Triton runs; raises ValueError otherwise.
    """
    run = nf4_matmul_triton if resolve(x.device).name == "triton" else nf4_matmul_torch
    return run(x, weight, bias, out, scratch)


def nf4_matmul_torch(
    x: torch.Tensor,
    weight: Nf4Weight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `nf4_matmul`: dequantized and multiplied in float32, rounded to x's type once."""
    out = _check(x, weight, bias, out)
    total = x.float() @ unpack_nf4(weight, torch.float32).T
    return out.copy_(total if bias is None else total + bias.float())


def nf4_matmul_triton(
    x: torch.Tensor,
    weight: Nf4Weight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    sizes: Nf4Plan | None = None,
) -> torch.Tensor:
    """`nf4_matmul` in Triton: few rows decode on the way to the matrix unit, many rows dequantize first."""
    from veneer.kernels.jit.nf4 import add_planes

    out = _check(x, weight, bias, out)
    rows = x.shape[0]
    if rows == 0:
        return out
    sizes = sizes or choose(x, weight)
    if not sizes.fused:
        dense = _scratch(x, weight, scratch)
        dequantize_nf4(weight, dense)
        return torch.mm(x, dense.T, out=out) if bias is None else torch.addmm(bias, x, dense.T, out=out)
    if sizes.splits == 1:
        _launch(x, weight, bias, out, sizes)
        return out
    planes = torch.empty(sizes.splits, *out.shape, dtype=torch.float32, device=x.device)
    _launch(x, weight, None, planes, sizes)
    block = 512
    add_planes[(-(-out.numel() // block),)](
        planes,
        out if bias is None else bias,
        out,
        out.numel(),
        weight.out_features,
        SPLITS=sizes.splits,
        HAS_BIAS=bias is not None,
        BLOCK=block,
    )
    return out


def nf4_planes(x: torch.Tensor, weight: Nf4Weight, sizes: Nf4Plan | None = None) -> torch.Tensor:
    """x W^T as float32 planes [splits, M, N] for a consumer that adds them itself. Triton only, few rows."""
    sizes = sizes or choose(x, weight)
    if not sizes.fused:
        raise ValueError(f"{x.shape[0]} rows are multiplied with a dequantized weight, which makes no planes")
    planes = torch.empty(sizes.splits, x.shape[0], weight.out_features, dtype=torch.float32, device=x.device)
    _check(x, weight, None, planes[0])
    if x.shape[0]:
        _launch(x, weight, None, planes, sizes)
    return planes


def nf4_grouped(x: torch.Tensor, weight: Nf4Weight, widths: Sequence[int]) -> torch.Tensor:
    """Groups of output features, each of an x of its own, side by side, as what adds up to it: [splits, M, N].

        y[:, columns of group g] = x[g] W[features of group g]^T      x: [groups, M, K]

    `widths` are the groups' features, N together. Few rows on a GPU give float32 planes that were never added;
    otherwise it is one part of x's type. Raises ValueError for what does not fit.
    """
    if x.ndim != 3 or len(x) != len(widths) or sum(widths) != weight.out_features or len(x) > MAX_GROUPS:
        raise ValueError(
            f"x is {list(x.shape)} for groups of {list(widths)} features; it must be [groups, rows, "
            f"{weight.in_features}] for at most {MAX_GROUPS} groups of {weight.out_features} features in all"
        )
    run = nf4_grouped_triton if resolve(x.device).name == "triton" else nf4_grouped_torch
    return run(x, weight, widths)


def nf4_grouped_torch(x: torch.Tensor, weight: Nf4Weight, widths: Sequence[int]) -> torch.Tensor:
    """Reference of `nf4_grouped`: dequantized and multiplied in float32, rounded to x's type once."""
    matrices = torch.split(unpack_nf4(weight, torch.float32), list(widths))
    columns = [rows.float() @ matrix.T for rows, matrix in zip(x, matrices, strict=True)]
    return torch.cat(columns, -1).to(x.dtype).unsqueeze(0)


def nf4_grouped_triton(
    x: torch.Tensor, weight: Nf4Weight, widths: Sequence[int], sizes: Nf4Plan | None = None
) -> torch.Tensor:
    """`nf4_grouped` in Triton: one launch of few rows, where the groups begin with a program's tiles."""
    groups, rows, _ = x.shape
    sizes = sizes or choose(x[0], weight)
    starts = [0, *accumulate(widths)][:groups]
    if not sizes.fused:
        y = torch.empty(rows, weight.out_features, dtype=x.dtype, device=x.device)
        dense = _scratch(x[0], weight, None)
        dequantize_nf4(weight, dense)
        for group, part in enumerate(torch.split(dense, list(widths))):
            torch.mm(x[group], part.T, out=y[:, starts[group] : starts[group] + widths[group]])
        return y.unsqueeze(0)
    if any(start % (TILE_ROWS * sizes.tiles) for start in starts):  # the whole product for each
        wholes = [torch.split(nf4_planes(each, weight, sizes), list(widths), -1) for each in x]
        return torch.cat([whole[group] for group, whole in enumerate(wholes)], -1)
    planes = torch.empty(sizes.splits, rows, weight.out_features, dtype=torch.float32, device=x.device)
    if not x.is_contiguous():
        raise ValueError(f"x {list(x.shape)} must be contiguous")
    _check(x[0], weight, None, planes[0])
    if rows:
        _launch(x, weight, None, planes, sizes, starts)
    return planes


def dequantize_nf4(weight: Nf4Weight, out: torch.Tensor) -> None:
    """Write W into `out` [N, K] in one pass, in out's type. Triton only; `unpack_nf4` is the reference."""
    from veneer.kernels.jit.nf4 import dequantize

    if out.shape != (weight.out_features, weight.in_features) or not out.is_contiguous():
        raise ValueError(
            f"out is {list(out.shape)}; it must be contiguous {[weight.out_features, weight.in_features]}"
        )
    dequantize[(weight.pairs, -(-weight.out_features // 64))](
        weight.packed,
        weight.scales,
        weight.multiplier,
        permute_tables(out.device),
        codebook(out.dtype, out.device),
        out,
        weight.in_features,
        weight.out_features,
        weight.pairs,
        PERMUTE=_permutes(out),
    )


def choose(x: torch.Tensor, weight: Nf4Weight) -> Nf4Plan:
    """The plan for x on its device."""
    return plan(x.shape[0], weight.out_features, weight.in_features, _device(x.device))


def _launch(
    x: torch.Tensor,
    weight: Nf4Weight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    sizes: Nf4Plan,
    starts: Sequence[int] = (0,),
) -> None:
    """`starts`: the first output feature of each group, which is that of a program."""
    from veneer.kernels.jit.nf4_matmul import matmul

    rows, columns = x.shape[-2:]
    begins = [start // TILE_ROWS for start in starts] + [0] * (MAX_GROUPS - len(starts))
    grid = (-(-rows // sizes.block_m), -(-weight.out_features // (64 * sizes.tiles)), sizes.splits)
    matmul[grid](
        x,
        weight.packed,
        weight.scales,
        weight.multiplier,
        pair_table(x.device) if sizes.lookup else permute_tables(x.device),
        x if bias is None else bias,
        out,
        rows,
        columns,
        weight.out_features,
        weight.pairs,
        sizes.split_pairs,
        *begins[1:],
        GROUPS=len(starts),
        TILES=sizes.tiles,
        BLOCK_M=sizes.block_m,
        STAGES=sizes.stages,
        EVEN=columns % 128 == 0,
        HAS_BIAS=bias is not None,
        LOOKUP=sizes.lookup,
        WGMMA=sizes.wgmma,
        num_warps=sizes.warps,
        **(launch_options(x.device) if sizes.dependent_launch else {"PDL": False}),
    )


def _permutes(tensor: torch.Tensor) -> bool:
    """Whether the decode is PTX. Elsewhere (the interpreter, AMD) it is a lookup."""
    return tensor.is_cuda and torch.version.hip is None


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device()
    properties = torch.cuda.get_device_properties(device)
    return Device(
        multiprocessors=properties.multi_processor_count,
        wgmma=properties.major == 9,
        dependent_launch=properties.major >= 9,
    )


def _scratch(x: torch.Tensor, weight: Nf4Weight, scratch: torch.Tensor | None) -> torch.Tensor:
    shape = (weight.out_features, weight.in_features)
    if scratch is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if scratch.dtype != x.dtype or scratch.numel() < math.prod(shape) or not scratch.is_contiguous():
        raise ValueError(f"scratch must be contiguous {x.dtype} of at least {math.prod(shape)} elements")
    return scratch.view(-1)[: math.prod(shape)].view(shape)


def _check(
    x: torch.Tensor, weight: Nf4Weight, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """The output, made when it is not given. Raises ValueError for what does not fit."""
    if x.ndim != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise ValueError(f"x is {list(x.shape)}; it must be contiguous [rows, {weight.in_features}]")
    if _permutes(x) and x.dtype != torch.bfloat16:
        raise ValueError(f"x is {x.dtype}; on a GPU it must be torch.bfloat16")
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"the bias is {list(bias.shape)}; it must be {[weight.out_features]}")
    shape = (x.shape[0], weight.out_features)
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)}; it must be contiguous {list(shape)}")
    return out
