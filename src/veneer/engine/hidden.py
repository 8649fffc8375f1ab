"""Hidden states of the base at which adapters can act, beside its linear layers: `program.Site` lists them.

They are reached by forward hooks on transformers' own decoder layers, which are there only while a step runs that
has an adapter with such a part. So other steps pay nothing, and no forward pass is restated here. The heads of
attention are reached in layers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from veneer.adapters.program import Site
from veneer.engine.layers import StepContext, add_hidden

LAYERS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Phi3DecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)
"""Those with x = x + attention(norm(x)); x = x + mlp(norm(x)). Gemma also norms what the two give."""
SUBLAYERS = {
    "self_attn": "input_layernorm",
    "mlp": "post_attention_layernorm",
}  # each with the norm of its input
INPUTS = ("output", "sum", "residual")


@dataclass(frozen=True)
class _Sublayer:
    """Attention or the MLP of a decoder layer, and the sites at what it gives."""

    module: nn.Module
    norm: nn.Module  # its input is the residual
    sites: Mapping[str, int]  # by `INPUTS`


class HiddenStates:
    """The hidden states of a model.

    Attributes:
        sites: by name, in the order of the tables, where they follow the linear layers; empty when a layer has
            another form than Llama's.
    """

    def __init__(self, model: Any, context: StepContext, linears: Mapping[str, Site]) -> None:
        """`linears` are the model's linear sites. Give it the model before its layers are fused."""
        self.sites: dict[str, Site] = {}
        self._step = context
        self._linears = linears
        self._sublayers: list[_Sublayer] = []
        self._layers: list[tuple[nn.Module, int]] = []
        layers = list(model.model.layers)
        if all(type(layer).__name__ in LAYERS for layer in layers):
            context.heads_sites = [
                self._add_layer(layer, f"model.layers.{index}") for index, layer in enumerate(layers)
            ]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While it is open, the model's forward has the step's adapters at its hidden states."""
        rows = self._step.rows
        if rows is None or not rows.hidden:
            yield
            return
        handles: list[RemovableHandle] = []
        try:
            for sublayer in self._sublayers:
                handles += self._hook(sublayer)
            handles += (self._hook_output(layer, site) for layer, site in self._layers)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_layer(self, layer: Any, name: str) -> int:
        """The site of its heads."""
        hidden = int(layer.hidden_size)
        heads = self._add(f"{name}.self_attn.heads", self._linears[f"{name}.self_attn.o_proj"].in_features)
        for part, norm in SUBLAYERS.items():
            sites = {kind: self._add(f"{name}.{part}.{kind}", hidden) for kind in INPUTS}
            self._sublayers.append(_Sublayer(getattr(layer, part), getattr(layer, norm), sites))
        self._layers.append((layer, self._add(f"{name}.output", hidden)))
        return heads

    def _add(self, name: str, width: int) -> int:
        self.sites[name] = Site(name, width, width, is_hidden=True)
        return len(self._linears) + len(self.sites) - 1

    def _hook(self, sublayer: _Sublayer) -> list[RemovableHandle]:
        residual: list[torch.Tensor] = []

        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            residual[:] = inputs[:1]

        def add(module: nn.Module, inputs: object, given: Any) -> Any:
            if isinstance(given, tuple):  # attention gives its weights, too
                return self._added(given[0], residual[0], sublayer.sites), *given[1:]
            return self._added(given, residual[0], sublayer.sites)

        return [
            sublayer.norm.register_forward_pre_hook(keep),
            sublayer.module.register_forward_hook(add),
        ]

    def _hook_output(self, layer: nn.Module, site: int) -> RemovableHandle:
        def add(module: nn.Module, inputs: object, given: torch.Tensor) -> torch.Tensor:
            return self._added(given, None, {"output": site})

        return layer.register_forward_hook(add)

    def _added(
        self, given: torch.Tensor, residual: torch.Tensor | None, sites: Mapping[str, int]
    ) -> torch.Tensor:
        """What a layer gives [1, rows, hidden] and the adapters' parts, each of it as it came."""
        tables, rows = self._step.tables, self._step.rows
        assert tables is not None  # the runner sets them
        assert rows is not None
        used = {kind: site for kind, site in sites.items() if tables.hidden_at(rows.segments, site)}
        if not used:
            return given
        x, y = given.reshape(-1, given.shape[-1]).contiguous(), given.clone()
        beside = None if residual is None else residual.reshape(x.shape).contiguous()
        for kind, site in used.items():
            if kind == "output":
                source = x
            else:
                assert beside is not None
                source = beside if kind == "residual" else x + beside
            add_hidden(source, y.view(x.shape), self._step, site)
        return y
