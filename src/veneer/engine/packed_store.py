"""The packed base on disk: made once from a checkpoint, read straight to the device at every later start.

    <cache>/packed/<name of the checkpoint's folder>-<digest of its path>.safetensors

holds every tensor of the model as it is resident: packed linears, embeddings, norms, biases, head, and buffers
too (rotary frequencies are those that transformers computed, to the bit). A start builds the modules on the meta
device and fills them; no weight is made or quantized. The manifest says what the file was made from. When that
differs, or the file is damaged, the base is made again from the checkpoint and replaces the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoModelForCausalLM

from veneer.engine.layers import ATTENTION_NAME
from veneer.engine.packed import FUSED, PackedLinear, fuse, pack_linears, packed
from veneer.engine.source import cache_folder
from veneer.engine.tensor_file import Header, read_header, read_tensors, write_tensors
from veneer.errors import StorageFull
from veneer.kernels.nf4_layout import LAYOUT_VERSION, Nf4Weight, packed_shapes

logger = logging.getLogger(__name__)

FILE_VERSION = 1  # raise when the same model would be written as another file


def load_packed(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    make: Callable[[], nn.Module],
    notes: list[str],
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model in `folder`, and what replaces its linears by module path (see `packed.pack_linears`).

    `make` loads the checkpoint quantized by bitsandbytes; it is called when the cache has no sound file for it.
    What the cache could not do is added to `notes`, and the base is served all the same.
    """
    path, origin = store_path(folder), _origin(folder, dtype)
    try:
        return _read(path, origin, config, dtype, device)
    except (FileNotFoundError, NotADirectoryError):
        pass  # the first start
    except (OSError, ValueError) as error:
        _note(notes, f"the packed base in the cache was not used and is made again: {error}")
        with contextlib.suppress(OSError):  # then the replacement says why it cannot be written
            path.unlink(missing_ok=True)
    logger.info("packed base: making it from the checkpoint, once")
    model = make()
    started = time.monotonic()
    replaced = pack_linears(model, packed)
    logger.info("packed base: packed %d linears in %.1f s", len(replaced), time.monotonic() - started)
    try:
        if _origin(folder, dtype) != origin:
            raise ValueError("the checkpoint changed while it was read")
        _keep(path, origin, model, replaced)
    except (OSError, ValueError, StorageFull) as error:
        _note(notes, f"the packed base is not kept, so each start quantizes the checkpoint again: {error}")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the weights that were packed: the KV cache takes what is free
    return model, replaced


def store_path(folder: Path) -> Path:
    """The file that is kept for the checkpoint in `folder`."""
    resolved = folder.resolve()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", resolved.name)[:64]
    digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]
    return cache_folder() / "packed" / f"{name}-{digest}.safetensors"


def _origin(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides the bytes of the packed base, as JSON gives it back."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    return {
        "versions": {
            "file": FILE_VERSION,
            "layout": LAYOUT_VERSION,
            **{package: version(package) for package in ("transformers", "bitsandbytes")},
        },
        "groups": [list(group) for group in FUSED],
        "dtype": str(dtype),
        "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
    }


def _note(notes: list[str], text: str) -> None:
    logger.warning(text)
    notes.append(text)


# Writing


