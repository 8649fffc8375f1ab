"""PEFT's UNILORA: y += B(A x), where the entries of all A and B are drawn from one vector θ_d.

Entry e is θ_d[i_e] / √(number of entries with index i_e). The indices come from proj_seed, in the order of the
layers in the model, A before B; with save_indices they and the factors 1/√n are in the file.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/unilora/model.py

Keys are `base_model.unilora_theta_d` [theta_d_length] and, with save_indices, `base_model.model.<module>.`
`unilora_indices_A`, `unilora_scales_A` [r, in], `unilora_indices_B`, `unilora_scales_B` [out, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from msgspec import Meta

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
    check_rank,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site

_THETA = "base_model.unilora_theta_d"
_ENTRIES_LIMIT = 1 << 28  # of all A and B: a small file must not fill the memory with indices


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["UNILORA"]
    r: int = 4
    proj_seed: Annotated[int, Meta(ge=0)] = 42
    theta_d_length: Annotated[int, Meta(ge=1)] = 256
    save_indices: bool = False


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    fan_in_fan_out: bool = False
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    unilora_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "exclude_modules": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT Uni-LoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "UniLoraConfig")
    check_rank(config.r, max_rank)
    warnings: list[str] = []
    sites = _sites(config, checkpoint, base, warnings)
    shapes: dict[str, tuple[int, ...]] = {_THETA: (config.theta_d_length,)}
    for site in sites if config.save_indices else ():
        for part in ("indices", "scales"):
            shapes[f"{PREFIX}{site.name}.unilora_{part}_A"] = (config.r, site.in_features)
            shapes[f"{PREFIX}{site.name}.unilora_{part}_B"] = (site.out_features, config.r)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".unilora_", base))
    theta = checkpoint.read(_THETA)
    entries = (
        _saved(config, checkpoint, sites, theta) if config.save_indices else _drawn(config, sites, theta)
    )
    return Program(
        kind="unilora",
        sites={site.name: low_rank(site, a, b.T) for site, (a, b) in zip(sites, entries, strict=True)},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _sites(config: Honoured, checkpoint: Checkpoint, base: Base, warnings: list[str]) -> list[Site]:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() != "all-linear" and not config.save_indices:
        raise wrong("target_modules", targets, "the file names no layers, so they must be listed by name")
    return choose_sites(config, base, checkpoint.header, ".unilora_", warnings)


def _saved(
    config: Honoured, checkpoint: Checkpoint, sites: list[Site], theta: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [r, in] and B [out, r] of each site, from the indices and scales in the file."""

    def read(key: str, letter: str) -> torch.Tensor:
        indices = checkpoint.read_indices(f"{key}.unilora_indices_{letter}", config.theta_d_length)
        return theta[indices] * checkpoint.read(f"{key}.unilora_scales_{letter}")

    return [(read(key, "A"), read(key, "B")) for key in (f"{PREFIX}{site.name}" for site in sites)]


def _drawn(
    config: Honoured, sites: list[Site], theta: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [r, in] and B [out, r] of each site, from the indices that proj_seed gives."""
    sizes = [config.r * size for site in sites for size in (site.in_features, site.out_features)]
    if sum(sizes) > _ENTRIES_LIMIT:
        raise wrong("r", config.r, f"A and B have {sum(sizes)} entries, the limit is {_ENTRIES_LIMIT}")
    indices = draw_indices(sum(sizes), config.theta_d_length, config.proj_seed)
    counts = torch.bincount(indices, minlength=config.theta_d_length).float()
    scaled = theta * counts.rsqrt()  # entries of θ_d without a use are never picked
    parts = torch.split(scaled[indices], sizes)
    return [
        (a.view(config.r, -1), b.view(-1, config.r)) for a, b in zip(parts[::2], parts[1::2], strict=True)
    ]


def draw_indices(count: int, length: int, seed: int) -> torch.Tensor:
    """`count` indices below `length`, each used equally often up to one, in the order that peft shuffles them."""
    draw = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), count // length)
    if rest := count % length:
        indices = np.concatenate([indices, draw.choice(length, size=rest, replace=False)])
    draw.shuffle(indices)
    return torch.from_numpy(indices)
