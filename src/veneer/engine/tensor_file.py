"""A safetensors file of tensors of any device, written whole or not at all, checked and read at the disk's speed.

Beside the tensors it has a manifest (any JSON object) and the sum of each tensor, taken on its device. The header
begins

    {"__metadata__":{"digest":"<sha256 of the header with 64 zeros here>","manifest":"...","sums":"..."},

so that a header with the right digest needs no further check of its form. Other readers of safetensors see plain
tensors. https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from tqdm import tqdm

from veneer.errors import StorageFull

_PREFIX = b'{"__metadata__":{"digest":"'
_BLANK = b"0" * 64
_HEADER_LIMIT = 64 << 20  # bytes; a damaged length must not take memory
_PIECE = 16 << 20  # bytes read at a time by each thread; page-locked on CUDA
_READERS = 8
_SPARE = 64 << 20  # bytes of the disk that are left to others
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file


class Header(NamedTuple):
    manifest: dict[str, Any]
    sums: dict[str, int]
    entries: dict[str, Entry]
    size: int  # bytes of the file


def read_header(file: BinaryIO) -> Header:
    """Raises ValueError unless the file has the header and the length that it was written with."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    raw = file.read(min(length, _HEADER_LIMIT))
    digest = raw[len(_PREFIX) : len(_PREFIX) + len(_BLANK)]
    if not digest or digest.decode("latin-1") != _digest(raw.replace(digest, _BLANK, 1)):
        raise ValueError("its header is damaged")
    header: dict[str, Any] = json.loads(raw)
    metadata = header.pop("__metadata__")
    data = 8 + length
    entries = {
        name: Entry(_DTYPES[entry["dtype"]], tuple(entry["shape"]), data + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    whole = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != whole:
        raise ValueError(f"it has {size} bytes and was written with {whole}")
    return Header(json.loads(metadata["manifest"]), json.loads(metadata["sums"]), entries, size)


def read_tensors(file: BinaryIO, header: Header, device: torch.device) -> dict[str, torch.Tensor]:
    """All tensors of the file, on `device`. Raises ValueError when one is not what was written."""
    tensors = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device=device)
        for name, entry in header.entries.items()
    }
    pieces = [
        (piece, header.entries[name].start + index * _PIECE)
        for name, tensor in tensors.items()
        for index, piece in enumerate(torch.split(_bytes_of(tensor), _PIECE))
    ]
    _fill(file.fileno(), pieces)
    if damaged := [name for name, found in _sums(tensors).items() if found != header.sums[name]]:
        raise ValueError(f"{len(damaged)} of its tensors are damaged, first {damaged[0]!r}")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]) -> None:
    """Write the file under another name, sync it and rename it. An error leaves nothing of it behind.

    One process at a time may do this for a path. Raises StorageFull before writing, ValueError for a type that
    the file has no name for, OSError.
    """
    header = _make_header(tensors, manifest)
    total = sum(tensor.nbytes for tensor in tensors.values())
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # left by a process that was killed
    _check_room(path.parent, len(header) + total)
    try:
        with (
            partial.open("wb") as file,
            tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {path.name}", disable=None) as bar,
        ):
            file.write(header)
            for tensor in tensors.values():
                for piece in torch.split(_bytes_of(tensor), _PIECE):
                    file.write(piece.cpu().numpy().data)
                    bar.update(piece.numel())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _make_header(tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]) -> bytes:
    """Its length, then the header, padded so that the data begins at a multiple of 8 bytes."""
    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in _NAMES]:
        raise ValueError(f"tensor {odd[0]!r} is {tensors[odd[0]].dtype}; kept are {', '.join(_DTYPES)}")
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        offsets = [start, end]
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    metadata = {
        "digest": _BLANK.decode(),
        "manifest": json.dumps(manifest),
        "sums": json.dumps(_sums(tensors)),
    }
    raw = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = raw.replace(_BLANK, _digest(raw).encode(), 1)
    return len(raw).to_bytes(8, "little") + raw


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise StorageFull(
            f"the cache {str(folder)!r} has {free >> 20} MiB free and {needed >> 20} MiB are needed; "
            "make room or set VENEER_CACHE to another disk"
        )


def _fill(descriptor: int, pieces: list[tuple[torch.Tensor, int]]) -> None:
    """Read each uint8 piece from its place: while some are on their way to the device, others are read."""
    own = threading.local()

    def read(item: tuple[torch.Tensor, int]) -> None:
        piece, start = item
        if not piece.is_cuda:
            _read_exactly(descriptor, piece, start)
            return
        if not hasattr(own, "staging"):
            own.staging = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
        staged = own.staging[: piece.numel()]
        _read_exactly(descriptor, staged, start)
        piece.copy_(staged)  # waits for the end of the copy

    with ThreadPoolExecutor(_READERS, thread_name_prefix="read tensors") as pool:
        for _ in pool.map(read, pieces):
            pass


def _read_exactly(descriptor: int, target: torch.Tensor, start: int) -> None:
    view = target.numpy().data
    while view:
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise ValueError(f"it ends at byte {start}")
        view, start = view[count:], start + count


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes], the tensor's own storage when it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _sums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sum of each tensor's 4-byte words (bytes where it has no whole number of them), on its device."""
    parts = []
    for tensor in tensors.values():
        data = _bytes_of(tensor)
        if data.storage_offset() % 4:
            data = data.clone()  # a view of words must be aligned
        words = data.view(torch.int32) if data.numel() % 4 == 0 else data
        parts.append(words.sum(dtype=torch.int64))
    return dict(zip(tensors, torch.stack(parts).tolist(), strict=True))
