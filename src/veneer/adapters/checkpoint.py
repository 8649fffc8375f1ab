"""Reads an adapter's folder: its config, the header of its safetensors file, then single tensors.

Nothing is allocated for a tensor before a method has compared every name and shape with the base: a method
builds the exact table of tensors it expects, `Checkpoint.require` refuses any difference, `read` follows.

A safetensors file is 8 bytes (little-endian length of the header), the header (a JSON object: name ->
dtype, shape, data_offsets) and the data, without holes, overlaps or a tail.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from veneer.adapters.names import CONFIG_FILE, CONFIG_LIMIT, WEIGHTS_FILE
from veneer.errors import AdapterRefused

HEADER_LIMIT = 4 << 20  # bytes
_DIMENSION_LIMIT = 1 << 40  # also keeps products of hostile shapes small
_AXES_LIMIT = 8
_FLOATS = ("F32", "F16", "BF16")
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I16": 2, "I32": 4, "I64": 8}
_PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_adapter.bin")
_PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # pickle, torch's zip
_SAVE_SAFELY = (
    "pickle files can run code and are never opened. "
    "Save the adapter with save_pretrained(folder, safe_serialization=True) and send its "
    f"{WEIGHTS_FILE}"
)


class TensorInfo(NamedTuple):
    """What the header says about a tensor."""

    dtype: str  # a key of _ITEM_BYTES
    shape: tuple[int, ...]


class Checkpoint:
    """The files of one adapter.

    Attributes:
        config: adapter_config.json, a JSON object.
        task: which one is to be read, if the file has several.
        header: every tensor of the file by name.

    Raises:
        AdapterRefused: a file is missing, malformed, truncated or a pickle.
    """

    def __init__(self, folder: Path, task: int = 0) -> None:
        self.task = task
        self._path = folder / WEIGHTS_FILE
        self.config: Mapping[str, Any] = read_config(folder / CONFIG_FILE)
        self.header: Mapping[str, TensorInfo] = read_header(_weights(folder))

    def require(
        self, shapes: Mapping[str, tuple[int, ...]], explain: Callable[[str], str] | None = None
    ) -> None:
        """Refuse the file unless it holds exactly the tensors of `shapes`.

        Args:
            shapes: name -> shape of every tensor that must be there.
            explain: why a tensor that the file has must not be there, for the message.
        """
        faults = []
        if extra := [name for name in self.header if name not in shapes]:
            why = f" ({explain(extra[0])})" if explain else ""
            faults.append(f"{_count(extra, 'tensor')} cannot be served: {listed(extra)}{why}")
        if missing := [name for name in shapes if name not in self.header]:
            faults.append(f"{_count(missing, 'tensor')} missing: {listed(missing)}")
        wrong = [name for name in shapes if name in self.header and self.header[name].shape != shapes[name]]
        if wrong:
            name = wrong[0]
            faults.append(
                f"{_count(wrong, 'tensor')} of a wrong shape: {shown(name)} has "
                f"{list(self.header[name].shape)}, the config and the base need {list(shapes[name])}"
            )
        if faults:
            raise AdapterRefused(
                f"{WEIGHTS_FILE}: {'; '.join(faults)}. The tensors must be exactly those that the config "
                "names for the base that is served here; train on this base and save with PEFT."
            )

    def read(self, name: str) -> torch.Tensor:
        """The tensor as float32 on the CPU, in memory of its own.

        Raises:
            AdapterRefused: it holds integers, or a value is NaN or infinite.
        """
        if (dtype := self.header[name].dtype) not in _FLOATS:
            raise AdapterRefused(
                f"{WEIGHTS_FILE}: tensor {shown(name)} has dtype {dtype}; it must be one of "
                f"{', '.join(_FLOATS)}. Save it as it was trained."
            )
        tensor = self._load(name).to(torch.float32, copy=True)
        if not torch.isfinite(tensor).all():
            raise AdapterRefused(
                f"{WEIGHTS_FILE}: tensor {shown(name)} holds NaN or infinite values. Every value must be "
                "finite; the training that wrote it has diverged."
            )
        return tensor

    def read_indices(self, name: str, *limits: int) -> torch.Tensor:
        """The tensor as int64 on the CPU. Floats are served where they are whole: PEFT saves some so on Windows.

        Args:
            limits: one for the whole tensor, or one for each entry of its first axis.

        Raises:
            AdapterRefused: a value is not a whole number from 0 to its limit - 1.
        """
        stored = self._load(name)
        for part, limit in zip(stored if len(limits) > 1 else [stored], limits, strict=True):
            whole = bool((part % 1 == 0).all())
            if part.numel() and not (whole and part.min() >= 0 and part.max() < limit):
                raise AdapterRefused(
                    f"{WEIGHTS_FILE}: tensor {shown(name)} must hold whole numbers from 0 to {limit - 1}; its "
                    f"values go from {part.min().item()} to {part.max().item()}. Train on the base that is "
                    "served here."
                )
        return stored.to(torch.int64)

    def _load(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise AdapterRefused(f"{WEIGHTS_FILE}: tensor {shown(name)} cannot be read: {error}.") from error
        return tensor

    @cached_property
    def _file(self) -> Any:
        try:
            return safe_open(self._path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise AdapterRefused(f"{WEIGHTS_FILE} is not a safetensors file: {error}.") from error


def read_config(path: Path) -> dict[str, Any]:
    """A config file as a JSON object without duplicate keys, NaN or Infinity, of at most `CONFIG_LIMIT`."""
    if not path.is_file():
        raise AdapterRefused(f"{path.name} is missing. Send it beside {WEIGHTS_FILE}.")
    if (size := path.stat().st_size) > CONFIG_LIMIT:
        raise AdapterRefused(f"{path.name} has {size} bytes, the limit is {CONFIG_LIMIT}.")
    return _json_object(path.read_bytes(), path.name)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file, checked against the size of the file.

    Raises:
        AdapterRefused: the header is malformed, the data is truncated, has holes, overlaps or a tail, or a
            dtype is not one of `_ITEM_BYTES`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            if prefix.startswith(_PICKLE_MAGIC):
                raise AdapterRefused(f"{path.name} holds a pickle, not safetensors: {_SAVE_SAFELY}.")
            raise AdapterRefused(
                f"{path.name} is truncated or not safetensors: it has {size} bytes and announces a header of "
                f"{length}. Send the whole file."
            )
        if length > HEADER_LIMIT:
            raise AdapterRefused(f"{path.name}: the header has {length} bytes, the limit is {HEADER_LIMIT}.")
        data = file.read(length)
    if not data.startswith(b"{"):
        raise AdapterRefused(f"{path.name} is not a safetensors file: its header is no JSON object.")
    entries = _json_object(data, f"the header of {path.name}")
    entries.pop("__metadata__", None)
    spans = {name: _span(name, entry) for name, entry in entries.items()}
    _check_layout({name: (begin, end) for name, (_, begin, end) in spans.items()}, size - 8 - length)
    return {name: info for name, (info, _, _) in spans.items()}


def listed(names: Iterable[str]) -> str:
    """The first few of `names`, for a message."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown(name) for name in names[:3]) + more


