"""AdapterHub's bottleneck adapters and AdapterFusion, restated in torch: see adapterhub.py.

https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters/methods/modeling.py
https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters/methods/bottleneck.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from veneer.training.conformance.adapterhub import Activation, parameter
from veneer.training.conformance.adapterhub_configs import Config


class PHMLayer(nn.Module):
    """y = x Σ_i (rule_i ⊗ W_i) + b."""

    def __init__(self, size: int, out: int, position: str, config: Config, shared: nn.Module | None) -> None:
        super().__init__()
        self.position, self.config, self._shared = position, config, [shared]
        axes, rank = config["phm_dim"], config["phm_rank"]
        if not config["shared_phm_rule"]:
            add_rule(self, config)
        if not config["shared_W_phm"]:
            if config["factorized_phm_W"]:
                self.W_left = parameter(axes, size // axes, rank)
                self.W_right = parameter(axes, rank, out // axes)
            else:
                self.W = parameter(axes, size // axes, out // axes)
        self.b = parameter(out) if config["phm_bias"] else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        owner, at = (self._shared[0], f"W_{self.position}") if config["shared_W_phm"] else (self, "W")
        if config["factorized_phm_W"]:
            weights = torch.bmm(getattr(owner, f"{at}_left"), getattr(owner, f"{at}_right"))
        else:
            weights = getattr(owner, at)
        owner = self._shared[0] if config["shared_phm_rule"] else self
        if config["factorized_phm_rule"]:
            rule = torch.bmm(owner.phm_rule_left, owner.phm_rule_right)  # type: ignore[union-attr, arg-type]
        else:
            rule = owner.phm_rule  # type: ignore[union-attr, assignment]
        whole = torch.stack([torch.kron(r, w) for r, w in zip(rule, weights, strict=True)]).sum(0)
        y = x @ whole
        return y if self.b is None else y + self.b


def add_rule(module: nn.Module, config: Config) -> None:
    axes = config["phm_dim"]
    if config["factorized_phm_rule"]:
        module.phm_rule_left, module.phm_rule_right = parameter(axes, axes, 1), parameter(axes, 1, axes)
    else:
        module.phm_rule = parameter(axes, axes, axes)


class SharedParameters(nn.Module):
    """Of all PHM layers of an adapter."""

    def __init__(self, size: int, config: Config) -> None:
        super().__init__()
        axes, rank = config["phm_dim"], config["phm_rank"]
        if config["shared_W_phm"]:
            down, inner = size // axes, size // config["reduction_factor"] // axes
            for position, one, other in (("down", down, inner), ("up", inner, down)):
                if config["factorized_phm_W"]:
                    setattr(self, f"W_{position}_left", parameter(axes, one, rank))
                    setattr(self, f"W_{position}_right", parameter(axes, rank, other))
                else:
                    setattr(self, f"W_{position}", parameter(axes, one, other))
        if config["shared_phm_rule"]:
            add_rule(self, config)


class Adapter(nn.Module):
    """One bottleneck, sequential or parallel."""

    def __init__(self, size: int, layer: int, config: Config, shared: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        factor = config["reduction_factor"]
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor["default"])
        inner = max(int(size // factor), 1)
        if config["phm_layer"]:
            down: nn.Module = PHMLayer(size, inner, "down", config, shared)
            up: nn.Module = PHMLayer(inner, size, "up", config, shared)
        else:
            down, up = nn.Linear(size, inner), nn.Linear(inner, size)
        self.adapter_down = nn.Sequential(down, Activation(config["non_linearity"]))
        self.adapter_up = up
        self.scaling = config["scaling"]
        if self.scaling in ("learned", "channel"):
            self.scaling = nn.Parameter(torch.ones(1 if self.scaling == "learned" else size))

    def pre_forward(self, h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the bottleneck and what is added to its output."""
        if self.config["is_parallel"]:
            return x, x
        before = h
        if self.config["original_ln_before"]:
            h = h + x
        return h, before if self.config["residual_before_ln"] else h

    def up(self, z: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.adapter_up(self.adapter_down(z)) * self.scaling
        return found

    def post_forward(self, output: torch.Tensor, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.config["is_parallel"]:
            output = output + h
        return output + x if self.config["original_ln_after"] else output


class Fusion(nn.Module):
    """An AdapterFusion layer."""

    query: Any
    key: Any
    value: Any

    def __init__(self, size: int, config: Config) -> None:
        super().__init__()
        self.config = config
        for name in ("query", "key", "value"):
            if config[name]:
                setattr(self, name, nn.Linear(size, size, bias=name != "value"))

    def forward(self, query: torch.Tensor, ups: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """query [1, tokens, size], ups [1, tokens, adapters, size]."""
        keys, values = ups, ups
        if self.config["query"]:
            query = self.query(query)
        if self.config["key"]:
            keys = self.key(ups)
        if self.config["value"]:
            values = self.value(ups)
        scores = torch.matmul(query.unsqueeze(2), keys.transpose(-2, -1)).squeeze(2)
        weights = torch.softmax(scores, -1)
        return torch.matmul(weights.unsqueeze(2), values).squeeze(2) + residual


class Location(nn.Module):
    """What is behind one sublayer: the adapters and, if there are several, the layer that fuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.adapter_fusion_layer = nn.ModuleDict()

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The sublayer's output h, x being its residual, to the hidden state after it."""
        parts: list[Any] = list(self.adapters.values())
        if not parts:
            return h + x
        last = parts[-1]
        z, residual = last.pre_forward(h, x)
        if self.adapter_fusion_layer:
            fusion: Any = next(iter(self.adapter_fusion_layer.values()))
            query = h if fusion.config["query_before_ln"] else z
            output = fusion(query, torch.stack([part.up(z) for part in parts], 2), residual)
        else:
            output = last.up(z) if last.config["is_parallel"] else last.up(z) + residual
        found: torch.Tensor = last.post_forward(output, h, x)
        return found


def add_bottlenecks(model: Any, configs: Mapping[str, Config], fusion: Config | None = None) -> Any:
    """Hang adapters behind the sublayers of a Llama; with `fusion` they are fused."""
    model.requires_grad_(False)
    size = model.config.hidden_size
    shared = nn.ModuleDict(
        {name: SharedParameters(size, each) for name, each in configs.items() if each["phm_layer"]}
    )
    model.model.shared_parameters = shared
    for index, layer in enumerate(model.model.layers):
        for key, attribute, module in (
            ("mh_adapter", "attention_adapters", layer.self_attn),
            ("output_adapter", "output_adapters", layer.mlp),
        ):
            location = Location()
            for name, config in configs.items():
                if config[key] and index not in config["leave_out"]:
                    owner = shared[name] if config["phm_layer"] else None
                    location.adapters[name] = Adapter(size, index, config, owner)
            if fusion is not None and all(config[key] for config in configs.values()):
                location.adapter_fusion_layer[",".join(configs)] = Fusion(size, fusion)
            setattr(layer, attribute, location)
            norm = layer.input_layernorm if key == "mh_adapter" else layer.post_attention_layernorm
            hook_sublayer(norm, module, location)
    return model


def hook_sublayer(norm: Any, module: Any, location: Location) -> None:
    """The residual is what the norm in front gets. The layer adds it afterwards, so it is taken off here."""
    seen: list[torch.Tensor] = []

    def remember(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        seen[:] = arguments[:1]

    def replace(_: Any, __: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        if not location.adapters:
            return output
        after = location(h, seen[0]) - seen[0]
        return (after, *output[1:]) if isinstance(output, tuple) else after

    norm.register_forward_pre_hook(remember)
    module.register_forward_hook(replace)
