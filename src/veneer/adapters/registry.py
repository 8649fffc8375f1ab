"""The table of methods: which file lowers which `peft_type`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from veneer.adapters.checkpoint import Checkpoint, shown
from veneer.adapters.methods import lora
from veneer.adapters.methods.base import Base, Method
from veneer.adapters.names import CONFIG_FILE
from veneer.adapters.program import Program
from veneer.errors import AdapterRefused

METHODS: Mapping[str, Method] = {"LORA": lora.lower}


def lower(folder: Path | str, base: Base, max_rank: int) -> Program:
    """Check the adapter in `folder` against the base and lower it to primitives.

    Raises:
        AdapterRefused: the adapter cannot be served exactly as its files say.
    """
    checkpoint = Checkpoint(Path(folder))
    kind = checkpoint.config.get("peft_type")
    method = METHODS.get(kind) if isinstance(kind, str) else None
    if method is None:
        raise AdapterRefused(
            f"{CONFIG_FILE}: peft_type {shown(kind)} is not served; served are: {', '.join(METHODS)}."
        )
    return method(checkpoint, base, max_rank)
