"""AdapterHub's ReFT, restated in torch: see adapterhub.py.

https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters/methods/reft.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.training.conformance.adapterhub import NAME, Activation
from veneer.training.conformance.adapterhub_configs import Config


class ReftUnit(nn.Module):
    """h + Rᵀ(φ(W h + b) - R h), or without - R h."""

    def __init__(self, size: int, config: Config) -> None:
        super().__init__()
        self.learned_source = nn.Linear(size, config["r"])
        self.projection = nn.Linear(size, config["r"], bias=False)
        if config["orthogonality"]:
            nn.utils.parametrizations.orthogonal(self.projection)
        self.non_linearity = Activation(config["non_linearity"])
        self.subtract = config.get("subtract_projection", True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        source = self.non_linearity(self.learned_source(h))
        if self.subtract:
            source = source - self.projection(h)
        found: torch.Tensor = h + source @ self.projection.weight
        return found


class Reft(nn.Module):
    """The units of one layer, on the first and the last tokens of the prompt."""

    def __init__(self, size: int, config: Config) -> None:
        super().__init__()
        self.config = config
        self.units = nn.ModuleList(
            [ReftUnit(size, config) for _ in range(1 if config["tied_weights"] else 2)]
        )

    def forward(self, h: torch.Tensor, prompt: int) -> torch.Tensor:
        first, last = (min(self.config[f"{end}_positions"], prompt) for end in ("prefix", "suffix"))
        before, output = h, h.clone()
        output[:, :first] = self.units[0](before[:, :first])
        if last:
            output[:, prompt - last : prompt] = self.units[-1](before[:, prompt - last : prompt])
        return output


def add_reft(model: Any, config: Config) -> Any:
    """Hang interventions on the outputs of a Llama's layers. `model.prompt_length` is set by `run_reft`."""
    model.requires_grad_(False)
    for index, layer in enumerate(model.model.layers):
        if config["layers"] == "all" or index in config["layers"]:
            reft = Reft(model.config.hidden_size, config)
            layer.reft_layer = nn.Module()
            layer.reft_layer.refts = nn.ModuleDict({NAME: reft})
            layer.register_forward_hook(lambda _, __, h, reft=reft: reft(h, model.prompt_length))
    return model


def run_reft(model: Any, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """`prompt`: how many of the tokens are the prompt; nothing acts on those behind it."""
    model.prompt_length = prompt
    logits: torch.Tensor = model(input_ids=tokens).logits
    return logits
