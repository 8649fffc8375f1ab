"""Cases of VeRA, PVeRA, VB-LoRA, Uni-LoRA, TinyLoRA, Poly, PEANuT and DEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft import (
    DeftConfig,
    PeanutConfig,
    PolyConfig,
    PveraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

from veneer.training.conformance.cases import peft_case
from veneer.training.conformance.cases_lora import ALL_LINEAR, ATTENTION

_BANK: dict[str, Any] = {"num_vectors": 20, "vector_length": 16}


def _randomize_theta(model: Any) -> None:
    """Each entry of A and B is one of θ_d divided by a root of how often it is used, so θ_d must be large."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)


CASES = [
    peft_case("VERA", "", lambda model: VeraConfig(r=16, target_modules=ATTENTION)),
    peft_case("VERA", "all-linear", lambda model: VeraConfig(r=16, target_modules="all-linear")),
    peft_case(
        "VERA",
        "save_projection=False",
        lambda model: VeraConfig(
            r=16, target_modules=ALL_LINEAR, save_projection=False, projection_prng_key=7
        ),
    ),
    peft_case("PVERA", "", lambda model: PveraConfig(r=16, target_modules=ATTENTION)),
    peft_case(
        "PVERA",
        "sample_at_inference",
        lambda model: PveraConfig(r=16, target_modules=ATTENTION, sample_at_inference=True),
        refused=True,
    ),
    peft_case("VBLORA", "", lambda model: VBLoRAConfig(r=4, target_modules=ALL_LINEAR, **_BANK)),
    peft_case(
        "VBLORA",
        "save_only_topk_weights",
        lambda model: VBLoRAConfig(
            r=4, topk=3, target_modules=ATTENTION, save_only_topk_weights=True, **_BANK
        ),
    ),
    peft_case(
        "UNILORA",
        "",
        lambda model: UniLoraConfig(r=4, theta_d_length=300, target_modules=ALL_LINEAR),
        randomize=_randomize_theta,
    ),
    peft_case(
        "UNILORA",
        "save_indices",
        lambda model: UniLoraConfig(r=4, theta_d_length=300, target_modules=ATTENTION, save_indices=True),
        randomize=_randomize_theta,
    ),
    peft_case("TINYLORA", "", lambda model: TinyLoraConfig(r=4, u=16, target_modules=ALL_LINEAR)),
    peft_case(
        "TINYLORA",
        "tied, save_projection=False",
        lambda model: TinyLoraConfig(
            r=4, u=16, target_modules=ALL_LINEAR, weight_tying=0.5, save_projection=False
        ),
    ),
    peft_case(
        "POLY",
        "",
        lambda model: PolyConfig(
            r=4, n_skills=3, n_splits=2, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"
        ),
        task=0,
    ),
    peft_case(
        "POLY",
        "first of two tasks",
        lambda model: PolyConfig(r=4, n_tasks=2, target_modules=ATTENTION, task_type="CAUSAL_LM"),
        task=0,
    ),
    peft_case(
        "POLY",
        "last of three tasks",
        lambda model: PolyConfig(
            r=4, n_tasks=3, n_skills=2, n_splits=4, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"
        ),
        task=2,
    ),
    peft_case("PEANUT", "", lambda model: PeanutConfig(r=4, target_modules=ATTENTION)),
    peft_case(
        "PEANUT",
        "deep",
        lambda model: PeanutConfig(r=4, depth=2, act_fn="silu", scaling=2.0, target_modules=ALL_LINEAR),
    ),
    peft_case("DEFT", "", lambda model: DeftConfig(r=4, target_modules=ATTENTION)),
    peft_case(
        "DEFT",
        "qr, alpha",
        lambda model: DeftConfig(r=4, alpha=8, decomposition_method="qr", target_modules=ALL_LINEAR),
    ),
    peft_case("DEFT", "para", lambda model: DeftConfig(r=4, para=True, target_modules=ATTENTION)),
]
