"""What a method file provides.

A method turns the files of an adapter into a `Program`. It honours each field of the config exactly as the
method's reference library does, or refuses the adapter by the field's name. The table of methods is
`veneer.adapters.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.program import Program, Site


class Base(Protocol):
    """What a method may ask about the resident base."""

    @property
    def sites(self) -> Mapping[str, Site]: ...

    def weight(self, site: str) -> torch.Tensor:
        """The weight [out, in] of a site as it is served, dequantized: float32 on the CPU, a copy."""
        ...

    def bias(self, site: str) -> torch.Tensor | None:
        """The base's bias [out] of a site, float32 on the CPU, a copy, or None."""
        ...


class Method(Protocol):
    """Lower a checkpoint to primitives of at most `max_rank`, or raise `AdapterRefused`."""

    def __call__(self, checkpoint: Checkpoint, base: Base, max_rank: int) -> Program: ...
