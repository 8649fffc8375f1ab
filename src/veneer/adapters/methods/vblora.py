"""PEFT's VBLORA: y += B(A x), where each piece of A and B is a mixture of a few vectors of a shared bank.

A row of A and a column of B are cut into pieces of vector_length. A piece is the softmax over the topk largest
of its logits, times their vectors. save_only_topk_weights saves the indices and all weights but the last.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/vblora/layer.py

Keys are `base_model.model.<module>.vblora_logits_A` [r, in / length, vectors], `vblora_logits_B`
[out / length, r, vectors], or each with `_topk_indices` [..., topk] and `_topk_weights` [..., topk - 1], and
`base_model.vblora_vector_bank` [vectors, length].
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
    check_rank,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused

Size = Annotated[int, Meta(ge=1)]
_BANK = "base_model.vblora_vector_bank"
_ROUNDING = 1e-2  # by which weights may miss a sum of 1: files hold at least eight bits of each


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["VBLORA"]
    r: int = 4
    num_vectors: Size = 256
    vector_length: Size = 256
    topk: Size = 2
    save_only_topk_weights: bool = False


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference; PEFT sets fan_in_fan_out to false for linear layers."""

    fan_in_fan_out: bool = False
    init_logits_std: float = 0.1
    init_vector_bank_bound: float = 0.02
    vblora_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT VB-LoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "VBLoRAConfig")
    check_rank(config.r, max_rank)
    if config.topk > config.num_vectors:
        raise wrong("topk", config.topk, f"num_vectors is only {config.num_vectors}")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".vblora_", warnings)
    shapes: dict[str, tuple[int, ...]] = {_BANK: (config.num_vectors, config.vector_length)}
    for site in sites:
        shapes |= _shapes(config, site)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".vblora_", base))
    bank = checkpoint.read(_BANK)
    return Program(
        kind="vblora",
        sites={site.name: _read(checkpoint, config, site, bank) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _shapes(config: Honoured, site: Site) -> dict[str, tuple[int, ...]]:
    length = config.vector_length
    for what, size in (("in_features", site.in_features), ("out_features", site.out_features)):
        if size % length:
            raise wrong("vector_length", length, f"it must divide the {size} {what} of {site.name}")
    shapes: dict[str, tuple[int, ...]] = {}
    for key, pieces in (
        (f"{PREFIX}{site.name}.vblora_logits_A", (config.r, site.in_features // length)),
        (f"{PREFIX}{site.name}.vblora_logits_B", (site.out_features // length, config.r)),
    ):
        if config.save_only_topk_weights:
            shapes[f"{key}_topk_indices"] = (*pieces, config.topk)
            shapes[f"{key}_topk_weights"] = (*pieces, config.topk - 1)
        else:
            shapes[key] = (*pieces, config.num_vectors)
    return shapes


def _read(checkpoint: Checkpoint, config: Honoured, site: Site, bank: torch.Tensor) -> SiteProgram:
    mix = _mixture if config.save_only_topk_weights else _logits
    a, b = (
        # A sum of weighted rows of the bank, without a copy of each row for each piece.
        torch.nn.functional.embedding_bag(
            indices.flatten(0, 1), bank, mode="sum", per_sample_weights=weights.flatten(0, 1)
        ).view(*indices.shape[:2], config.vector_length)
        for indices, weights in (
            mix(checkpoint, config, f"{PREFIX}{site.name}.vblora_logits_{letter}") for letter in "AB"
        )
    )  # [r, in / length, length], [out / length, r, length]
    return low_rank(site, a.reshape(config.r, -1), b.transpose(0, 1).reshape(config.r, -1))


def _logits(checkpoint: Checkpoint, config: Honoured, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights [..., topk] of each piece."""
    logits, indices = checkpoint.read(key).topk(config.topk, dim=-1)
    return indices, logits.softmax(dim=-1)


def _mixture(checkpoint: Checkpoint, config: Honoured, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights [..., topk] of each piece."""
    indices = checkpoint.read_indices(f"{key}_topk_indices", config.num_vectors)
    weights = checkpoint.read(f"{key}_topk_weights")
    last = 1 - weights.sum(-1, keepdim=True)
    if weights.lt(0).any() or last.lt(-_ROUNDING).any():
        raise AdapterRefused(
            f"{WEIGHTS_FILE}: {key}_topk_weights must hold weights of at least 0 with a sum of at most 1."
        )
    if indices.sort(-1).values.diff(dim=-1).eq(0).any():
        raise AdapterRefused(f"{WEIGHTS_FILE}: {key}_topk_indices names a vector twice in one piece.")
    return indices, torch.cat((weights, last.clamp(min=0)), -1)
