"""A model with trainable weights, whatever makes them: what the trainer knows of an adapter under training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Trainable(ABC):
    """`model` is called as transformers' model; its trainable parameters are those that require a gradient."""

    model: Any
    packs: bool = True  # whether several rows may be packed into one sequence

    @abstractmethod
    def disabled(self) -> AbstractContextManager[Any]:
        """Within it the model is the base."""

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the adapter's two files, its numbers rounded to `dtype`."""

    def begin(self, prompts: Sequence[int]) -> None:  # noqa: B027 - most kinds have no use for it
        """The next forward is of rows whose prompts have so many tokens, from the first token on."""

    def stepped(self, step: int) -> None:  # noqa: B027
        """Step number `step` (from 1) has moved the weights; their gradients are still there."""

    def penalty(self) -> torch.Tensor | None:
        """What a kind adds to the loss of each step."""
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed training needs besides the parameters."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Go on from what `state` gave."""


def parameters(trainable: Trainable) -> dict[str, nn.Parameter]:
    """The trained ones, by name."""
    named: dict[str, nn.Parameter] = dict(trainable.model.named_parameters())
    return {name: each for name, each in named.items() if each.requires_grad}
