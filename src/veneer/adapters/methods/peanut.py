"""PEFT's PEANUT: y += s·B g(A W0) x, where g is a small network over the rank and W0 the base's own weight.

g is act, then `depth` encoders, each followed by act, then as many decoders, each followed by act and by adding
what its encoder got. g is applied to each column of A W0 [r, in] when the adapter is loaded, so at a token the
adapter is of rank r. W0 is the weight that is served, as in peft on the same base.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/peanut/layer.py

Keys are `base_model.model.<module>.peanut_A.weight` [r, out], `peanut_B.weight` [out, r],
`peanut_encoders.<k>.weight` and `peanut_decoders.<k>.weight` [r, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from msgspec import Meta
from transformers.activations import ACT2FN

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    CAUSAL,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    check_rank,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site, SiteProgram

_DEPTH_LIMIT = 64


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["PEANUT"]
    r: int = 32
    depth: Annotated[int, Meta(ge=0, le=_DEPTH_LIMIT)] = 0
    act_fn: str = "relu"
    scaling: float = 1.0


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {"modules_to_save": WHOLE_MODULES, "task_type": CAUSAL}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT PEANuT. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "PeanutConfig")
    check_rank(config.r, max_rank)
    if config.act_fn not in ACT2FN:
        raise wrong("act_fn", config.act_fn, f"it must be one of {', '.join(sorted(ACT2FN))}")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".peanut_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        key = f"{PREFIX}{site.name}.peanut_"
        shapes[f"{key}A.weight"] = (config.r, site.out_features)
        shapes[f"{key}B.weight"] = (site.out_features, config.r)
        for k in range(config.depth):
            shapes[f"{key}encoders.{k}.weight"] = shapes[f"{key}decoders.{k}.weight"] = (config.r, config.r)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".peanut_", base))
    return Program(
        kind="peanut",
        sites={site.name: _read(checkpoint, config, base, site) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional",
    )


@torch.no_grad()
def _read(checkpoint: Checkpoint, config: Honoured, base: Base, site: Site) -> SiteProgram:
    key = f"{PREFIX}{site.name}.peanut_"
    activation = ACT2FN[config.act_fn]
    hidden = activation(base.weight(site.name).T @ checkpoint.read(f"{key}A.weight").T)  # [in, r]
    encoded = []
    for k in range(config.depth):
        encoded.append(hidden)
        hidden = activation(hidden @ checkpoint.read(f"{key}encoders.{k}.weight").T)
    for k in range(config.depth):
        hidden = activation(hidden @ checkpoint.read(f"{key}decoders.{k}.weight").T) + encoded.pop()
    return low_rank(site, hidden.T, checkpoint.read(f"{key}B.weight").T * config.scaling)
