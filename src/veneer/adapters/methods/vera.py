"""PEFT's VERA: y += λ_b ⊙ B(λ_d ⊙ A x), where all layers share A and B; read as peft 0.21 writes it.

A and B of one seed and size are the same in every adapter, so they are shared (program.py): λ_b and λ_d are all
that an adapter has for itself. A layer uses the first in_features columns of A [r, largest in] and the first
out_features rows of B [largest out, r]. Without save_projection both are drawn again from projection_prng_key.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/vera/model.py

Keys are `base_model.model.<module>.vera_lambda_b` [out], `vera_lambda_d` [r], and `base_model.vera_A`,
`base_model.vera_B`. pvera.py is the same with other names and twice the rows in A.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    Seed,
    Targeting,
    add_head_copy,
    check_rank,
    choose_sites,
    explain_for,
    read_fields,
)
from veneer.adapters.program import Program, SiteProgram
from veneer.errors import AdapterRefused


class Shared(Targeting, frozen=True, kw_only=True):
    """What VERA and PVERA honour alike, with peft's defaults."""

    r: int = 256
    projection_prng_key: Seed = 0
    save_projection: bool = True


class Honoured(Shared, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes."""

    peft_type: Literal["VERA"]


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True
    vera_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "exclude_modules": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT VeRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "VeraConfig")
    return lower_shared(checkpoint, base, max_rank, config, "vera", config.r)


def lower_shared(
    checkpoint: Checkpoint, base: Base, max_rank: int, config: Shared, name: str, rows: int
) -> Program:
    """`rows` are the rows of A and the length of λ_d; the first r of them act."""
    check_rank(config.r, max_rank)
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, f".{name}_", warnings)
    a_shape = (rows, max(site.in_features for site in sites))
    b_shape = (max(site.out_features for site in sites), config.r)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        shapes[f"{PREFIX}{site.name}.{name}_lambda_b"] = (site.out_features,)
        shapes[f"{PREFIX}{site.name}.{name}_lambda_d"] = (rows,)
    if config.save_projection:
        shapes |= {f"base_model.{name}_A": a_shape, f"base_model.{name}_B": b_shape}
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(f".{name}_", base))
    if config.save_projection:
        a, b = checkpoint.read(f"base_model.{name}_A"), checkpoint.read(f"base_model.{name}_B")
    else:
        a, b = rebuild(config.projection_prng_key, a_shape, b_shape)
        warnings.append(
            "save_projection: false; the shared projections were drawn again from projection_prng_key, which "
            "gives those of the training as long as torch's generator stays the same. Save them to be sure."
        )
    # Layers of one width have the same tensor: what is shared is told by that.
    cut_a = {n: a[: config.r, :n].contiguous() for n in sorted({site.in_features for site in sites})}
    cut_b = {n: b[:n].T.contiguous() for n in sorted({site.out_features for site in sites})}
    limits = {n: each.abs().max() for n, each in cut_b.items()}
    programs = {}
    for site in sites:
        lambda_b = checkpoint.read(f"{PREFIX}{site.name}.{name}_lambda_b")
        lambda_d = checkpoint.read(f"{PREFIX}{site.name}.{name}_lambda_d")[: config.r]
        largest = lambda_b.abs().max() * lambda_d.abs().max() * limits[site.out_features]
        if not largest.isfinite():
            raise AdapterRefused(f"The change of {site.name} overflows; the adapter's values are too large.")
        programs[site.name] = SiteProgram(
            a=cut_a[site.in_features],
            b=cut_b[site.out_features],
            rank_scale=lambda_d.contiguous(),
            update_scale=lambda_b,
        )
    return Program(
        kind=name,
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def rebuild(
    key: int, a_shape: tuple[int, int], b_shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as peft draws them: Kaiming-uniform, one after the other from one generator on the CPU."""
    generator = torch.Generator().manual_seed(key)
    a = torch.nn.init.kaiming_uniform_(torch.empty(a_shape, dtype=torch.float32), generator=generator)
    b = torch.nn.init.kaiming_uniform_(torch.empty(b_shape, dtype=torch.float32), generator=generator)
    return a, b
