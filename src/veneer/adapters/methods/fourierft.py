"""PEFT's FOURIERFT: ΔW = s · Re ifft2(F), where F [out, in] has n_frequency entries at random positions.

The positions follow from random_loc_seed; the file has the entries alone. The rank is at most twice n_frequency.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/fourierft/layer.py

Keys are `base_model.model.<module>.fourierft_spectrum` [n_frequency].
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
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Seed,
    Targeting,
    add_head_copy,
    check_count,
    choose_sites,
    explain_for,
    per_inner_site,
    random_positions,
    read_fields,
)
from veneer.adapters.program import Program, Site


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["FOURIERFT"]
    n_frequency: int = 1000
    n_frequency_pattern: dict[str, int] | None = None
    random_loc_seed: Seed = 777
    scaling: float = 150.0


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    fan_in_fan_out: bool = False
    init_weights: bool = False


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT FourierFT. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "FourierFTConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".fourierft_", warnings)
    counts = per_inner_site(
        sites, "n_frequency_pattern", config.n_frequency_pattern, config.n_frequency, warnings
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for site, count in zip(sites, counts, strict=True):
        check_count("n_frequency", count, count, site)
        shapes[f"{PREFIX}{site.name}.fourierft_spectrum"] = (count,)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".fourierft_", base))
    return Program(
        kind="fourierft",
        sites={site.name: change(site, _delta(checkpoint, config, site), max_rank, base) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _delta(checkpoint: Checkpoint, config: Honoured, site: Site) -> torch.Tensor:
    values = checkpoint.read(f"{PREFIX}{site.name}.fourierft_spectrum").double()
    rows, columns = random_positions(site, len(values), config.random_loc_seed)
    spectrum = torch.zeros(site.out_features, site.in_features, dtype=torch.double)
    spectrum[rows, columns] = values
    delta: torch.Tensor = torch.fft.ifft2(spectrum).real * config.scaling
    return delta
