"""Optimizer and schedule of a training: AdamW, plain or bitsandbytes' with 8-bit (and paged) moments."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from veneer.errors import InvalidRequest
from veneer.training.recipe import Training


def make_optimizer(training: Training, weights: Mapping[str, nn.Parameter], plus_ratio: float | None) -> Any:
    """`plus_ratio`: LoRA's B learns so many times as fast as the rest (LoRA+, https://arxiv.org/abs/2402.12354).

    Raises:
        InvalidRequest: the optimizer does not run on this device.
    """
    fast = [each for name, each in weights.items() if plus_ratio is not None and _is_b(name)]
    others = [each for name, each in weights.items() if plus_ratio is None or not _is_b(name)]
    groups: list[dict[str, Any]] = [{"params": others, "lr": training.learning_rate}]
    if fast:
        assert plus_ratio is not None
        groups.append({"params": fast, "lr": training.learning_rate * plus_ratio})
    make = _optimizer(training.optimizer, next(iter(weights.values())).device)
    return make(groups, lr=training.learning_rate, weight_decay=training.weight_decay)


def _is_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


def _optimizer(name: str, device: torch.device) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    if device.type != "cuda":
        raise InvalidRequest(
            f"optimizer={name!r} keeps its moments in 8 bits by CUDA kernels, and this base is on {device}; "
            "use adamw",
            param="optimizer",
        )
    import bitsandbytes

    return {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[name]


def make_schedule(training: Training, optimizer: Any, total: int, done: int = 0) -> Any:
    """Learning rates over `total` steps, `done` of which are behind."""
    from transformers import get_scheduler

    for group in optimizer.param_groups:  # a restored optimizer has its last rates
        group["lr"] = group.pop("initial_lr", group["lr"])
    kind = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    schedule = get_scheduler(kind, optimizer, training.warmup_steps, total)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer stepped before
        for _ in range(done):
            schedule.step()
    return schedule
