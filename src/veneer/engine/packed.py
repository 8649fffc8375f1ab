"""NF4 linears on the GPU: bitsandbytes' weights repacked for our kernels, those of one input fused.

The packed copy replaces bitsandbytes' (the base stays resident once) and serves decode and prefill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from veneer.kernels.nf4 import nf4_matmul
from veneer.kernels.nf4_layout import BLOCK, Nf4Codes, Nf4Weight, pack_nf4, read_bitsandbytes

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


class FusedPart(nn.Module):
    """One of several linears with the same input: the first computes all, each returns its columns."""

    def __init__(self, group: FusedGroup, index: int) -> None:
        super().__init__()
        self._group = [group]  # in a list: the group is a child of its first part only
        self._index = index
        if index == 0:
            self.whole = group.whole
        self.in_features = group.whole.in_features
        self.out_features = group.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._group[0].part(x, self._index)


class FusedGroup:
    """The linears of one input, and their output between the first call and the last."""

    def __init__(self, whole: PackedLinear, sizes: Sequence[int]) -> None:
        self.whole = whole
        self.sizes = tuple(sizes)
        self._x: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Output of linear `index` for x, a view of the common output."""
        if self._x is not x:
            self._x, self._parts = x, self.whole(x).split(self.sizes, dim=-1)
        found = self._parts[index]
        if index == len(self.sizes) - 1:
            self._x, self._parts = None, ()
        return found


def can_pack(module: nn.Module) -> bool:
    """Whether it is an NF4 layer whose rows hold whole blocks."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return (
        state is not None
        and state.quant_type == "nf4"
        and state.blocksize == BLOCK
        and state.shape[1] % BLOCK == 0
    )


def pack_linears(model: nn.Module) -> dict[str, nn.Module]:
    """What replaces each packable linear of the model, by its module path. They lose their weights."""
    known = {name: module for name, module in model.named_modules() if can_pack(module)}
    replaced: dict[str, nn.Module] = {}
    for name in known:
        if name not in replaced:
            names = _group_of(name, known)
            replaced.update(zip(names, _pack([known[n] for n in names]), strict=True))
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


def _pack(modules: Sequence[Any]) -> list[nn.Module]:
    read = [read_bitsandbytes(module.weight.data, module.weight.quant_state) for module in modules]
    codes = Nf4Codes(torch.cat([r.codes for r in read]), torch.cat([r.absmax for r in read]))
    biases = [module.bias for module in modules]
    bias = None
    if any(b is not None for b in biases):
        zeros = [
            torch.zeros(m.out_features, dtype=torch.bfloat16, device=codes.codes.device) for m in modules
        ]
        bias = torch.cat([z if b is None else b.data.to(z) for b, z in zip(biases, zeros, strict=True)])
    whole = PackedLinear(pack_nf4(codes), bias)
    return fuse(whole, [module.out_features for module in modules])


def fuse(whole: PackedLinear, sizes: Sequence[int]) -> list[nn.Module]:
    """The modules that stand for linears of the given output sizes, side by side in `whole`."""
    if len(sizes) == 1:
        return [whole]
    group = FusedGroup(whole, sizes)
    return [FusedPart(group, index) for index in range(len(sizes))]
