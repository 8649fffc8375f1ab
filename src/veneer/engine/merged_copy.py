"""A merged copy: for the linear layers that one adapter changes, linears of W0 + ΔW beside those of the base.

Everything else, the base's other layers and all its tensors, is the base's own and only read. Sums are in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from veneer.adapters.deltas import bias_change, weight_change
from veneer.adapters.program import EMBEDDING, Program
from veneer.engine.base import Base
from veneer.engine.into_base import check_mergeable
from veneer.engine.layers import AdaptedLinear
from veneer.engine.packed import DequantizingLinear, FusedPart, dequantized
from veneer.errors import AdapterRefused
from veneer.kernels.nf4_layout import BLOCK

MOST_LOST = 0.5  # of what an adapter changes; a copy that loses more is another adapter


@dataclass(frozen=True)
class MergedCopy:
    """What computes in place of the base's linears for one adapter.

    Attributes:
        key: of adapters/names.py.
        linears: by site (`AdaptedLinear.site`).
        bytes: of its own tensors.
        error: ‖W - (W0 + ΔW)‖ / ‖W0 + ΔW‖ over the weights W of all its linears (Frobenius).
        lost: the same distance against ‖ΔW‖: the part of the adapter that rounding takes away.
    """

    key: str
    linears: Mapping[int, nn.Module]
    bytes: int
    error: float
    lost: float


def copy_bytes(program: Program, base: Base, form: str) -> int:
    """Bytes of the weights of a program's copy; `form`: full (the base's compute type) or nf4 (quantized again).

    Raises:
        AdapterRefused: no weights do what the program does, or not in this format.
    """
    check_mergeable(program, base)
    if EMBEDDING in program.sites:
        raise AdapterRefused("the adapter changes the embedding, of which no copy is made")
    sites = [base.sites[name] for name in program.sites]
    for site in sites if form == "nf4" else ():
        if site.in_features % BLOCK:
            raise AdapterRefused(
                f"{site.name} has {site.in_features} columns, and nf4 is in blocks of {BLOCK}; use format full"
            )
    # two codes a byte, and a float32 scale for each block
    size = 0.5 + 4 / BLOCK if form == "nf4" else base.dtype.itemsize
    return int(sum(site.in_features * site.out_features * size for site in sites))


def make_copy(
    key: str, program: Program, base: Base, form: str, ended: Callable[[], bool] = lambda: False
) -> MergedCopy | None:
    """Make the copy of a program that `copy_bytes` takes, site by site; None when `ended` says so meanwhile.

    Raises:
        AdapterRefused: the program has an activation, or rounding takes away too much of it.
    """
    numbers = {name: number for number, name in enumerate(base.sites)}
    linears: dict[int, nn.Module] = {}
    distance = of_weights = of_change = 0.0  # squares
    size = 0
    for name, part in program.sites.items():
        if ended():
            return None
        change, moved = weight_change(part, base.sites[name], base), bias_change(part, base.sites[name], base)
        exact, bias = base.weight(name).add_(change), base.bias(name)
        if moved is not None:
            bias = moved if bias is None else bias + moved
        linears[numbers[name]] = linear = _linear(exact, bias, base, form)
        size += sum(tensor.nbytes for tensor in (*linear.parameters(), *linear.buffers()))
        distance += _square(dequantized(linear) - exact)
        of_weights += _square(exact)
        of_change += _square(change)
    error = math.sqrt(distance / of_weights) if distance else 0.0
    lost = math.sqrt(distance / of_change) if distance and of_change else math.inf if distance else 0.0
    if lost > MOST_LOST:
        better = "use format full" if form == "nf4" else "serve in float32 (--dtype)"
        raise AdapterRefused(
            f"in format {form}, {base.dtype}, its copy would lose {lost:.2f} of what the adapter changes "
            f"(‖W - (W0 + ΔW)‖ over ‖ΔW‖), and {MOST_LOST} is the most. For a copy {better}"
        )
    return MergedCopy(key, {**_neighbours(base, linears), **linears}, size, error, lost)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, base: Base, form: str) -> nn.Module:
    """A linear of this weight [out, in] and bias [out]."""
    bias = None if bias is None else bias.to(base.dtype)
    if form == "nf4":
        from bitsandbytes.functional import quantize_4bit  # an unquantized base never loads that library

        data, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        return DequantizingLinear(data, state.absmax, (weight.shape[0], weight.shape[1]), bias)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(base.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _neighbours(base: Base, linears: Mapping[int, nn.Module]) -> dict[int, nn.Module]:
    """The base's linears that it computes together with some of these: each by itself, in the base's memory."""
    parts = {
        module.site: module.base
        for module in base.model.modules()
        if isinstance(module, AdaptedLinear) and isinstance(module.base, FusedPart)
    }
    groups = {id(parts[site].group) for site in linears if site in parts}
    return {
        site: part.own for site, part in parts.items() if id(part.group) in groups and part.own is not None
    }


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
