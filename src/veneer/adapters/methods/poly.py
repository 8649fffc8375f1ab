"""PEFT's POLY: for each task y += B(A x) / r, where A and B are mixtures of skills.

A and B are cut into n_splits pieces along the layer's width. In each piece the skills are weighted by the
sigmoids of the task's logits, divided by their sum. peft chooses the task by `task_ids` of the forward
pass, a request by `task_id`.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/poly/layer.py

Keys are `base_model.model.<module>.poly_lora_A` [splits, skills, in / splits, r], `poly_lora_B`
[splits, skills, r, out / splits] and `poly_router.module_logits` [tasks, splits * skills].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from msgspec import Meta

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    check_rank,
    check_tasks,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site, SiteProgram

Size = Annotated[int, Meta(ge=1)]
_EPSILON = 1e-12  # peft.tuners.poly.router.EPS


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["POLY"]
    r: int = 8
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: Size = 4
    n_splits: Size = 1


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "layers_pattern": NO_FIELD,
    "layers_to_transform": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT Poly. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "PolyConfig")
    check_rank(config.r, max_rank)
    tasks = check_tasks("n_tasks", config.n_tasks, checkpoint.task)
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".poly_", warnings)
    splits, skills = config.n_splits, config.n_skills
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        if site.in_features % splits or site.out_features % splits:
            widths = f"{site.in_features} and {site.out_features}"
            raise wrong("n_splits", splits, f"it must divide the widths {widths} of {site.name}")
        key = f"{PREFIX}{site.name}.poly_"
        shapes[f"{key}lora_A"] = (splits, skills, site.in_features // splits, config.r)
        shapes[f"{key}lora_B"] = (splits, skills, config.r, site.out_features // splits)
        shapes[f"{key}router.module_logits"] = (tasks, splits * skills)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".poly_", base))
    return Program(
        kind="poly",
        sites={site.name: _read(checkpoint, config, site) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        tasks=tasks,
    )


def _read(checkpoint: Checkpoint, config: Honoured, site: Site) -> SiteProgram:
    key = f"{PREFIX}{site.name}.poly_"
    logits = checkpoint.read(f"{key}router.module_logits")[checkpoint.task]
    gates = logits.sigmoid().view(config.n_splits, config.n_skills)
    weights = gates / (gates.sum(-1, keepdim=True) + _EPSILON)
    a = torch.einsum("qs,qsdr->rqd", weights, checkpoint.read(f"{key}lora_A")).reshape(config.r, -1)
    b = torch.einsum("qs,qsrd->rqd", weights, checkpoint.read(f"{key}lora_B")).reshape(config.r, -1)
    return low_rank(site, a, b / config.r)
