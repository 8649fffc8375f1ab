"""Small arrays of the host to the device, without waiting and without the copy engine.

A copy of a few kilobytes queues in the copy engine behind those of adapters, whatever their streams: on an H200 up
to the 1.6 ms of a whole adapter, and the step with it. So a kernel reads pinned memory instead.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike

from veneer.kernels.backend import resolve

_CHUNK = 1 << 18  # bytes of pinned memory that are given back at once
_CHUNKS = 4


def upload(values: ArrayLike, dtype: DTypeLike, device: torch.device) -> torch.Tensor:
    """A tensor on `device`, of a type with 4 or 8 bytes."""
    array: np.ndarray[Any, Any] = np.asarray(values, dtype)
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host
    out = torch.empty(host.shape, dtype=host.dtype, device=device)
    upload_into(host, out)
    return out


def upload_into(host: torch.Tensor, out: torch.Tensor) -> None:
    """Start out <- host; both contiguous, of one type with 4 or 8 bytes. `host` may be written again at once.

    To be called from one thread, on one stream, for each device.
    """
    if not out.is_cuda:
        out.copy_(host)
    elif host.nbytes > _CHUNK or resolve(out.device).name != "triton":
        out.copy_(host.pin_memory(), non_blocking=True)
    elif host.nbytes:
        staged = _staging(out.device).take(host.nbytes).view(host.dtype)
        staged.copy_(host.view(-1))
        copy_by_kernel(staged, out.view(-1))


def copy_by_kernel(source: torch.Tensor, out: torch.Tensor) -> None:
    """Start out <- source, both flat and of one type with 4 or 8 bytes.

    For a CUDA device a source of the host is pinned; it may be written again when what is queued now is done.
    """
    if out.is_cuda and out.numel() and resolve(out.device).name == "triton":
        from veneer.kernels.jit.upload import copy

        words, target = source.view(torch.int32), out.view(torch.int32)
        copy[(-(-words.numel() // 1024),)](words, target, words.numel(), BLOCK=1024, num_warps=4)
    else:
        out.copy_(source, non_blocking=True)


class _Staging:
    """Pinned memory in a ring of chunks; one is used again when the device has done what followed its last use."""

    def __init__(self) -> None:
        self._chunks = [torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(_CHUNKS)]
        self._done: list[torch.cuda.Event | None] = [None] * _CHUNKS
        self._current, self._used = 0, 0

    def take(self, size: int) -> torch.Tensor:
        """Bytes, uint8 [size], at a multiple of 16."""
        if self._used + size > _CHUNK:
            leaving = torch.cuda.Event()  # type: ignore[no-untyped-call]
            leaving.record()
            self._done[self._current] = leaving
            self._current, self._used = (self._current + 1) % _CHUNKS, 0
            if (done := self._done[self._current]) is not None:
                done.synchronize()
        start, self._used = self._used, self._used + -(-size // 16) * 16
        return self._chunks[self._current][start : start + size]


@functools.cache
def _staging(device: torch.device) -> _Staging:
    return _Staging()
