"""PEFT's OFT: y = W0 (x R) + b with R block diagonal, near orthogonal; read as peft 0.21 writes it.

A block is the Cayley transform (I − Q)(I + Q)⁻¹ of a skew-symmetric Q as peft has it, or with use_cayley_neumann
the first terms of I + 2Q + 2Q² + …, whose last one has weight 1. With coft each Q is shortened to a norm of at
most eps / √(stored blocks): peft does it in every forward pass, here it is done once.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/oft/layer.py

Keys are `base_model.model.<module>.oft_R.weight` [blocks, b (b − 1) / 2], the rows of Q's upper triangle; one
block for all with block_share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
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
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused
from veneer.kernels.tables import MAX_BLOCK

_TERMS_LIMIT = 64  # of the Neumann series; each is a product of matrices


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["OFT"]
    r: Annotated[int, Meta(ge=0)] = 0
    oft_block_size: Annotated[int, Meta(ge=0)] = 32
    coft: bool = False
    eps: Annotated[float, Meta(ge=0)] = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Meta(ge=0, le=_TERMS_LIMIT)] = 5


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    fan_in_fan_out: bool = False
    init_weights: bool = True
    module_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT OFT. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "OFTConfig")
    if "oft_block_size" not in checkpoint.config:
        raise wrong("oft_block_size", None, "PEFT before 0.14, which had none, computed another OFT")
    if (config.r == 0) == (config.oft_block_size == 0):
        raise wrong(
            "oft_block_size", config.oft_block_size, f"exactly one of it and r = {config.r} must be 0"
        )
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".oft_", warnings)
    blocks = {site.name: _block_size(config, site) for site in sites}
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        b = blocks[site.name]
        count = 1 if config.block_share else site.in_features // b
        shapes[f"{PREFIX}{site.name}.oft_R.weight"] = (count, b * (b - 1) // 2)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".oft_", base))
    if config.use_cayley_neumann and _version(config, checkpoint) < (0, 18):
        warnings.append(
            "use_cayley_neumann: PEFT 0.18 changed the series, and the adapter was saved by an older one or does "
            "not say; it is computed as PEFT 0.21 does."
        )
    programs = {}
    for site in sites:
        stored = checkpoint.read(f"{PREFIX}{site.name}.oft_R.weight")
        turns = _rotations(config, stored, blocks[site.name])
        programs[site.name] = rotation(site, turns.expand(site.in_features // blocks[site.name], -1, -1))
    return Program(
        kind="oft",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional",
    )


def rotation(site: Site, blocks: torch.Tensor) -> SiteProgram:
    """The blocks [in / b, b, b] that turn a site's input, refused if a value overflows float32."""
    blocks = blocks.float().contiguous()
    if not blocks.isfinite().all():
        raise AdapterRefused(f"The rotation of {site.name} overflows; the adapter's values are too large.")
    return SiteProgram(rotate_in=blocks)


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I − Q)(I + Q)⁻¹ for each skew-symmetric Q of [count, b, b]; I + Q has an inverse then."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    found: torch.Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return found


def check_block(field: str, value: int, block: int, site: Site) -> None:
    """Refuse blocks larger than the kernels turn."""
    if block > MAX_BLOCK:
        raise wrong(
            field,
            value,
            f"{site.name} has blocks of {block} features; blocks of up to {MAX_BLOCK} are served",
        )


def _block_size(config: Honoured, site: Site) -> int:
    """As peft: what does not divide the features is moved to the nearest divisor, the lower one of two."""
    features = site.in_features
    if config.oft_block_size:
        block = _nearest_divisor(features, config.oft_block_size)
        check_block("oft_block_size", config.oft_block_size, block, site)
    else:
        block = features // _nearest_divisor(features, config.r)
        check_block("r", config.r, block, site)
    return block


def _nearest_divisor(number: int, wanted: int) -> int:
    if wanted >= number or number % wanted == 0:
        return min(number, wanted)
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def _version(config: Honoured, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Major and minor version of the PEFT that saved the file; (0,) when it does not say."""
    numbers = str(checkpoint.config.get("peft_version") or "0").split(".")[:2]
    return tuple(int(number) if number.isdecimal() else 0 for number in numbers)


def _rotations(config: Honoured, stored: torch.Tensor, block: int) -> torch.Tensor:
    """Upper triangles [count, b (b − 1) / 2] -> rotations [count, b, b], float64."""
    rows, columns = torch.triu_indices(block, block, 1)
    skew = torch.zeros(len(stored), block, block, dtype=torch.float64)
    skew[:, rows, columns] = stored.double()
    skew -= skew.mT.clone()
    if config.coft:
        norm = skew.norm(dim=(1, 2), keepdim=True)
        longest = config.eps / len(stored) ** 0.5
        skew = torch.where(norm <= longest, skew, skew * (longest / norm))
    return _neumann(skew, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(skew)


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2Q + … + 2Qⁿ⁻² + Qⁿ⁻¹ for n terms as peft counts them: 3 are computed as 4, and 2 are I + 2Q."""
    total = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(len(skew), 1, 1)
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew
        for _ in range(2, max(terms, 4) - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total
