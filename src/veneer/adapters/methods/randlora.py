"""PEFT's RANDLORA: y += α/r · Σ_b B_b diag(λ_b) A diag(γ_b) x, with random bases A and B_b of rank r.

The bases are common to all layers; a layer takes the leading part of them: of A [r, min(in, out)], of each B_b
[max(in, out), r]. When out is the smaller size the product is transposed. There are as many bases as make the
rank full, so the change of a layer is dense in general and is served when its true rank allows.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/randlora/layer.py

Keys are `base_model.model.<module>.randlora_lambda` [r, bases], `randlora_gamma` [bases, min(in, out)] and, once,
`base_model.randlora_A` [r, 1, min] and `randlora_B` [max, bases, r], of which peft 0.21 saves another copy with
each layer. With save_projection = false the two are drawn again from projection_prng_key as peft does: same
operations, types and order.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import nn

from veneer.adapters.checkpoint import Checkpoint, shown
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
    read_fields,
    wrong,
)
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused

_BASES = ("randlora_A", "randlora_B")
_SHARED = "base_model."


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["RANDLORA"]
    r: int = 32
    randlora_alpha: float = 640
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    fan_in_fan_out: bool = False  # peft sets it to false for linear layers
    init_weights: bool = True
    randlora_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "exclude_modules": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


class Sizes(NamedTuple):
    """Of the bases in common: they fit the largest of the layers."""

    largest: int
    smallest: int
    num_bases: int


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT RandLoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "RandLoraConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".randlora_", warnings)
    sizes = shared_sizes(config, sites)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        shortest = min(site.in_features, site.out_features)
        num_bases = -(-shortest // config.r)
        shapes[f"{PREFIX}{site.name}.randlora_lambda"] = (config.r, num_bases)
        shapes[f"{PREFIX}{site.name}.randlora_gamma"] = (num_bases, shortest)
    shared = _shared_shapes(config, sizes, sites, checkpoint.header) if config.save_projection else {}
    shapes |= shared
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".randlora_", base))
    if config.save_projection:
        bases = _read_bases(checkpoint, shared)
    else:
        bases = draw_bases(config, sizes)
        warnings.append("save_projection is false: the bases are drawn again from projection_prng_key.")
    if base.dtype.itemsize < 4:
        warnings.append(
            "RandLoRA sums large terms that nearly cancel; in 16 bits its change is rounded about twelve times as "
            "coarsely as a LoRA's. Serve with --dtype float32 where that matters."
        )
    return Program(
        kind="randlora",
        sites={site.name: _read(checkpoint, config, site, bases, max_rank, base) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def shared_sizes(config: Honoured, sites: list[Site]) -> Sizes:
    widest = max(site.in_features for site in sites), max(site.out_features for site in sites)
    smallest = min(widest)
    if not 1 <= config.r <= smallest:
        raise wrong(
            "r", config.r, f"the rank of the bases must be from 1 to {smallest}, the size of the layers"
        )
    if not -(1 << 63) <= config.projection_prng_key < 1 << 64:
        raise wrong("projection_prng_key", config.projection_prng_key, "it must be a number of 64 bits")
    return Sizes(max(widest), smallest, -(-smallest // config.r))


def _shared_shapes(
    config: Honoured, sizes: Sizes, sites: list[Site], header: Container[str]
) -> dict[str, tuple[int, ...]]:
    """The tensors of the bases: the common ones, and the copies that the file has."""
    shapes = (config.r, 1, sizes.smallest), (sizes.largest, sizes.num_bases, config.r)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in zip(_BASES, shapes, strict=True):
        found[f"{_SHARED}{name}"] = shape
        copies = (f"{PREFIX}{site.name}.{name}" for site in sites)
        found |= {key: shape for key in copies if key in header}
    return found


def _read_bases(checkpoint: Checkpoint, keys: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (checkpoint.read(f"{_SHARED}{name}") for name in _BASES)
    for key in keys:
        if not torch.equal(checkpoint.read(key), a if key.endswith(_BASES[0]) else b):
            raise AdapterRefused(
                f"{WEIGHTS_FILE}: {shown(key)} differs from the tensor of that name that all layers have in "
                "common. Save the adapter again with PEFT's save_pretrained."
            )
    return a, b


def draw_bases(config: Honoured, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """The bases A [r, 1, smallest] and B [largest, num_bases, r] as peft draws them, in float32."""
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    shape_a = (config.r, 1, sizes.smallest)
    if config.sparse or config.very_sparse:
        sparsity = math.sqrt(sizes.smallest) if config.very_sparse else 3
        shape_b = (sizes.largest, sizes.num_bases, config.r)
        a = _ternary(torch.rand(shape_a, generator=generator), sparsity)
        return a, _ternary(torch.rand(shape_b, generator=generator), sparsity)
    a = _kaiming(shape_a, generator)
    b = [_kaiming((sizes.largest, 1, config.r), generator) for _ in range(sizes.num_bases)]
    joined = torch.cat(b, dim=1)
    return (a / a.std()).float(), (joined / joined.std()).float()


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return nn.init.kaiming_uniform_(
        torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator
    )


def _ternary(uniform: torch.Tensor, sparsity: float) -> torch.Tensor:
    """-1, 0 or 1 with probabilities 1/2s, 1 - 1/s and 1/2s, divided by their standard deviation."""
    edge = 1 / (2 * sparsity)
    signs = (uniform > 1 - edge).float() - (uniform < edge).float()
    return signs / signs.std()


def _read(
    checkpoint: Checkpoint,
    config: Honoured,
    site: Site,
    bases: tuple[torch.Tensor, torch.Tensor],
    max_rank: int,
    base: Base,
) -> SiteProgram:
    key = f"{PREFIX}{site.name}"
    lambdas = checkpoint.read(f"{key}.randlora_lambda").double()  # [r, bases]
    gammas = checkpoint.read(f"{key}.randlora_gamma").double()  # [bases, min]
    num_bases, shortest = gammas.shape
    longest = max(site.in_features, site.out_features)
    # peft flattens the two in different orders: row i·bases + j of the one meets column j'·r + i' of the other
    # with the same number. So the pairs are not those of the paper's sum.
    narrow = (lambdas[:, :, None] * bases[0][:, :, :shortest] * gammas).flatten(0, 1)
    wide = bases[1][:longest, :num_bases].double().flatten(1)
    delta = wide @ narrow * (config.randlora_alpha / config.r)
    if shortest != site.in_features:
        delta = delta.T
    return change(site, delta, max_rank, base)