def shown(value: object) -> str:
    """A client's value for a message, cut to a length that fits into one."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    for name in _PICKLE_NAMES:
        if (folder / name).exists():
            raise AdapterRefused(f"{name} is refused: {_SAVE_SAFELY}.")
    raise AdapterRefused(f"{WEIGHTS_FILE} is missing. Send it beside {CONFIG_FILE}.")


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {shown(key)} occurs twice")
            result[key] = value
        return result

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=constant)
        if b"\\u" in data:  # half a surrogate is no text, and no message could carry it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"{what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise AdapterRefused(f"{what} must be a JSON object, not {shown(value)}.")
    return value


def _span(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """What an entry of the header says: the tensor, and where its data begins and ends."""
    what = f"{WEIGHTS_FILE}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterRefused(f"{what} must have exactly dtype, shape and data_offsets in the header.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise AdapterRefused(
            f"{what} has dtype {shown(dtype)}; served are {', '.join(_ITEM_BYTES)}. Convert it before saving."
        )
    if not _sizes(shape) or len(shape) > _AXES_LIMIT or not _sizes(offsets) or len(offsets) != 2:
        raise AdapterRefused(
            f"{what} has a malformed shape or data_offsets: {shown(shape)}, {shown(offsets)}."
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise AdapterRefused(f"{what} of shape {shape} and dtype {dtype} cannot fill bytes {begin} to {end}.")
    return TensorInfo(dtype, tuple(shape)), begin, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _DIMENSION_LIMIT for item in value
    )


def _check_layout(spans: Mapping[str, tuple[int, int]], size: int) -> None:
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise AdapterRefused(f"{WEIGHTS_FILE}: tensor {shown(name)} at byte {begin} {kind}.")
        position = end
    if position != size:
        kind = "is truncated" if size < position else "has bytes after its last tensor"
        raise AdapterRefused(
            f"{WEIGHTS_FILE} {kind}: its tensors take {position} bytes, after the header come {size}. "
            "Send the file as it was saved."
        )
