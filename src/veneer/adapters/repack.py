"""Makes an adapter's two files of what AdapterHub's library and pyreft save in several, or as pickles.

    AdapterHub    adapter.safetensors or pytorch_adapter.bin; the output head that was saved beside it comes along
    fusion        the folders of the fused adapters and that of the layer: see methods/adapterhub_fusion.py
    pyreft        config.json and intkey_*.bin: see pyreft.py

Runs on its user's machine, never in a server. Pickles are read by PyTorch's restricted loader (`weights_only`),
which takes tensors and plain containers alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from veneer.adapters.checkpoint import listed, read_config, shown
from veneer.adapters.convert import check_free, write
from veneer.adapters.methods.adapterhub import kind_of
from veneer.adapters.methods.common import wrong
from veneer.adapters.names import ADAPTERHUB_WEIGHTS, CONFIG_FILE, HEAD_FILES
from veneer.adapters.program import HEAD
from veneer.errors import AdapterRefused

FUSION_CONFIG = "adapter_fusion_config.json"
_WEIGHTS = (ADAPTERHUB_WEIGHTS, "pytorch_adapter.bin")
_FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
_SECOND_NAME = ".pool.prefix_tunings."  # of a prefix's tensors, which each layer names again
Kind = Literal["noreft", "direft"]
Tensors = dict[str, torch.Tensor]


class Repacked(NamedTuple):
    """What was written."""

    what: str
    tensors: int
    warnings: tuple[str, ...]


def is_adapterhub(folder: Path) -> bool:
    """Whether AdapterHub's library has saved an adapter there."""
    path = folder / CONFIG_FILE
    return path.is_file() and kind_of(read_config(path)) is not None


def repack_adapterhub(folder: Path, output: Path, kind: Kind | None = None) -> Repacked:
    """One adapter. `kind` says what the files of NoReFT and DiReFT do not.

    Raises:
        AdapterRefused: a file is missing or malformed, or holds what no upload can.
        Conflict: `output` exists.
    """
    check_free(output)
    config = read_config(folder / CONFIG_FILE)
    config["config"] = _told(config["config"], kind)
    tensors = {key: value for key, value in _read(folder, _WEIGHTS).items() if _SECOND_NAME not in key}
    heads = [name for name in HEAD_FILES if (folder / name).is_file()]
    if heads:
        tensors |= _head(_read(folder, HEAD_FILES), folder)
    write(output, config, tensors, texts=folder)
    with_head = " with the output head" if heads else ""
    return Repacked(f"{kind_of(config)}{with_head}", len(tensors), ())


def repack_fusion(folders: Sequence[Path], layer: Path, output: Path) -> Repacked:
    """Fused adapters and the layer that fuses them. Raises as `repack_adapterhub`."""
    check_free(output)
    fusion = read_config(layer / FUSION_CONFIG)
    name = fusion.get("name")
    names = fusion.get("adapter_names") or (name.split(",") if isinstance(name, str) else [])
    configs: dict[str, Mapping[str, Any]] = {}
    tensors = _read(layer, _FUSION_WEIGHTS)
    for folder in folders:
        config = read_config(folder / CONFIG_FILE)
        if kind_of(config) != "ADAPTERHUB_BOTTLENECK":
            raise AdapterRefused(
                f"{str(folder)!r} holds no bottleneck adapter of AdapterHub's; only these are fused."
            )
        configs[str(config.get("name"))] = config
        tensors |= _read(folder, _WEIGHTS)
    if set(configs) != set(names) or len(folders) != len(names):
        raise AdapterRefused(
            f"{str(layer / FUSION_CONFIG)!r} fuses {listed(names)}, the folders hold {listed(configs)}. Give the "
            "folder of each fused adapter once."
        )
    whole = {
        "peft_type": "ADAPTERHUB_FUSION",
        "adapters": [configs[each] for each in names],
        "fusion": fusion | {"adapter_names": names},
    }
    write(output, whole, tensors, texts=layer)
    return Repacked(f"a fusion of {len(names)} adapters", len(tensors), ())


def _told(fields: Mapping[str, Any], kind: Kind | None) -> dict[str, Any]:
    """A method's config with what the library has left out of it."""
    is_open = fields.get("architecture") == "reft" and "subtract_projection" not in fields
    if kind is None:
        if is_open and not fields.get("orthogonality"):
            raise wrong(
                "subtract_projection",
                None,
                "NoReFT and DiReFT have the same files; tell by --kind which it is",
            )
        return dict(fields)
    if not is_open:
        raise AdapterRefused(
            f"--kind {kind} is for ReFT files without subtract_projection; leave it out here."
        )
    return dict(fields) | {"subtract_projection": kind == "noreft"}


def _head(tensors: Tensors, folder: Path) -> Tensors:
    if tensors.keys() != {f"{HEAD}.weight"}:
        raise AdapterRefused(
            f"the head in {str(folder)!r} has {listed(tensors)}; only the output head of a causal language model, "
            f"{HEAD}.weight, can come along."
        )
    return tensors


def _read(folder: Path, names: Sequence[str]) -> Tensors:
    """The tensors of the first of these files that is there, safetensors before a pickle."""
    for name in sorted(names, key=lambda each: not each.endswith(".safetensors")):
        if (path := folder / name).is_file():
            return read_tensors(path)
    raise AdapterRefused(f"{str(folder)!r} has none of {listed(names)}.")


def read_tensors(path: Path) -> Tensors:
    """The tensors of a file by name, each in memory of its own.

    Raises:
        AdapterRefused: it is damaged, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise AdapterRefused(f"{str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # pickle's own, which the restricted loader raises on anything but tensors
        raise AdapterRefused(f"{str(path)!r} holds more than tensors: {shown(str(error))}") from error
    if not isinstance(found, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()
    ):
        raise AdapterRefused(f"{str(path)!r} holds no table of tensors.")
    return {key: value.detach().contiguous().clone() for key, value in found.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterRefused(f"{str(path)!r} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise AdapterRefused(f"{str(path)!r} holds no JSON object.")
    return found