def _keep(path: Path, origin: dict[str, Any], model: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Write the file, unless another process has just done that."""
    tensors, linears = _take(model, replaced)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if _is_current(path, origin):
            return
        started = time.monotonic()
        write_tensors(path, tensors, {"origin": origin, "linears": linears})
    logger.info("packed base: written to %s in %.1f s", path, time.monotonic() - started)


def _is_current(path: Path, origin: Mapping[str, Any]) -> bool:
    try:
        with path.open("rb") as file:
            return bool(read_header(file).manifest["origin"] == origin)
    except (OSError, ValueError):
        return False


def _take(
    model: nn.Module, replaced: Mapping[str, nn.Module]
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Every resident tensor by name, and for each packed linear its module paths and scale multiplier."""
    if plain := [n for n, m in model.named_modules() if hasattr(getattr(m, "weight", None), "quant_state")]:
        raise ValueError(f"{len(plain)} linears cannot be packed, first {plain[0]!r}")
    tensors = {name: tensor for name, tensor in _own(model) if name.rpartition(".")[0] not in replaced}
    linears: list[dict[str, Any]] = []
    for name, module in replaced.items():  # the parts of a group follow each other
        whole: Any = module if isinstance(module, PackedLinear) else getattr(module, "whole", None)
        if whole is None:
            linears[-1]["names"].append(name)
            continue
        linears.append({"names": [name], "multiplier": whole._weight.multiplier})
        tensors |= {f"{name}.{key}": buffer for key, buffer in whole.named_buffers()}
    return tensors, linears


def _own(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, a tied one by its first name."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


# Reading


def _read(
    path: Path, origin: Mapping[str, Any], config: Any, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Raises ValueError, which says what is wrong with the file."""
    started = time.monotonic()
    with path.open("rb") as file:
        header = read_header(file)
        made_from = header.manifest["origin"]
        if changed := [key for key, value in origin.items() if made_from.get(key) != value]:
            raise ValueError(f"it was made from other {', '.join(changed)}")
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION_NAME, trust_remote_code=False
            )
        _check_shapes(model, header)
        logger.info("packed base: reading %.2f GiB from %s", header.size / (1 << 30), path)
        tensors = read_tensors(file, header, device)
    replaced = _replace_linears(model, header.manifest["linears"], tensors)
    _install(model, tensors)
    logger.info("packed base: read in %.1f s", time.monotonic() - started)
    return model.eval().requires_grad_(False), replaced


def _check_shapes(model: nn.Module, header: Header) -> None:
    """That the file has exactly the tensors that the model needs, before anything is allocated."""
    linears = header.manifest["linears"]
    replaced = {name for linear in linears for name in linear["names"]}
    if missing := replaced - dict(model.named_modules()).keys():
        raise ValueError(f"it has linears that the model has not, first {min(missing)!r}")
    expected = {n: tuple(t.shape) for n, t in _own(model) if n.rpartition(".")[0] not in replaced}
    for linear in linears:
        modules: list[Any] = [model.get_submodule(name) for name in linear["names"]]
        outputs = sum(module.out_features for module in modules)
        first = linear["names"][0]
        packed, scales = packed_shapes(outputs, modules[0].in_features)
        expected |= {f"{first}.packed": packed, f"{first}.scales": scales}
        if any(module.bias is not None for module in modules):
            expected[f"{first}.bias"] = (outputs,)
    found = {name: entry.shape for name, entry in header.entries.items()}
    if wrong := sorted(set(expected.items()) ^ set(found.items())):
        raise ValueError(f"it has other tensors than the model, first {wrong[0][0]!r}")


def _replace_linears(
    model: nn.Module, linears: list[dict[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> dict[str, nn.Module]:
    """The packed linears by module path; those they stand for lose their weights."""
    replaced: dict[str, nn.Module] = {}
    for linear in linears:
        names = linear["names"]
        modules: list[Any] = [model.get_submodule(name) for name in names]
        sizes = [module.out_features for module in modules]
        packed, scales = tensors[f"{names[0]}.packed"], tensors[f"{names[0]}.scales"]
        weight = Nf4Weight(packed, scales, linear["multiplier"], sum(sizes), modules[0].in_features)
        whole = PackedLinear(weight, tensors.get(f"{names[0]}.bias"))
        replaced.update(zip(names, fuse(whole, sizes), strict=True))
        for module in modules:
            module.weight = module.bias = None
    return replaced


def _install(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors` in the place of the model's own on the meta device; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for name, old in _own(model):
        new = tensors[name]
        made[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    for path, module in model.named_modules():
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in own:
            held.update({key: made[id(old)] for key, old in held.items() if old is not None})
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise ValueError(f"{path}.{key} is neither parameter nor buffer, so it is not in the file")
