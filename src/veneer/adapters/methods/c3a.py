"""PEFT's C3A: ΔW consists of circulant blocks, each given by one row of block_size numbers.

ΔW[m b + j, n b + k] = kernel[m, n, (k - j) mod b] / in, which is peft's fft(fft(kernel) · ifft(x)) / in.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/c3a/layer.py

Keys are `base_model.model.<module>.c3a_kernel` [out / b, in / b, b].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import change
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
    choose_sites,
    explain_for,
    per_inner_site,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["C3A"]
    block_size: int = 256
    block_size_pattern: dict[str, int] | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    init_weights: bool | str | None = "xavier_uniform"


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "exclude_modules": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT C3A. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "C3AConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".c3a_", warnings)
    blocks = per_inner_site(
        sites, "block_size_pattern", config.block_size_pattern, config.block_size, warnings
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for site, block in zip(sites, blocks, strict=True):
        if block < 1 or site.in_features % block or site.out_features % block:
            sizes = f"{site.in_features} inputs and {site.out_features} outputs"
            raise wrong("block_size", block, f"it must divide the {sizes} of {site.name}")
        shapes[f"{PREFIX}{site.name}.c3a_kernel"] = (
            site.out_features // block,
            site.in_features // block,
            block,
        )
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".c3a_", base))
    return Program(
        kind="c3a",
        sites={site.name: change(site, _delta(checkpoint, site), max_rank, base) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _delta(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    kernel = checkpoint.read(f"{PREFIX}{site.name}.c3a_kernel").double() / site.in_features
    each = torch.arange(kernel.shape[2])
    circulant = kernel[:, :, (each[None, :] - each[:, None]) % kernel.shape[2]]  # [m, n, j, k]
    return circulant.transpose(1, 2).reshape(site.out_features, site.in_features)
