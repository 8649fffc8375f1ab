"""PEFT's DELORA: y += λ/r · Σ_j b_j (a_j · (w ⊙ x)) / (‖a_j‖ ‖b_j‖), whose strength λ bounds the change.

w holds the norms of the columns of the weight that training began from; it comes with the file, so the change
does not depend on how the base is quantized. Norms below 1e-4 count as 1e-4.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/delora/layer.py

Keys are `base_model.model.<module>.delora_A` [r, in], `delora_B` [out, r], `delora_lambda` [1] and
`delora_w_norm` [in].
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
    per_site,
    read_fields,
)
from veneer.adapters.program import Program, Site, SiteProgram

_NORM_FLOOR = 1e-4


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["DELORA"]
    r: int = 8
    rank_pattern: dict[str, int] | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference. λ starts from the config; the trained one is in the file."""

    delora_lambda: float = 15
    init_weights: bool = True
    lambda_pattern: dict[str, float] | None = None
    module_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT DeLoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "DeloraConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".delora_", warnings)
    ranks = per_site(sites, "rank_pattern", config.rank_pattern, config.r, warnings)
    shapes: dict[str, tuple[int, ...]] = {}
    for site, rank in zip(sites, ranks, strict=True):
        check_rank(rank, max_rank, "r" if rank == config.r else "rank_pattern")
        shapes[f"{PREFIX}{site.name}.delora_A"] = (rank, site.in_features)
        shapes[f"{PREFIX}{site.name}.delora_B"] = (site.out_features, rank)
        shapes[f"{PREFIX}{site.name}.delora_lambda"] = (1,)
        shapes[f"{PREFIX}{site.name}.delora_w_norm"] = (site.in_features,)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".delora_", base))
    return Program(
        kind="delora",
        sites={site.name: _read(checkpoint, site) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _read(checkpoint: Checkpoint, site: Site) -> SiteProgram:
    a, b, strength, column_norms = (
        checkpoint.read(f"{PREFIX}{site.name}.delora_{name}") for name in ("A", "B", "lambda", "w_norm")
    )
    b = b.T
    norms = _norm(a) * _norm(b)
    return low_rank(site, a * column_norms, b * (strength / len(a) / norms))


def _norm(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms.clamp(min=_NORM_FLOOR)
