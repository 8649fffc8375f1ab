"""PEFT's MISS (once Bone): y += (Σ over runs of r inputs) · block, with a matrix `block` [r, out].

The sum over runs is a product with a fixed matrix: row j has ones at the inputs j, j + r, j + 2r, …
"mini" repeats a narrower block along the outputs. "bat" changes the weight by W0 itself: block (p, q) [r, r] of
the weight becomes W + (W + I) b_p, a dense change that is served when its rank allows.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/miss/layer.py

Keys are `base_model.model.<module>.miss_block` [r, out], "mini" [r, mini_r], "bat" [out/r, r, r].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import change
from veneer.adapters.methods.common import (
    BASE_BIASES,
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


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults. init_weights is the form."""

    peft_type: Literal["MISS"]
    r: int = 64
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    miss_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT MiSS. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "MissConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".miss_", warnings)
    check_rank(config.r, max_rank)
    _check_sizes(config, sites)
    shapes = {f"{PREFIX}{site.name}.miss_block": _shape(config, site) for site in sites}
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".miss_", base))
    return Program(
        kind="miss",
        sites={site.name: _read(checkpoint, base, config, site, max_rank) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional" if config.init_weights == "bat" else "independent",
    )


def _check_sizes(config: Honoured, sites: Iterable[Site]) -> None:
    r, mini_r, form = config.r, config.mini_r, config.init_weights
    for site in sites:
        if r > site.in_features:
            raise wrong("r", r, f"it must be at most {site.in_features}, the inputs of {site.name}")
        if form == "bat" and (site.in_features % r or site.out_features % r):
            rule = f"it must divide {site.in_features} and {site.out_features}, the sizes of {site.name}"
            raise wrong("r", r, f"with init_weights 'bat' {rule}")
        if form == "mini" and (mini_r < 1 or site.out_features % mini_r):
            rule = f"with init_weights 'mini' it must divide {site.out_features}, the outputs of {site.name}"
            raise wrong("mini_r", mini_r, rule)


def _shape(config: Honoured, site: Site) -> tuple[int, ...]:
    if config.init_weights == "bat":
        return site.out_features // config.r, config.r, config.r
    return config.r, config.mini_r if config.init_weights == "mini" else site.out_features


def _read(checkpoint: Checkpoint, base: Base, config: Honoured, site: Site, max_rank: int) -> SiteProgram:
    r = config.r
    block = checkpoint.read(f"{PREFIX}{site.name}.miss_block")
    if config.init_weights == "bat":
        weight = base.weight(site.name).double().reshape(site.out_features // r, r, -1, r)
        block = block.double()  # [p, r, r]
        delta = torch.einsum("piqk,pkj->piqj", weight, block) + block[:, :, None]
        return change(site, delta.reshape(site.out_features, -1), max_rank, base)
    if config.init_weights == "mini":
        block = block.repeat(1, site.out_features // config.mini_r)
    runs = -(-site.in_features // r)
    return low_rank(site, torch.eye(r).repeat(1, runs)[:, : site.in_features], block)
