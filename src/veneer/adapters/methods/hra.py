"""PEFT's HRA: y = W0 (H_1 H_2 … H_r) x + b with Householder reflections H_i = I − 2 u_i u_iᵀ, u_i of length 1.

The product of the reflections is I − U T Uᵀ with an upper triangular T (the compact WY form), so
y += −(W0 U T)(Uᵀ x): a product of rank r. The inverse of T has 1/2 on its diagonal and Uᵀ U above it.
https://doi.org/10.1145/1141885.1141886 (Joffrain et al. 2006). With apply_GS peft orthonormalizes the u_i, one
after the other, before it uses I − 2 U Uᵀ.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/hra/layer.py

Keys are `base_model.model.<module>.hra_u` [in, r].
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
    read_fields,
)
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused

_LEAST_REST = (
    1e-4  # of a vector's length, orthogonal to those before it; with less, float32 leaves no direction
)


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["HRA"]
    r: int = 8
    apply_GS: bool = False


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT HRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "HRAConfig")
    warnings: list[str] = []
    check_rank(config.r, max_rank)
    sites = choose_sites(config, base, checkpoint.header, ".hra_", warnings)
    shapes: dict[str, tuple[int, ...]] = {
        f"{PREFIX}{site.name}.hra_u": (site.in_features, config.r) for site in sites
    }
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".hra_", base))
    return Program(
        kind="hra",
        sites={site.name: _read(checkpoint, base, site, config.apply_GS) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="proportional",
    )


def _read(checkpoint: Checkpoint, base: Base, site: Site, orthogonal: bool) -> SiteProgram:
    u = checkpoint.read(f"{PREFIX}{site.name}.hra_u").double()
    lengths = u.norm(dim=0)
    if not lengths.all():
        raise AdapterRefused(
            f"hra_u of {site.name}: a column is zero, which is no direction to reflect along."
        )
    u = u / lengths
    if orthogonal:
        u = _gram_schmidt(u, site)
        turned = 2 * u
    else:
        inverse = (u.T @ u).triu(1) + 0.5 * torch.eye(u.shape[1], dtype=u.dtype)
        turned = torch.linalg.solve_triangular(inverse, u, upper=True, left=False)  # U T
    return low_rank(site, u.T, -(base.weight(site.name).double() @ turned).T)


def _gram_schmidt(u: torch.Tensor, site: Site) -> torch.Tensor:
    """The columns of u [in, r], each of length 1, made orthonormal from left to right."""
    done = u[:, :0]
    for column in u.T:
        rest = column
        for _ in range(2):  # the second pass removes what rounding left by the first
            rest = rest - done @ (done.T @ rest)
        if rest.norm() < _LEAST_REST:
            raise AdapterRefused(
                f"hra_u of {site.name}: with apply_GS = true its columns must be linearly independent, column "
                f"{done.shape[1]} is not. PEFT computes rounding noise there; train with apply_GS=False."
            )
        done = torch.cat((done, (rest / rest.norm())[:, None]), dim=1)
    return done
