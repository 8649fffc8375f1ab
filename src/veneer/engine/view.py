"""The resident base as transformers' own model with a gradient, for training. It shares every weight with serving.

`trainable_view` makes the modules anew, on the meta device, and puts the resident tensors into them: norms and
embeddings as they are, linear layers as `FrozenLinear`. So nothing of what serving does to its modules (adapters,
paged attention, fused layers, CUDA graphs) is in the way, PEFT may change modules as it likes, and no weight is
there twice. Both may run at the same time, in threads of their own: a view only reads what they share.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from veneer.engine.base import Base
from veneer.engine.layers import AdaptedLinear
from veneer.engine.packed import FusedPart, PackedLinear, dequantized
from veneer.kernels.backend import resolve
from veneer.kernels.nf4 import dequantize_nf4


class Resident(NamedTuple):
    """A base to train on."""

    base: Base
    folder: Path  # its checkpoint and tokenizer
    name: str  # as an adapter's config will call it


class FrozenLinear(nn.Linear):
    """y = W x + b with the resident W: differentiable in x, by a W that is dequantized when it is needed.

    int8 bases multiply with the dequantized weight here, without the rounding of activations that serving has.

    Attributes:
        offset: low-rank factors (A0 [r, in], B0 [out, r]) with which W stands for W - B0 A0, or None.
            Initialisations that take a part of W into the adapter leave it here (peft_model.py in training).
    """

    def __init__(self, resident: nn.Module, dtype: torch.dtype, bias: torch.Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = int(resident.in_features), int(resident.out_features)  # type: ignore[arg-type]
        self.offset: tuple[torch.Tensor, torch.Tensor] | None = None
        self._resident = [resident]  # in a list: serving owns the module
        self._dtype = dtype
        self._bias = bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """W [out, in] of the base's type; a copy unless the base is not quantized."""
        weight = self.resident_weight()
        if self.offset is not None:
            a, b = self.offset
            weight = weight - (b @ a).to(weight.dtype)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return self._bias

    def resident_weight(self) -> torch.Tensor:
        """What serving multiplies with, whatever the offset."""
        module = self._resident[0]
        if isinstance(module, FusedPart):
            module = module.own or module
        if isinstance(module, PackedLinear) and resolve(module.packed.device).name == "triton":
            shape = (self.out_features, self.in_features)
            out = torch.empty(shape, dtype=self._dtype, device=module.packed.device)  # type: ignore[arg-type]
            dequantize_nf4(module._weight, out)
            return out
        weight = getattr(module, "weight", None)
        if weight is not None and weight.is_floating_point():  # not quantized
            found: torch.Tensor = weight.detach().to(self._dtype)
            return found
        return dequantized(module).to(self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Product.apply(x.to(self._dtype), self)  # type: ignore[no-untyped-call]
        if self.offset is not None:
            a, b = self.offset
            y = y - ((x.to(a.dtype) @ a.T) @ b.T).to(y.dtype)
        return y if self._bias is None else y + self._bias


class _Product(torch.autograd.Function):
    """x W^T. W is no part of the graph: backward dequantizes it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FrozenLinear) -> torch.Tensor:
        ctx.linear = linear
        return x @ linear.resident_weight().T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        weight = ctx.linear.resident_weight()
        return gradients[0].to(weight.dtype) @ weight, None


def trainable_view(base: Base) -> Any:
    """A transformers model in train mode, without trainable weights, that computes with the resident ones."""
    config = copy.deepcopy(base.config)
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=base.dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    resident = _tensors(base.model)
    for name, module in base.model.named_modules():
        if isinstance(module, AdaptedLinear):
            _put_linear(model, _plain(name), module.base, base.dtype)
    for name, _ in list(model.named_parameters()):
        _put(model, name, nn.Parameter(resident[name], requires_grad=False))
    for name, _ in list(model.named_buffers()):
        _put(model, name, resident[name])
    model.requires_grad_(False)
    model.train()
    return model


def _put_linear(model: Any, name: str, resident: nn.Module, dtype: torch.dtype) -> None:
    found = resident.group.whole if isinstance(resident, FusedPart) else resident
    bias: Any = getattr(found, "bias", None)
    if bias is not None and isinstance(resident, FusedPart):
        bias = torch.split(bias, list(resident.group.sizes))[resident.index]
    parent, _, attribute = name.rpartition(".")
    linear = FrozenLinear(resident, dtype, None if bias is None else bias.detach().to(dtype))
    setattr(model.get_submodule(parent), attribute, linear)


def _put(model: Any, name: str, tensor: torch.Tensor) -> None:
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    persistent = attribute not in module._non_persistent_buffers_set
    if isinstance(tensor, nn.Parameter):
        setattr(module, attribute, tensor)
    else:
        module.register_buffer(attribute, tensor, persistent=persistent)


def _tensors(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers of the resident model, by the names that transformers gives them."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {_plain(name): tensor.detach() for name, tensor in named}


def _plain(name: str) -> str:
    """The name without what wraps a module in serving."""
    return re.sub(r"\.(plain|base)(?=\.|$)", "", name)
