"""What a training leaves on disk: adapters, complete or not there, and its state in one file. No pickle.

The state holds the trained parameters, what the optimizer keeps of each, and numbers as JSON in the header.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from veneer.adapters.staging import sync
from veneer.training.trainable import Trainable

STATE_FILE = "state.safetensors"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a training's state."""

    steps: list[list[float]]  # `report.Step`s
    validations: dict[str, float]  # loss by step
    best_step: int
    without_gain: int


def save_adapter(trainable: Trainable, folder: Path, dtype: str) -> None:
    """Write an adapter's files; a folder of the name is there before and after, or not at all before."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    trainable.save(partial, getattr(torch, dtype))
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes 0600
        sync(path)
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    sync(folder.parent)


def write_state(
    folder: Path,
    state: State,
    weights: Mapping[str, nn.Parameter],
    optimizer: Any,
    more: Mapping[str, torch.Tensor],
) -> None:
    """Replace the state in the folder."""
    tensors = {f"weight/{name}": each.detach() for name, each in weights.items()} | dict(more)
    numbers: dict[str, Any] = {}
    for name, each in weights.items():
        for key, value in optimizer.state.get(each, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{key}/{name}"] = value.detach()
            else:
                numbers[f"{key}/{name}"] = value
    header = {"state": msgspec.json.encode(state).decode(), "numbers": json.dumps(numbers)}
    partial = folder / f"{STATE_FILE}.partial"
    save_file(
        {name: each.to("cpu", copy=True).contiguous() for name, each in tensors.items()}, partial, header
    )
    sync(partial)
    partial.replace(folder / STATE_FILE)
    sync(folder)


def read_state(
    folder: Path, weights: Mapping[str, nn.Parameter], optimizer: Any
) -> tuple[State, dict[str, torch.Tensor]] | None:
    """Put the state in the folder into weights and optimizer; returns its numbers and all of its tensors."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    numbers = json.loads(header["numbers"])
    for name, weight in weights.items():
        weight.data.copy_(tensors[f"weight/{name}"])
        found = {key.partition("/")[0]: value for key, value in numbers.items() if key.endswith(f"/{name}")}
        for key, tensor in tensors.items():
            if key.startswith("optimizer/") and key.endswith(f"/{name}"):
                part = key.split("/")[1]
                found[part] = tensor if part == "step" else tensor.to(weight.device)
        if found:
            optimizer.state[weight] = found
    return msgspec.json.decode(header["state"], type=State), tensors
