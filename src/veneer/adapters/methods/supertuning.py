"""PEFT's SUPERTUNING: ΔW is sparse, with values at flat positions that the file names, plus s·B A when r is set.

s = lora_alpha / r. Without save_precomputed_indices the positions are those of the largest (or smallest) weights
of the base that it was trained on, which its quantized form orders differently: refused.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/supertuning/layer.py

Keys are `base_model.model.<module>.supertuning_values` [n], `supertuning_indices` [n], and with r
`supertuning_lora_A.weight` [r, in], `supertuning_lora_B.weight` [out, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from msgspec import Meta

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import change, sparse_change
from veneer.adapters.methods.common import (
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    check_need,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site, SiteProgram


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["SUPERTUNING"]
    lora_alpha: float | None = None
    r: Annotated[int, Meta(ge=1)] | None = None
    sparsity: Annotated[float, Meta(ge=0, lt=1)] = 0.99


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference: the file holds the positions that select_top chose."""

    init_weights: bool = True
    lora_dropout: float = 0.0
    select_top: bool = True


REFUSED: Mapping[str, Refusal] = {
    "exclude_modules": NO_FIELD,
    "layers_pattern": NO_FIELD,
    "layers_to_transform": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "save_precomputed_indices": Refusal(
        (True,), "the positions would follow from the exact weights of training (base-fragile); save them"
    ),
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT Super-Tuning. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "SupertuningConfig")
    if config.r is None and config.lora_alpha is not None:
        raise wrong("lora_alpha", config.lora_alpha, "it needs r")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".supertuning_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        check_need(site, config.r or 0, max_rank, "r", config.r)
        shapes |= _shapes(config, site)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".supertuning_", base))
    return Program(
        kind="supertuning",
        sites={site.name: _read(checkpoint, config, site, max_rank, base) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _shapes(config: Honoured, site: Site) -> dict[str, tuple[int, ...]]:
    count = int(site.out_features * site.in_features * (1 - config.sparsity))  # as peft rounds
    if count < 1:
        raise wrong("sparsity", config.sparsity, f"it leaves no entry of {site.name}")
    key = f"{PREFIX}{site.name}.supertuning"
    shapes: dict[str, tuple[int, ...]] = {f"{key}_values": (count,), f"{key}_indices": (count,)}
    if config.r is not None:
        shapes[f"{key}_lora_A.weight"] = (config.r, site.in_features)
        shapes[f"{key}_lora_B.weight"] = (site.out_features, config.r)
    return shapes


def _read(checkpoint: Checkpoint, config: Honoured, site: Site, max_rank: int, base: Base) -> SiteProgram:
    key, inputs = f"{PREFIX}{site.name}.supertuning", site.in_features
    places = checkpoint.read_indices(f"{key}_indices", site.out_features * inputs)
    places = torch.stack((places // inputs, places % inputs))
    values = checkpoint.read(f"{key}_values")
    found = sparse_change(site, places, values, max_rank, base)
    if config.r is None:
        return found
    alpha = 2 * config.r if config.lora_alpha is None else config.lora_alpha
    a = checkpoint.read(f"{key}_lora_A.weight")
    b = checkpoint.read(f"{key}_lora_B.weight").double().T * (alpha / config.r)
    if found.sparse is not None:
        return replace(low_rank(site, a, b), sparse=found.sparse)
    delta = b.T @ a.double()
    return change(site, delta.index_put(tuple(places), values.double(), accumulate=True), max_rank, base)
