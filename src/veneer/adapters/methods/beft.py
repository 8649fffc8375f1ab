"""PEFT's BEFT: y = W0 x + b + β; read as peft 0.21 writes it.

https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/beft/layer.py

Keys are `base_model.model.<module>.beft_bias` [1, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    choose_sites,
    explain_for,
    read_fields,
)
from veneer.adapters.program import Program, SiteProgram


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes."""

    peft_type: Literal["BEFT"]


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "exclude_modules": NO_FIELD,
    "layers_pattern": NO_FIELD,
    "layers_to_transform": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT BEFT. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "BeftConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".beft_", warnings)
    shapes: dict[str, tuple[int, ...]] = {
        f"{PREFIX}{site.name}.beft_bias": (1, site.out_features) for site in sites
    }
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".beft_", base))
    return Program(
        kind="beft",
        sites={
            site.name: SiteProgram(bias=checkpoint.read(f"{PREFIX}{site.name}.beft_bias").flatten())
            for site in sites
        },
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )
