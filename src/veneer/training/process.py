"""The engine process that also trains: `python -m veneer.training.process ADDRESS`, as veneer.engine.process.

The steps keep their thread and the training has one of its own; both read the one resident base.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from veneer.engine import messages
from veneer.engine.config import EngineConfig
from veneer.engine.process import Loop, start
from veneer.engine.view import Resident
from veneer.training.governor import Governor
from veneer.training.worker import TrainingWorker


class TrainingLoop(Loop):
    """The engine's loop, with jobs."""

    def __init__(self, address: str, config: EngineConfig) -> None:
        super().__init__(address, config)
        base = self._engine.base
        self._governor = make_governor(base.device, config.training_share, config.training_latency)
        resident = Resident(base, Path(config.model), config.base_name or Path(config.model).name)
        self._worker = TrainingWorker(resident, self._governor, self._wake)

    def _handle(self, request: messages.Request) -> list[messages.Reply]:
        if isinstance(request, (messages.StartJob, messages.StopJob)):
            self._worker.handle(request)
            return []
        return super()._handle(request)

    def _step(self) -> tuple[list[messages.Reply], bool]:
        self._governor.serving(self._engine.has_work)
        begun = time.monotonic()
        replies, ran = super()._step()
        if ran:
            self._governor.stepped(time.monotonic() - begun)
        return [*replies, *self._worker.reports()], ran


def make_governor(device: torch.device, share: float, latency: float) -> Governor:
    """As EngineConfig's `training_share` and `training_latency` say, on this device."""
    if device.type != "cuda":
        return Governor(share)
    return Governor(share, latency, synchronize=_wait_for_stream)


def _wait_for_stream() -> None:
    torch.cuda.current_stream().synchronize()


if __name__ == "__main__":
    start(TrainingLoop)
