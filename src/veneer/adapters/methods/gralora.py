"""PEFT's GRALORA: the weight is cut into k × k blocks, each with its own product of rank r/k; α/(r + hybrid_r).

Input block n gives r numbers x_n A_n; the j-th r/k of them go to output block j, where they meet rows n·r/k on
of B_j. As one product that is rank k·r with factors that are zero outside their block. A plain LoRA of rank
hybrid_r beside it ("hybrid") has the same scale.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/gralora/layer.py

Keys are `base_model.model.<module>.gralora_A` [k, in/k, r], `gralora_B` [k, r, out/k], and with hybrid_r
`gralora_A_general.weight` [hybrid_r, in] and `gralora_B_general.weight` [out, hybrid_r].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    BASE_BIASES,
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    check_need,
    check_rank,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site, SiteProgram


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["GRALORA"]
    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_k: int = 2


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    fan_in_fan_out: bool = False  # peft sets it to false for linear layers
    gralora_dropout: float = 0.0
    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "exclude_modules": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT GraLoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "GraloraConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".gralora_", warnings)
    _check(config, sites, max_rank)
    k, hybrid = config.gralora_k, config.hybrid_r
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        shapes[f"{PREFIX}{site.name}.gralora_A"] = (k, site.in_features // k, config.r)
        shapes[f"{PREFIX}{site.name}.gralora_B"] = (k, config.r, site.out_features // k)
        if hybrid:
            shapes[f"{PREFIX}{site.name}.gralora_A_general.weight"] = (hybrid, site.in_features)
            shapes[f"{PREFIX}{site.name}.gralora_B_general.weight"] = (site.out_features, hybrid)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".gralora_", base))
    return Program(
        kind="gralora",
        sites={site.name: _read(checkpoint, config, site) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _check(config: Honoured, sites: Iterable[Site], max_rank: int) -> None:
    k = config.gralora_k
    check_rank(config.r, max_rank)
    if not 0 <= config.hybrid_r <= max_rank:
        raise wrong("hybrid_r", config.hybrid_r, f"it must be from 0 to {max_rank} (--max-lora-rank)")
    if k < 1 or config.r % k:
        raise wrong("gralora_k", k, f"it must divide r = {config.r}")
    for site in sites:
        if site.in_features % k or site.out_features % k:
            rule = f"it must divide {site.in_features} and {site.out_features}, the sizes of {site.name}"
            raise wrong("gralora_k", k, rule)
        check_need(site, k * config.r + config.hybrid_r, max_rank, "r", config.r)


def _read(checkpoint: Checkpoint, config: Honoured, site: Site) -> SiteProgram:
    key, k, part = f"{PREFIX}{site.name}", config.gralora_k, config.r // config.gralora_k
    block_a = checkpoint.read(f"{key}.gralora_A").reshape(k, -1, k, part)  # [from n, in/k, to j, r/k]
    block_b = checkpoint.read(f"{key}.gralora_B").reshape(k, k, part, -1)  # [to j, from n, r/k, out/k]
    a = torch.zeros(k, k, part, k, site.in_features // k)  # [to j, from n, r/k, block, in/k]
    b = torch.zeros(k, k, part, k, site.out_features // k)
    for block in range(k):
        a[:, block, :, block] = block_a[block].permute(1, 2, 0)
        b[block, :, :, block] = block_b[block]
    a, b = a.reshape(k * config.r, -1), b.reshape(k * config.r, -1)
    if config.hybrid_r:
        a = torch.cat((a, checkpoint.read(f"{key}.gralora_A_general.weight")))
        b = torch.cat((b, checkpoint.read(f"{key}.gralora_B_general.weight").T))
    return low_rank(site, a, b * (config.alpha / (config.r + config.hybrid_r)))
