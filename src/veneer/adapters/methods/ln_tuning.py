"""PEFT's LN_TUNING: the weight of a norm is replaced; read as peft 0.21 writes it.

A norm multiplies by its weight w last, so where only linear layers read it, the new weight is the same as scaling
their inputs by new / old. Norms that something else reads (Qwen3's and Gemma's heads, Gemma's norms after a
sublayer) are refused: these linear layers are all that is adapted here.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/ln_tuning/layer.py

Keys are `base_model.model.<norm>.ln_tuning_layers.weight` [features].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from veneer.adapters.checkpoint import Checkpoint, listed
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, SiteProgram
from veneer.errors import AdapterRefused

_PART = ".ln_tuning_layers.weight"


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["LN_TUNING"]
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""


REFUSED: Mapping[str, Refusal] = {
    "layers_pattern": NO_FIELD,
    "layers_to_transform": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT LN tuning. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "LNTuningConfig")
    norms = base.norms
    chosen = _choose(config, list(norms), checkpoint)
    checkpoint.require(
        {f"{PREFIX}{name}{_PART}": tuple(norms[name].weight.shape) for name in chosen},
        lambda key: f"target_modules must choose norms of the base, which has {listed(norms)}",
    )
    programs = {}
    for name in chosen:
        weight, offset, readers = norms[name]
        old, new = weight + offset, checkpoint.read(f"{PREFIX}{name}{_PART}") + offset
        if not readers:
            raise wrong("target_modules", name, "its output is not only read by linear layers; leave it out")
        if not old.all():
            raise AdapterRefused(f"The base's {name} has a weight of 0, which no scale turns into another.")
        for site in readers:
            programs[site] = SiteProgram(rotate_in=(new / old).view(-1, 1, 1))
    return Program(
        kind="ln_tuning",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        portability="proportional",
    )


def _choose(config: Honoured, norms: list[str], checkpoint: Checkpoint) -> list[str]:
    """As peft's check_target_module_exists; a regular expression is not run, the file's keys tell."""
    in_file = {key.removeprefix(PREFIX).removesuffix(_PART) for key in checkpoint.header}

    def matches(name: str, modules: list[str] | str) -> bool:
        if isinstance(modules, str):
            return name in in_file
        return any(name == module or name.endswith(f".{module}") for module in modules)

    targets, excluded = config.target_modules, config.exclude_modules
    chosen = [name for name in norms if targets is not None and matches(name, targets)]
    if isinstance(excluded, str):
        chosen = [name for name in chosen if name in in_file]
    elif excluded:
        chosen = [name for name in chosen if not matches(name, excluded)]
    if not chosen:
        raise wrong("target_modules", targets, f"no norm of the base matches; it has {listed(norms)}")
    return chosen
