"""Decoder layers of packed NF4 models in about a dozen launches, adapters included.

An NF4 product of few rows comes in planes, one for each split of its sum. The kernel that adds the planes up also
scales and turns them as adapters ask, adds the adapters' updates, and goes on with what follows in the layer: RoPE
and the KV cache, the activation, or the residual. Where an adapter of the step changes the base's input, one launch
before the product does so for all linears of it. The weights stay where transformers' layer has them, and
`FusedLayer.plain` is that layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer.engine.layers import AdaptedLinear, StepContext
from veneer.engine.packed import FusedPart, PackedLinear
from veneer.kernels.attention import paged_attention
from veneer.kernels.epilogue import add_update, gated, rope
from veneer.kernels.low_rank import Workspace, shrink
from veneer.kernels.shared import scale_ranks
from veneer.kernels.tables import AdapterTables, RowTiles
from veneer.kernels.transform import transform_input


def _config_window(attention: Any) -> int | None:
    window: int | None = getattr(attention.config, "sliding_window", None)
    return window


_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": _config_window,
    "Phi3DecoderLayer": _config_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}
"""The layers whose forward pass is known, each with where its attention has the sliding window."""

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # config's name: kernel's


class NotFusable(Exception):
    """A layer has something that the fused one would leave out; the message says what."""


@dataclass(frozen=True)
class Product:
    """The linears of one input: their common product, and the adapter sites of each in column order."""

    linear: PackedLinear
    bias: torch.Tensor | None
    site: int  # the first; the others follow it
    widths: tuple[int, ...]  # features of each

    @property
    def sites(self) -> int:
        return len(self.widths)


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm weights [head_dim] of each query and key head; None and 0 where the model has none."""

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    eps: float = 0.0


class FusedLayer(nn.Module):
    """A decoder layer of Llama's form. Steps that `StepContext.runs_fused` rules out run `plain`."""

    def __init__(self, plain: Any, context: StepContext) -> None:
        """Raises NotFusable."""
        super().__init__()
        attention, mlp = plain.self_attn, plain.mlp
        self.plain = plain
        self.step = context
        self.attention_type = getattr(plain, "attention_type", None)  # some models choose a mask by it
        self.index = int(attention.layer_idx)
        self.head_dim = int(attention.head_dim)
        self.scaling = float(attention.scaling)
        self.window = _WINDOWS[type(plain).__name__](attention)
        self.qkv = _product(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"))
        self.o = _product(attention, ("o_proj",))
        self.gate_up = _product(mlp, ("gate_up_proj",), ("gate_proj", "up_proj"))
        self.down = _product(mlp, ("down_proj",))
        self.heads = self.o.linear.in_features // self.head_dim
        self.kv_heads = (self.qkv.linear.out_features // self.head_dim - self.heads) // 2
        self.norms = _head_norms(attention)
        self.activation = _activation(plain)

    def forward(self, hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """[1, rows, hidden] -> the same, with the arguments of transformers' layer."""
        if not self.step.runs_fused:
            found: torch.Tensor = self.plain(hidden_states, **inputs)
            return found
        cos, sin = inputs["position_embeddings"]
        x = hidden_states.view(-1, hidden_states.shape[-1])
        x = self._attend(x, cos[0], sin[0])
        return self._feed_forward(x).view(hidden_states.shape)

    def _attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x + attention(norm(x)), x [rows, hidden]."""
        batch = self.step.batch
        assert batch is not None  # the runner sets it with the rows
        tables, rows, workspace = self._adapters()
        k_cache, v_cache = self.step.kv_cache[self.index]
        q = rope(
            self._parts(self.qkv, self.plain.input_layernorm(x)),
            tables,
            rows,
            self.qkv.site,
            self.qkv.sites,
            workspace,
            self.heads,
            self.kv_heads,
            cos,
            sin,
            k_cache,
            v_cache,
            batch.slot_mapping,
            bias=self.qkv.bias,
            q_norm=self.norms.query,
            k_norm=self.norms.key,
            eps=self.norms.eps,
            scaled=rows.scaled(self.qkv.site, self.qkv.sites),
        )
        heads = paged_attention(q, k_cache, v_cache, batch, self.scaling, self.window)
        return self._add(self.o, heads.flatten(1), x)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """x + mlp(norm(x)), x [rows, hidden]."""
        tables, rows, workspace = self._adapters()
        inner = gated(
            self._parts(self.gate_up, self.plain.post_attention_layernorm(x)),
            tables,
            rows,
            self.gate_up.site,
            self.gate_up.sites,
            workspace,
            self.activation,
            bias=self.gate_up.bias,
            scaled=rows.scaled(self.gate_up.site, self.gate_up.sites),
        )
        return self._add(self.down, inner, x)

    def _add(self, product: Product, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        tables, rows, workspace = self._adapters()
        parts = self._parts(product, x)
        return add_update(
            parts,
            tables,
            rows,
            product.site,
            workspace,
            bias=product.bias,
            residual=residual,
            scaled=rows.scaled(product.site),
        )

    def _parts(self, product: Product, x: torch.Tensor) -> torch.Tensor:
        """x' W^T in planes, and the adapters' A x in the workspace.

        A x comes second because it may then start while the product ends: x is complete before both.
        """
        tables, rows, workspace = self._adapters()
        if rows.turned(product.site, product.sites):
            turned = transform_input(x, tables, rows, product.site, product.sites)
            parts = product.linear.grouped_parts(turned, product.widths)
        else:
            parts = product.linear.parts(x)
        if rows.adapted:
            shrink(x, tables, rows, product.site, product.sites, workspace, beside=True)
        if rows.row_slots is not None:
            scale_ranks(tables, rows, product.site, product.sites, len(x), workspace)
        return parts

    def _adapters(self) -> tuple[AdapterTables, RowTiles, Workspace]:
        step = self.step
        assert step.tables is not None  # the runner sets all three
        assert step.rows is not None
        assert step.workspace is not None
        return step.tables, step.rows, step.workspace


def fuse_layers(model: Any, context: StepContext, notes: list[str] | None = None) -> int:
    """Replace each decoder layer that can be fused; returns how many. `notes` gets the reasons of the others."""
    layers = model.model.layers
    refused: Counter[str] = Counter()
    for index, layer in enumerate(layers):
        try:
            _check_modules(layer)
            _check_rotary(model, layer.self_attn)
            layers[index] = FusedLayer(layer, context)
        except NotFusable as reason:
            refused[str(reason)] += 1
    if notes is not None:
        notes += (f"{count} of {len(layers)} layers are not fused: {why}" for why, count in refused.items())
    return len(layers) - refused.total()


def _check_modules(layer: Any) -> None:
    """The layer is of a known type, and nothing but the modules that the fused form reads has weights."""
    if type(layer).__name__ not in _WINDOWS:
        raise NotFusable(f"{type(layer).__name__} is not one of {', '.join(_WINDOWS)}")
    read = {
        "": ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
        "self_attn": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"),
        "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    }
    for path, known in read.items():
        for name, module in layer.get_submodule(path).named_children():
            if name not in known and [*module.parameters(), *module.buffers()]:
                where = f"{path}.{name}".lstrip(".")
                raise NotFusable(
                    f"{type(layer).__name__} has weights in {where}, which the fused form ignores"
                )


def _check_rotary(model: Any, attention: Any) -> None:
    width = 2 * model.model.rotary_emb.inv_freq.numel()
    if width != attention.head_dim:
        raise NotFusable(f"RoPE turns {width} of {attention.head_dim} columns of a head, not all")


def _product(parent: nn.Module, *choices: tuple[str, ...]) -> Product:
    """The packed product of the first of `choices` whose linears the module has."""
    names = next(names for names in choices if hasattr(parent, names[0]))
    adapted = [getattr(parent, name) for name in names]
    if not all(isinstance(module, AdaptedLinear) for module in adapted):
        raise NotFusable(f"{', '.join(names)} have no adapter sites")
    linear = _common([module.base for module in adapted])
    if linear is None:
        raise NotFusable(f"{', '.join(names)} are not packed together in NF4")
    first = adapted[0].site
    if [module.site for module in adapted] != list(range(first, first + len(names))):
        raise NotFusable(f"the sites of {', '.join(names)} are not neighbours")
    bias: Any = linear.bias
    return Product(linear, bias, first, tuple(int(module.base.out_features) for module in adapted))


def _common(bases: Sequence[nn.Module]) -> PackedLinear | None:
    """The packed linear that computes these side by side and nothing else."""
    first = bases[0]
    found: nn.Module | None = first if len(bases) == 1 else None
    if isinstance(first, FusedPart):
        found = first.group.whole if first.group.is_made_of(bases) else None
    return found if isinstance(found, PackedLinear) else None


def _head_norms(attention: Any) -> HeadNorms:
    if not hasattr(attention, "q_norm"):
        return HeadNorms()
    (query, eps), (key, key_eps) = (_norm(module) for module in (attention.q_norm, attention.k_norm))
    if eps != key_eps or query.shape != key.shape or query.shape != (attention.head_dim,):
        raise NotFusable("q_norm and k_norm differ, or are not of one head")
    return HeadNorms(query, key, eps)


def _norm(norm: Any) -> tuple[torch.Tensor, float]:
    """Weight and eps of torch's RMSNorm or transformers'."""
    return norm.weight, float(getattr(norm, "eps", None) or norm.variance_epsilon)


def _activation(layer: Any) -> str:
    name = layer.self_attn.config.hidden_act
    if name not in _ACTIVATIONS:
        raise NotFusable(f"its activation is {name!r}; the kernels have {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
