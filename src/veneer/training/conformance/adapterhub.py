"""What AdapterHub's library computes, restated in torch: the reference of the cases in cases_adapterhub.py.

The library needs an older transformers than the one that serves here, so `veneer conformance` cannot run it. These
modules follow its source, hang on transformers' Llama by hooks, under the library's names, and are compared in
tests/training with numbers that the library itself computed (tests/adapters/make_adapterhub.py). This file has the
files, LoRA and prefix tuning; others are in bottlenecks.py and reft.py, the configs in adapterhub_configs.py.
https://github.com/adapter-hub/adapters/tree/v1.3.0/src/adapters/methods
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.activations import ACT2FN

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.training.conformance.adapterhub_configs import Config

NAME = "task"  # of an adapter that is alone


def activation(name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    if name is None:
        return nn.Identity()
    if name.lower() == "leakyrelu":
        return functional.leaky_relu
    found: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name.lower()]
    return found


class Activation(nn.Module):
    def __init__(self, name: str | None) -> None:
        super().__init__()
        self.f = activation(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x)


def parameter(*shape: int) -> nn.Parameter:
    """Small random numbers."""
    return nn.Parameter(0.05 * torch.randn(*shape))


# ---- files -----------------------------------------------------------------------------------------


def is_adapters(key: str) -> bool:
    """Whether a key of a model's state is an adapter's, and not the base's."""
    parts = (
        "adapters.",
        "adapter_fusion_layer.",
        "loras.",
        "prefix_tunings.",
        "refts.",
        "shared_parameters.",
    )
    return any(f"{mark}{part}" in key for part in parts for mark in (".", "_"))


def save(model: Any, folder: Path, config: Config) -> None:
    """The adapter of a model, under the names of this project's files."""
    tensors = {key: value.contiguous() for key, value in model.state_dict().items() if is_adapters(key)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def full_config(model: Any, config: Config, name: str = NAME) -> dict[str, Any]:
    """What the library writes around a method's config."""
    return {
        "config": dict(config),
        "hidden_size": model.config.hidden_size,
        "model_class": "LlamaForCausalLM",
        "model_name": "",
        "model_type": model.config.model_type,
        "name": name,
        "version": "adapters.1.3.0",
    }


def load_tensors(model: Any, weights: Path) -> Any:
    """Fill the adapters that hang on a model. Every tensor must have its place, and every place a tensor."""
    tensors = load_file(weights)
    wanted = {key for key in model.state_dict() if is_adapters(key)}
    if wanted != tensors.keys():
        raise ValueError(f"the files and the model differ in {sorted(wanted ^ tensors.keys())}")
    model.load_state_dict(tensors, strict=False)
    return model


# ---- lora.py ---------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """LoRA, DoRA, VeRA or IA3 at one linear layer."""

    def __init__(self, linear: Any, config: Config, shared: nn.Module | None) -> None:
        super().__init__()
        out, size = linear.weight.shape
        self.config, self._linear, self._shared = config, [linear], [shared]
        rank = config["r"]
        if shared is not None:
            self.vera_D = nn.Parameter(torch.diag(torch.full((rank,), config["vera_d"])))
            self.vera_B = nn.Parameter(torch.diag(torch.full((out,), config["vera_b"])))
        else:
            self.lora_B = parameter(out, rank)
            if config["composition_mode"] == "scale":
                self.lora_B.data.add_(1)
            else:
                self.lora_A = parameter(rank, size)
        if config["use_dora"]:
            self.m = nn.Linear(1, out, bias=False)
            self.m.weight.data.copy_(linear.weight.norm(dim=1, keepdim=True))

    def delta(self) -> torch.Tensor:
        shared: Any = self._shared[0]
        if shared is None:
            own: torch.Tensor = self.lora_B @ self.lora_A
            return own
        found: torch.Tensor = self.vera_B @ shared.lora_B @ self.vera_D @ shared.lora_A
        return found

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        alpha = self.config["alpha"]
        if self.config["composition_mode"] == "scale":
            found: torch.Tensor = output * (self.lora_B.flatten() * alpha)
            return found
        delta = self.delta()
        output = output + x @ delta.T * (alpha / self.config["r"])
        if not self.config["use_dora"]:
            return output
        norm = torch.linalg.norm(self._linear[0].weight + delta, dim=1)
        scaled: torch.Tensor = self.m.weight.view(-1) / norm * output
        return scaled


class SharedLoRA(nn.Module):
    """VeRA's projections."""

    def __init__(self, linear: Any, config: Config) -> None:
        super().__init__()
        self.lora_A = parameter(config["r"], linear.in_features)
        self.lora_B = parameter(linear.out_features, config["r"])


def add_lora(model: Any, config: Config) -> Any:
    """Hang LoRA on the linear layers of a Llama."""
    model.requires_grad_(False)
    modules = [f"self_attn.{each}_proj" for each in config["attn_matrices"] if config["selfattn_lora"]]
    modules += ["mlp.down_proj"] * config["intermediate_lora"] + ["mlp.up_proj"] * config["output_lora"]
    shared: nn.Module | None = None
    for index, layer in enumerate(model.model.layers):
        for linear in (layer.get_submodule(name) for name in modules if index not in config["leave_out"]):
            if config["vera_d"] is not None and shared is None:
                shared = SharedLoRA(linear, config)
                model.model.shared_parameters = nn.ModuleDict({NAME: shared})
            lora = LoRA(linear, config, shared)
            linear.loras = nn.ModuleDict({NAME: lora})
            linear.register_forward_hook(lambda module, x, y: module.loras[NAME](x[0], y))
    return model


# ---- prefix_tuning.py ------------------------------------------------------------------------------


class Prefix(nn.Module):
    """Keys and values of virtual tokens, from an MLP over their embeddings."""

    def __init__(self, model: Any, config: Config) -> None:
        super().__init__()
        base = model.config
        self.shape = (config["prefix_length"], base.num_hidden_layers * 2, base.num_key_value_heads, -1)
        width = base.num_hidden_layers * 2 * base.num_key_value_heads * base.head_dim
        if config["flat"]:
            self.control_trans: Any = nn.Parameter(torch.randn(config["prefix_length"] * width))
            return
        self.wte = nn.Embedding(config["prefix_length"], base.hidden_size)
        self.control_trans = nn.Sequential(
            nn.Linear(base.hidden_size, config["bottleneck_size"]),
            Activation(config["non_linearity"]),
            nn.Linear(config["bottleneck_size"], width),
        )

    def forward(self) -> torch.Tensor:
        """[layers, 2, 1, kv_heads, tokens, head_dim]"""
        flat = isinstance(self.control_trans, nn.Parameter)
        values = self.control_trans if flat else self.control_trans(self.wte.weight)
        found: torch.Tensor = values.view(self.shape).permute(1, 2, 0, 3).contiguous()
        return found.view(-1, 2, 1, *found.shape[1:])


def add_prefix(model: Any, config: Config) -> Any:
    model.requires_grad_(False)
    model.model.prefix_tuning = nn.Module()
    group = nn.ModuleDict({"self_prefix": Prefix(model, config)})
    model.model.prefix_tuning.prefix_tunings = nn.ModuleDict({NAME: group})
    return model


def run_prefix(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The prefix stands in every layer's cache, and the text begins at position 0 all the same."""
    prefix = model.model.prefix_tuning.prefix_tunings[NAME]["self_prefix"]()
    cache = DynamicCache()
    for index, (keys, values) in enumerate(prefix):
        cache.update(keys, values, index)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    logits: torch.Tensor = model(input_ids=tokens, position_ids=positions, past_key_values=cache).logits
    return logits
