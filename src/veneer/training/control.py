"""What a training tells and is told: reports out, a pause between layers, a stop at any time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Stopped(Exception):
    """The training was asked to stop."""


class Control(Protocol):
    def report(self, kind: str, message: str = "", **data: Any) -> None:
        """News, of the kinds of `veneer.engine.messages.JobReport`."""
        ...

    def turn(self) -> None:
        """Called between layers, forwards and backwards: waits while others are to run. Raises Stopped."""
        ...


@contextmanager
def turns(view: Any, control: Control) -> Iterator[None]:
    """Within it the decoder layers of a view call `control.turn` as they run, and as their gradients do."""

    def before(module: Any, inputs: Any) -> None:
        control.turn()

    def after(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda gradient: control.turn())  # type: ignore[no-untyped-call]

    handles = []
    for layer in view.model.layers:
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
