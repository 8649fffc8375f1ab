"""RMSNorm (Zhang and Sennrich, 2019, arXiv 1910.07467): y = w x / sqrt(mean(x^2) + eps), rounded once."""

from __future__ import annotations

import torch
from torch.nn import functional

from veneer.kernels.backend import launch_options, resolve


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [rows, columns], rows contiguous -> the same shape; weight [columns]. Raises ValueError otherwise."""
    if x.ndim != 2 or x.stride(1) != 1 or weight.shape != x.shape[1:] or not weight.is_contiguous():
        raise ValueError(f"x is {list(x.shape)} and the weight {list(weight.shape)}; they do not fit")
    run = rms_norm_triton if resolve(x.device).name == "triton" else rms_norm_torch
    return run(x, weight, eps)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Reference of `rms_norm`."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in Triton, a program for each row."""
    from veneer.kernels.jit import norm as jit

    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if rows:
        block = 1 << (columns - 1).bit_length()
        jit.rms_norm[(rows,)](
            x,
            weight,
            out,
            columns,
            x.stride(0),
            eps,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **launch_options(x.device),
        )
    return out
