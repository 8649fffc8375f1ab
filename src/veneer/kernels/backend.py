"""Which kernels run on a device: Triton's, or the torch references: decided once for each device."""

from __future__ import annotations

import functools
import os
from typing import Literal, NamedTuple

import torch

MIN_CAPABILITY = (8, 0)  # bf16 tensor cores


class Backend(NamedTuple):
    """The choice and its reason in words, for the log and /health."""

    name: Literal["triton", "torch"]
    reason: str


@functools.cache
def resolve(device: torch.device) -> Backend:
    """Choose the kernels for `device`. On CUDA this compiles and runs one tiny kernel the first time.

    Triton needs a C compiler and Python's headers at run time; an image without them is found here and not
    in the middle of the first request.
    """
    if device.type != "cuda":
        return Backend("torch", f"Triton kernels need a CUDA device, and the engine runs on {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return Backend("torch", f"Triton kernels need compute capability {needed}, and {device} has {found}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return Backend("torch", "TRITON_INTERPRET=1 is set: the interpreter is for tests")
    try:
        import triton

        _probe(device)
    except Exception as error:  # whatever keeps Triton from working here is the reason to report
        return Backend("torch", f"Triton does not work on {device}: {type(error).__name__}: {error}")
    return Backend(
        "triton", f"Triton {triton.__version__} on compute capability {capability[0]}.{capability[1]}"
    )


@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Arguments of a Triton launch: on Hopper and later the kernel starts while its predecessor ends.

    Such a kernel (PDL) calls gdc_wait before it touches what the predecessor reads or writes, and only then lets
    its own successor start: so whatever came before the predecessor is complete as well.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def _probe(device: torch.device) -> None:
    """Compile and run a kernel, or raise what stands in the way."""
    from veneer.kernels.jit.probe import store_one

    with torch.cuda.device(device):
        cell = torch.zeros(1, dtype=torch.int32, device=device)
        store_one[(1,)](cell)
        if cell.item() != 1:
            raise RuntimeError("a kernel that stores 1 did not store it")
