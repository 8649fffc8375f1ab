"""What tests of checkpoints share: changes of a saved adapter's files, and what they are refused with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.registry import lower
from veneer.errors import AdapterRefused


def edit_config(folder: Path, **changes: Any) -> Path:
    """Replace fields of the config; returns the folder."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let `edit` change the tensors, by name."""
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def refusal(folder: Path, base: Any, max_rank: int = 64) -> str:
    """Why a base cannot serve it."""
    with pytest.raises(AdapterRefused) as error:
        lower(folder, base, max_rank)
    return error.value.message


@dataclass(frozen=True)
class Files:
    """The folder of an adapter, to be changed."""

    folder: Path

    def edit_config(self, **changes: Any) -> None:
        edit_config(self.folder, **changes)

    def edit_tensors(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        edit_tensors(self.folder, edit)
