"""NF4 linears in our own form, those of one input fused: they replace bitsandbytes' layers.

On the CPU `DequantizingLinear` keeps bitsandbytes' bytes and undoes double quantization once, at load, which is
a sixth of the time of a step there. On the GPU `PackedLinear` has the layout of our kernels. The base stays
resident once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from veneer.kernels.backend import resolve
from veneer.kernels.nf4 import choose, nf4_grouped, nf4_matmul, nf4_planes
from veneer.kernels.nf4_layout import (
    BLOCK,
    ROW_PADDING,
    TILE_ROWS,
    Nf4Codes,
    Nf4Weight,
    pack_nf4,
    read_absmax,
    read_bitsandbytes,
    unpack_nf4,
)

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that transformers' models call one after the other with the same input."""


class PackedLinear(nn.Module):
    """y = x W^T + bias for one linear, or for several of one input: then y holds their outputs side by side."""

    def __init__(self, weight: Nf4Weight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._weight = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        # the same storages, so that the model's memory can be counted
        self.register_buffer("packed", weight.packed, persistent=False)
        self.register_buffer("scales", weight.scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias: Any = self.bias
        y = nf4_matmul(x.reshape(-1, self.in_features), self._weight, bias)
        return y.view(*x.shape[:-1], self.out_features)

    def narrow(self, start: int, stop: int) -> PackedLinear | None:
        """Its output features from `start` to `stop`, in the same memory; None unless they are whole tiles."""
        if start % ROW_PADDING or (stop % ROW_PADDING and stop < self.out_features):
            return None
        weight = self._weight
        bias: Any = self.bias
        tiles = slice(start // TILE_ROWS, -(-stop // ROW_PADDING) * ROW_PADDING // TILE_ROWS)
        part = replace(
            weight, packed=weight.packed[tiles], scales=weight.scales[tiles], out_features=stop - start
        )
        return PackedLinear(part, None if bias is None else bias[start:stop])

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T [rows, N], without bias, as what adds up to it: [splits, rows, N].

        Few rows on a GPU give float32 planes that were never added; otherwise it is one part of x's type.
        """
        if resolve(x.device).name == "triton" and (sizes := choose(x, self._weight)).fused:
            return nf4_planes(x, self._weight, sizes)
        return nf4_matmul(x, self._weight).unsqueeze(0)

    def grouped_parts(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """The same for groups of output features that each have an x of their own, [groups, rows, in]."""
        return nf4_grouped(x, self._weight, widths)


class DequantizingLinear(nn.Module):
    """y = x W^T + bias with W dequantized by bitsandbytes at each call, to the same bits as its own layer."""

    def __init__(
        self, data: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None
    ) -> None:
        """data: uint8, two codes a byte, rows in order; absmax: float32, one for each 64 columns of a row."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias: Any = self.bias
        shape = (self.out_features, self.in_features)
        dequantize = torch.ops.bitsandbytes.dequantize_4bit
        return nn.functional.linear(x, dequantize(self.data, self.absmax, BLOCK, "nf4", shape, x.dtype), bias)

    def narrow(self, start: int, stop: int) -> DequantizingLinear:
        """Its output features from `start` to `stop`, in the same memory."""
        codes, blocks = self.in_features // 2, self.in_features // BLOCK  # of a row
        data: Any = self.data
        absmax: Any = self.absmax
        bias: Any = self.bias
        return DequantizingLinear(
            data[start * codes : stop * codes],
            absmax[start * blocks : stop * blocks],
            (stop - start, self.in_features),
            None if bias is None else bias[start:stop],
        )


class FusedPart(nn.Module):
    """One of several linears with the same input: the first computes all, each returns its columns."""

    def __init__(self, group: FusedGroup, index: int) -> None:
        super().__init__()
        self._group = [group]  # in a list: the group is a child of its first part only
        self.index = index
        if index == 0:
            self.whole = group.whole
        self.in_features = group.whole.in_features
        self.out_features = group.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.part(x, self.index)

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """The same for an x that the other parts do not get."""
        return self.group.alone(x, self.index)

    @property
    def group(self) -> FusedGroup:
        return self._group[0]

    @property
    def own(self) -> Linear | None:
        """This linear by itself, in the memory of all; None where the layout does not allow it."""
        return self.group._narrowed[self.index]


class FusedGroup:
    """The linears of one input, and their output between the first call and the last."""

    def __init__(self, whole: Linear, sizes: Sequence[int]) -> None:
        self.whole = whole
        self.sizes = tuple(sizes)
        self._x: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Output of linear `index` for x, a view of the common output."""
        if self._x is not x:
            self._x, self._parts = x, self.whole(x).split(self.sizes, dim=-1)
        found = self._parts[index]
        self._end(index)
        return found

    def alone(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Output of linear `index` for an x of its own: only its rows are read where the layout allows."""
        own = self._narrowed[index]
        self._end(index)
        found: torch.Tensor = self.whole(x).split(self.sizes, dim=-1)[index] if own is None else own(x)
        return found

    def _end(self, index: int) -> None:
        if index == len(self.sizes) - 1:
            self._x, self._parts = None, ()

    @functools.cached_property
    def _narrowed(self) -> list[Linear | None]:
        stops = list(accumulate(self.sizes))
        return [self.whole.narrow(stop - size, stop) for stop, size in zip(stops, self.sizes, strict=True)]

    def is_made_of(self, modules: Sequence[nn.Module]) -> bool:
        """Whether these are all its parts, in order."""
        ours = [m.index for m in modules if isinstance(m, FusedPart) and m.group is self]
        return len(ours) == len(modules) and ours == list(range(len(self.sizes)))


Linear = PackedLinear | DequantizingLinear
Make = Callable[[Sequence[Any]], Linear]


def can_pack(module: nn.Module) -> bool:
    """Whether it is an NF4 layer whose rows hold whole blocks."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return (
        state is not None
        and state.quant_type == "nf4"
        and state.blocksize == BLOCK
        and state.shape[1] % BLOCK == 0
    )


def pack_linears(model: nn.Module, make: Make) -> dict[str, nn.Module]:
    """What replaces each packable linear of the model, by its module path. They lose their weights.

    `make` is `packed` or `dequantizing`: it turns the linears of one input into one.
    """
    known = {name: module for name, module in model.named_modules() if can_pack(module)}
    replaced: dict[str, nn.Module] = {}
    for name in known:
        if name not in replaced:
            names = _group_of(name, known)
            modules = [known[n] for n in names]
            parts = fuse(make(modules), [int(module.out_features) for module in modules])
            replaced.update(zip(names, parts, strict=True))
            for done in names:
                known[done].weight = None
    return replaced


def _group_of(name: str, known: Mapping[str, nn.Module]) -> list[str]:
    parent, _, attribute = name.rpartition(".")
    for group in FUSED:
        names = [f"{parent}.{part}" for part in group]
        if attribute in group and all(other in known for other in names):
            return names
    return [name]


def packed(modules: Sequence[Any]) -> PackedLinear:
    """The layers side by side in our kernels' layout."""
    read = [read_bitsandbytes(module.weight.data, module.weight.quant_state) for module in modules]
    codes = Nf4Codes(torch.cat([r.codes for r in read]), torch.cat([r.absmax for r in read]))
    return PackedLinear(pack_nf4(codes), _bias(modules))


def dequantizing(modules: Sequence[Any]) -> DequantizingLinear:
    """The layers side by side in bitsandbytes' bytes."""
    states = [module.weight.quant_state for module in modules]
    shape = (sum(state.shape[0] for state in states), states[0].shape[1])
    data = torch.cat([module.weight.data.view(torch.uint8).view(-1) for module in modules]).view(-1, 1)
    return DequantizingLinear(
        data, torch.cat([read_absmax(state) for state in states]), shape, _bias(modules)
    )


def _bias(modules: Sequence[Any]) -> torch.Tensor | None:
    """The layers' biases side by side, in the type they compute in; zero for one that has none."""
    present = next((module.bias for module in modules if module.bias is not None), None)
    if present is None:
        return None
    dtype = modules[0].compute_dtype
    zeros = [torch.zeros(m.out_features, dtype=dtype, device=present.device) for m in modules]
    return torch.cat(
        [z if m.bias is None else m.bias.data.to(dtype) for m, z in zip(modules, zeros, strict=True)]
    )


def dequantized(module: Any) -> torch.Tensor:
    """The weight [out, in] that a linear of the base multiplies with, float32 on its device."""
    if isinstance(module, FusedPart):
        if module.own is not None:
            return dequantized(module.own)
        return torch.split(dequantized(module.group.whole), list(module.group.sizes))[module.index]
    if isinstance(module, PackedLinear):
        return unpack_nf4(module._weight, torch.float32)
    weight: Any = module.weight if hasattr(module, "weight") else None
    found: torch.Tensor
    if isinstance(module, DequantizingLinear):
        shape = (module.out_features, module.in_features)
        found = _dequantize_4bit(module.data, module.absmax, BLOCK, "nf4", shape, torch.float32)
    elif (state := getattr(weight, "quant_state", None)) is not None:
        codes = weight.data, read_absmax(state)
        found = _dequantize_4bit(*codes, state.blocksize, state.quant_type, state.shape, torch.float32)
    elif (scales := getattr(weight, "SCB", None)) is not None:  # LLM.int8: rows, each with its largest value
        found = weight.data.float() * scales[:, None] / 127
    else:
        found = weight.detach().float()
    return found


def _dequantize_4bit(*arguments: Any) -> torch.Tensor:
    """bitsandbytes' own. An unquantized base never loads that library, so the name is looked up here."""
    found: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(*arguments)
    return found


def dequantized_bias(module: Any) -> torch.Tensor | None:
    """The bias [out] of a linear of the base, float32 on its device."""
    if isinstance(module, FusedPart):
        whole = dequantized_bias(module.group.whole)
        return None if whole is None else torch.split(whole, list(module.group.sizes))[module.index]
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach().float()


def fuse(whole: Linear, sizes: Sequence[int]) -> list[nn.Module]:
    """The modules that stand for linears of the given output sizes, side by side in `whole`."""
    if len(sizes) == 1:
        return [whole]
    group = FusedGroup(whole, sizes)
    return [FusedPart(group, index) for index in range(len(sizes))]
