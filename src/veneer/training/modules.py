"""Trainable modules that PEFT does not have: bottlenecks, interventions on hidden states, and whole layers.

Bottlenecks (https://arxiv.org/abs/1902.00751) and interventions (LoReFT, https://arxiv.org/abs/2404.03592) hang on
the view's decoder layers by hooks and are saved in the format of adapters/methods/bottleneck.py, whole layers in
that of adapters/methods/partial.py. Options are checked here: `places`, `source`, `activation`; `first`, `last`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.activations import ACT2FN

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.engine.hidden import LAYERS
from veneer.engine.view import FrozenLinear
from veneer.training.recipe import Adapter
from veneer.training.trainable import Trainable

PLACES = ("attention", "mlp", "block")
SOURCES = ("output", "sum", "residual")
ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "tanh": "tanh",
}


class Bottleneck(nn.Module):
    """U phi(D z + d) + u, zero at the start. z [..., hidden]."""

    def __init__(self, size: int, rank: int, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, rank), nn.Linear(rank, size)
        self.activation: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[ACTIVATIONS[activation]]
        nn.init.normal_(self.down.weight, std=0.02)
        for zeroed in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zeroed)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.up(self.activation(self.down(z.to(self.down.weight.dtype))))
        return found.to(z.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.state_dict())


class Intervention(nn.Module):
    """Rᵀ(W h + b - R h) with orthonormal rows of R [rank, hidden], zero at the start."""

    rotation: Any

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.rotation = nn.utils.parametrizations.orthogonal(nn.Linear(size, rank, bias=False))
        self.source = nn.Linear(size, rank)
        self.source.weight.data.copy_(self.rotation.weight.data)
        nn.init.zeros_(self.source.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = h.to(self.source.weight.dtype)
        found: torch.Tensor = (self.source(x) - self.rotation(x)) @ self.rotation.weight
        return found.to(h.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        rotation = self.rotation.weight.detach()
        return {
            "down.weight": self.source.weight.detach() - rotation,
            "down.bias": self.source.bias.detach(),
            "up.weight": rotation.T,
            "up.bias": torch.zeros(rotation.shape[1]),
        }


class HiddenTrainable(Trainable):
    """Modules at hidden states."""

    packs = False  # an intervention's places are those of one prompt

    def __init__(self, view: Any, layers: Sequence[int] | None, config: dict[str, Any]) -> None:
        if any(type(layer).__name__ not in LAYERS for layer in view.model.layers):
            raise ValueError(
                f"{view.config.model_type} has no hidden states that are served; kinds of LoRA are"
            )
        self.model = view
        self.on = True
        count = len(view.model.layers)
        self.layers = list(range(count)) if layers is None else sorted(set(layers))
        if not self.layers or self.layers[-1] >= count:
            raise ValueError(f"layers {layers!r}: the base has the layers 0 to {count - 1}")
        self._config = config
        self._prompts: Sequence[int] = ()  # lengths
        self._parts: dict[str, Bottleneck | Intervention] = {}  # by the name in the file

    def add(self, layer: int, place: str, module: Bottleneck | Intervention) -> None:
        """Hang a module behind a place of a layer."""
        owner = self.model.model.layers[layer]
        name = f"layers.{layer}.{place}"
        self._parts[name] = module
        owner.add_module(f"veneer_{place}", module)
        target = {"attention": "self_attn", "mlp": "mlp"}.get(place)
        needs_residual = self._config["source"] != "output"
        residual: list[torch.Tensor] = []  # from the norm's call to the change
        if needs_residual:
            norm = owner.input_layernorm if place == "attention" else owner.post_attention_layernorm
            norm.register_forward_pre_hook(lambda _, inputs: residual.__setitem__(slice(None), inputs[:1]))

        def change(_: Any, __: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            # taken out, since it would keep the forward's graph, and a hook in that graph the whole view
            y = h + self._delta(module, h, residual.pop() if needs_residual else None)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        (owner if target is None else getattr(owner, target)).register_forward_hook(change)

    def _delta(self, module: nn.Module, h: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if not self.on:
            return torch.zeros_like(h)
        z = h if residual is None else residual if self._config["source"] == "residual" else h + residual
        delta: torch.Tensor = module(z)
        positions = self._config.get("positions")
        return delta if positions is None else delta * self._acts(positions, delta)

    def _acts(self, positions: dict[str, int], like: torch.Tensor) -> torch.Tensor:
        """1 [B, L, 1] at the ends of the prompts, else 0."""
        length = torch.tensor(self._prompts, device=like.device)[:, None]
        place = torch.arange(like.shape[1], device=like.device)
        acts = (place < positions["first"]) | (place >= length - positions["last"])
        return (acts & (place < length))[..., None].to(like.dtype)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def begin(self, prompts: Sequence[int]) -> None:
        self._prompts = prompts

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        tensors = {
            f"{name}.{key}": each.detach().to("cpu", dtype).contiguous()
            for name, part in self._parts.items()
            for key, each in part.tensors().items()
        }
        _write(folder, {**self._config, "peft_type": "BOTTLENECK", "layers": self.layers}, tensors)


class LayersTrainable(Trainable):
    """Full weights of some linear layers."""

    def __init__(
        self, view: Any, layers: Sequence[int], targets: Sequence[str] | str, base_name: str
    ) -> None:
        self.model = view
        self._base_name = base_name
        self._freed: dict[str, FreedLinear] = {}
        starts = tuple(f"model.layers.{layer}." for layer in layers)
        for name, module in list(view.named_modules()):
            wanted = targets == "all-linear" or name.rpartition(".")[2] in targets
            if isinstance(module, FrozenLinear) and name.startswith(starts) and wanted:
                parent, _, attribute = name.rpartition(".")
                self._freed[name] = FreedLinear(module)
                setattr(view.get_submodule(parent), attribute, self._freed[name])
        if not self._freed:
            raise ValueError(f"layers {list(layers)!r}, targets {targets!r} name no linear layer of the base")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for layer in self._freed.values():
            layer.on = False
        try:
            yield
        finally:
            for layer in self._freed.values():
                layer.on = True

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        tensors = {
            f"base_model.model.{name}.weight": layer.weight.detach().to("cpu", dtype).contiguous()
            for name, layer in self._freed.items()
        }
        config = {
            "peft_type": "PARTIAL",
            "modules_to_save": [name.removeprefix("model.") for name in self._freed],
        }
        _write(folder, {**config, "base_model_name_or_path": self._base_name}, tensors)


class FreedLinear(nn.Module):
    """A linear layer of the base with a trainable copy of its weight, which is not quantized."""

    def __init__(self, frozen: FrozenLinear) -> None:
        super().__init__()
        self.frozen = frozen
        self.on = True
        self.weight = nn.Parameter(frozen.resident_weight().detach().float().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.on:
            plain: torch.Tensor = self.frozen(x)
            return plain
        return nn.functional.linear(x, self.weight.to(x.dtype), self.frozen.bias)


def add_bottlenecks(view: Any, adapter: Adapter, base_name: str) -> HiddenTrainable:
    """By default one behind each MLP, on its output."""
    options = _options(adapter, places=["mlp"], source="output", activation="relu")
    if not options["places"] or not set(options["places"]) <= set(PLACES):
        raise ValueError(f"places {options['places']!r} must be some of {', '.join(PLACES)}")
    for name, known in (("source", SOURCES), ("activation", ACTIVATIONS)):
        if options[name] not in known:
            raise ValueError(f"{name} {options[name]!r} must be one of {', '.join(known)}")
    if options["source"] != "output" and "block" in options["places"]:
        raise ValueError("a block's output has no residual beside it; its source is 'output'")
    config = {"rank": adapter.rank, **options, "bias": True, "base_model_name_or_path": base_name}
    trainable = HiddenTrainable(view, adapter.layers, config)
    for layer in trainable.layers:
        for place in options["places"]:
            module = Bottleneck(view.config.hidden_size, adapter.rank, options["activation"])
            trainable.add(layer, place, module.to(view.device))
    return trainable


def add_interventions(view: Any, adapter: Adapter, base_name: str) -> HiddenTrainable:
    """By default at the first three and the last three tokens of the prompt, the same for both."""
    options = _options(adapter, first=3, last=3)
    if any(not isinstance(options[end], int) or options[end] < 0 for end in options) or not sum(
        options.values()
    ):
        raise ValueError(f"first and last are counts of tokens, not both 0; they are {options!r}")
    config = {
        "rank": adapter.rank,
        "places": ["block"],
        "source": "output",
        "bias": True,
        "positions": options,
        "base_model_name_or_path": base_name,
    }
    trainable = HiddenTrainable(view, adapter.layers, config)
    for layer in trainable.layers:
        trainable.add(layer, "block", Intervention(view.config.hidden_size, adapter.rank).to(view.device))
    return trainable


def free_layers(view: Any, adapter: Adapter, base_name: str) -> LayersTrainable:
    """By default the last decoder layer."""
    last = int(view.config.num_hidden_layers) - 1
    layers = [last] if adapter.layers is None else sorted(set(adapter.layers))
    if not layers or layers[-1] > last:
        raise ValueError(f"layers {adapter.layers!r}: the base has the layers 0 to {last}")
    return LayersTrainable(view, layers, adapter.targets, base_name)


def _options(adapter: Adapter, **defaults: Any) -> dict[str, Any]:
    unknown = sorted(adapter.options.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no option of kind {adapter.kind!r}; it has {', '.join(defaults)}"
        )
    return {**defaults, **adapter.options}


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
