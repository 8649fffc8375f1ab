"""One vector for a prompt: the mean of its tokens' hidden states, or the last one's, of length 1.

Pooled is what the output head reads, the hidden states after the last norm. The chunks of a prompt add up on the
host, in float64, so that the result does not depend on how it was cut. Virtual tokens have no hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from veneer.engine.batch import Scheduled
from veneer.engine.sequence import Sequence


@dataclass(frozen=True)
class Pooled:
    """A step's part of a sequence's sum, on the host once the step is done."""

    sequence: Sequence
    total: torch.Tensor  # float64 [hidden]

    def add(self) -> None:
        found: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = self.total.numpy()
        before = self.sequence.pooled
        self.sequence.pooled = found.copy() if before is None else before + found


def pool(planned: Iterable[Scheduled], hidden: torch.Tensor) -> list[Pooled]:
    """The sums over a step's rows that somebody wants pooled. hidden: [rows, hidden], in the order of the step."""
    found, row = [], 0
    for item in planned:
        wanted = item.unread
        if item.sequence.sampling.pooling is not None and wanted:
            first = row + wanted.start - item.start
            total = hidden[first : first + len(wanted)].sum(0, dtype=torch.float64)
            found.append(Pooled(item.sequence, total.to("cpu", non_blocking=True, copy=True)))
        row += item.count
    return found


def pooled_bytes(sequence: Sequence) -> bytes:
    """What `SequenceOutput.pooled` is; nothing for a sequence that does not pool."""
    if sequence.pooled is None:
        return b""
    vector = sequence.pooled[: sequence.sampling.dimensions]
    length = float(np.linalg.norm(vector))  # dividing by it makes a mean of the sum, too
    return (vector / (length or 1.0)).astype("<f4").tobytes()
