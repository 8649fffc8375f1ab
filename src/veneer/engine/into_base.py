"""Merges adapters into the weights of a checkpoint: a new one, which transformers loads without any adapter.

The checkpoint is only read. Each of its files is written anew, tensor by tensor, in the dtype that it has there;
what the sum changes is computed in float32 of the unquantized weights. Quantization comes when it is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from tqdm import tqdm

from veneer.adapters.blend import at_sites, check_parts
from veneer.adapters.convert import check_free
from veneer.adapters.deltas import bias_change, weight_change
from veneer.adapters.methods.base import Base
from veneer.adapters.names import TEXT_FILES
from veneer.adapters.program import EMBEDDING, HEAD, Program
from veneer.adapters.registry import lower
from veneer.adapters.saving import TensorFile
from veneer.adapters.staging import storage_errors, sync
from veneer.engine.checkpoint_base import CheckpointBase, open_base
from veneer.errors import AdapterRefused

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD_KEY, _EMBEDDING_KEY = f"{HEAD}.weight", f"{EMBEDDING}.weight"
_MAX_RANK = 1 << 30
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class Report(NamedTuple):
    changed: int
    tensors: int
    warnings: tuple[str, ...] = ()


def merge_into_base(folders: Sequence[Path], weights: Sequence[float], model: Path, output: Path) -> Report:
    """Write the checkpoint in `model` with the weighted changes of the adapters in `folders` to a new `output`.

    Raises:
        AdapterRefused: an adapter is more than a change of the base's weights.
        Conflict: `output` exists.
        InvalidRequest: the checkpoint cannot be read.
        StorageFull: the disk has no room.
    """
    check_free(output)
    base = open_base(model)
    programs = [lower(folder, base, _MAX_RANK) for folder in folders]
    for program in programs:
        check_mergeable(program, base)
    changes = _Changes(base, programs, weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with storage_errors("the merged checkpoint"):
            partial.mkdir()
            report = _write(changes, model, partial)
            _copy_rest(model, partial, folders, untie=changes.unties)
            for path in (*partial.iterdir(), partial):
                sync(path)
            check_free(output)
            partial.rename(output)
            sync(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    warnings = tuple(dict.fromkeys(each for program in programs for each in program.warnings))
    return report._replace(warnings=warnings)


def check_mergeable(program: Program, base: Base) -> None:
    """Refuse what acts in another way than by the base's weights."""
    check_parts([program], base)
    if program.invocation or program.span:
        raise AdapterRefused(
            f"an adapter of kind {program.kind} acts on some tokens of a prompt, which weights do not; serve it"
        )
    hidden = next((name for name in program.sites if name in base.hidden_sites), None)
    if hidden is not None:
        raise AdapterRefused(
            f"an adapter of kind {program.kind} acts at the hidden state {hidden}, which has no weight; serve it"
        )


class _Changes:
    """What becomes of the checkpoint's tensors, each computed when it is asked for."""

    def __init__(self, base: CheckpointBase, programs: Sequence[Program], weights: Sequence[float]) -> None:
        self._base = base
        self._parts = at_sites([program.sites for program in programs], weights)
        self._sites = {**base.sites, EMBEDDING: base.embedding}
        self._done: set[str] = set()
        # One matrix cannot be changed in one of its two uses: the head gets its own.
        self.unties = base.tied and bool({EMBEDDING, HEAD} & self._parts.keys())

    def apply(self, key: str, tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """A tensor of the checkpoint as it is to be, and whether it changed."""
        site, _, what = key.rpartition(".")
        change = self._weight(site) if what == "weight" else self._bias(site) if what == "bias" else None
        if change is None:
            return tensor, False
        self._done.add(key)
        return (tensor.float() + change).to(tensor.dtype), True

    def refuse_left(self) -> None:
        """Refuse to lose what changes a tensor that the checkpoint does not have."""
        wanted = {f"{site}.weight" for site in self._parts}
        wanted |= {f"{site}.bias" for site in self._parts if self._bias(site) is not None}
        if left := sorted(wanted - self._done):
            raise AdapterRefused(
                f"an adapter changes {left[0]}, which the base does not have, so transformers would not load it; "
                "leave that adapter out, or serve it"
            )

    def _weight(self, site: str) -> torch.Tensor | None:
        if site not in self._parts:
            return None
        where = self._sites[site]
        total = torch.zeros(where.out_features, where.in_features)
        for part, weight in self._parts[site]:
            total.add_(weight_change(part, where, self._base), alpha=weight)
        return total.T / self._base.embedding_scale if site == EMBEDDING else total

    def _bias(self, site: str) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for part, weight in self._parts.get(site, ()):
            change = bias_change(part, self._sites[site], self._base)
            if change is not None and change.any():
                total = change * weight if total is None else total + change * weight
        return total


def _write(changes: _Changes, model: Path, output: Path) -> Report:
    """The files of weights, tensor by tensor, and their index."""
    index, names = model / _INDEX, [_WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    changed, places = 0, dict[str, str]()
    embedding: torch.Tensor | None = None
    for name in names:
        with safe_open(model / name, framework="pt") as source, TensorFile(output / name) as target:
            pending = list(source.keys())
            for key in tqdm(pending, desc=f"merging {name}", unit="tensor", disable=None):
                stored = source.get_tensor(key)
                if key == _EMBEDDING_KEY and changes.unties:
                    embedding = stored
                tensor, moved = changes.apply(key, stored)
                changed, places[key] = changed + moved, name
                target.add(key, tensor)
            if name == names[-1] and embedding is not None and _HEAD_KEY not in places:
                tensor, moved = changes.apply(_HEAD_KEY, embedding)
                changed, places[_HEAD_KEY] = changed + moved, name
                target.add(_HEAD_KEY, tensor)
            target.finish()
    changes.refuse_left()
    if index.is_file():
        size = sum((output / name).stat().st_size for name in names)
        content = {"metadata": {"total_size": size}, "weight_map": places}
        (output / _INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return Report(changed, len(places))


def _copy_rest(model: Path, output: Path, folders: Sequence[Path], *, untie: bool) -> None:
    """Config and tokenizer: the checkpoint's, and of a single adapter the text files that it brings."""
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHT_FILES and path.name != _INDEX:
            shutil.copyfile(path, output / path.name)
    if untie:
        settings = json.loads((model / "config.json").read_text("utf-8")) | {"tie_word_embeddings": False}
        (output / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    for name in TEXT_FILES if len(folders) == 1 else ():
        if (folders[0] / name).is_file():
            shutil.copyfile(folders[0] / name, output / name)
