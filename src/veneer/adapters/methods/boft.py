"""PEFT's BOFT with one butterfly factor: y = s ⊙ W0 (x R) + b, R block diagonal; read as peft 0.21 writes it.

A block is the Cayley transform of the stored block's skew-symmetric part (A − Aᵀ) / 2. s does not scale the bias.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/boft/layer.py

Keys are `base_model.model.<module>.boft_R` [1, blocks, b, b] and `boft_s` [out, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

from msgspec import Meta

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    BASE_BIASES,
    CAUSAL,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    choose_sites,
    explain_for,
    read_fields,
    wrong,
)
from veneer.adapters.methods.oft import cayley, check_block, rotation
from veneer.adapters.program import Program, Site, SiteProgram


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["BOFT"]
    boft_block_size: Annotated[int, Meta(ge=0)] = 4
    boft_block_num: Annotated[int, Meta(ge=0)] = 0


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "boft_n_butterfly_factor": Refusal(
        (1,), "more factors need PEFT's CUDA extension, without which PEFT itself computes another adapter"
    ),
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT BOFT. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "BOFTConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".boft_", warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        b = _block_size(config, site)
        shapes[f"{PREFIX}{site.name}.boft_R"] = (1, site.in_features // b, b, b)
        shapes[f"{PREFIX}{site.name}.boft_s"] = (site.out_features, 1)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".boft_", base))
    return Program(
        kind="boft",
        sites={site.name: _read(checkpoint, base, site) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional",
    )


def _block_size(config: Honoured, site: Site) -> int:
    size, count = config.boft_block_size, config.boft_block_num
    if (size == 0) == (count == 0):
        raise wrong("boft_block_size", size, f"exactly one of it and boft_block_num = {count} must be 0")
    field, value = ("boft_block_size", size) if size else ("boft_block_num", count)
    if site.in_features % value:
        raise wrong(field, value, f"it must divide the {site.in_features} inputs of {site.name}")
    block = size or site.in_features // count
    check_block(field, value, block, site)
    return block


def _read(checkpoint: Checkpoint, base: Base, site: Site) -> SiteProgram:
    stored = checkpoint.read(f"{PREFIX}{site.name}.boft_R")[0].double()
    scale = checkpoint.read(f"{PREFIX}{site.name}.boft_s").flatten()
    bias = base.bias(site.name)
    return replace(
        rotation(site, cayley((stored - stored.mT) / 2)),
        scale_out=scale,
        bias=None if bias is None else bias - scale * bias,
    )
