"""PARTIAL, a type of our own: full weights of some layers and nothing else, as layer-wise training leaves them.

The config is {"peft_type": "PARTIAL", "modules_to_save": [names]}, and the file holds the weights of these modules
and of all within them, by PEFT's keys for `modules_to_save`; methods/whole_modules.py reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import CAUSAL, WHOLE_MODULES, Common, Refusal, read_fields
from veneer.adapters.program import Program


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that count, beside `modules_to_save`."""

    peft_type: Literal["PARTIAL"]
    base_model_name_or_path: str | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""


REFUSED: Mapping[str, Refusal] = {"modules_to_save": WHOLE_MODULES, "task_type": CAUSAL}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower what is left of the files. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "PARTIAL adapter")
    checkpoint.require({}, lambda key: "modules_to_save names no module with this weight")
    return Program(kind="partial", sites={}, base_model=config.base_model_name_or_path or "")
