"""Cases of AdaLoRA, LoHa, LoKr, DeLoRA, GraLoRA, HRA, MiSS and RandLoRA."""

from __future__ import annotations

from typing import Any

from peft import (
    AdaLoraConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    RandLoraConfig,
    get_peft_model,
)

from veneer.training.conformance.cases import Case, adapter_name, peft_case
from veneer.training.conformance.cases_lora import ALL_LINEAR, ATTENTION

_PATTERNS = {"v_proj": 2, "layers.0.self_attn.q_proj": 3}


def _pruned(model: Any) -> Any:
    """AdaLoRA as it is after its ranks were allocated: some layers lose ranks, one loses all."""
    name = adapter_name("ADALORA pruned")
    config = AdaLoraConfig(init_r=6, lora_alpha=12, total_step=10, target_modules=ATTENTION)
    adapted = get_peft_model(model, config, adapter_name=name)
    q, v = (f"model.layers.1.self_attn.{layer}.lora_E.{name}" for layer in ATTENTION)
    config.rank_pattern = {q: [True, False, True, True, False, False], v: [False] * 6}
    return adapted


CASES = [
    peft_case(
        "ADALORA",
        "",
        lambda model: AdaLoraConfig(init_r=6, total_step=10, target_modules=[*ATTENTION, "lm_head"]),
    ),
    Case("ADALORA pruned", "ADALORA", _pruned),
    peft_case("LOHA", "", lambda model: LoHaConfig(r=4, alpha=8, target_modules=ALL_LINEAR)),
    peft_case(
        "LOHA",
        "patterns",
        lambda model: LoHaConfig(
            r=4, rank_pattern=_PATTERNS, alpha_pattern={"v_proj": 20}, target_modules=ATTENTION
        ),
    ),
    peft_case("LOKR", "w2 of low rank", lambda model: LoKrConfig(r=2, alpha=4, target_modules=ATTENTION)),
    peft_case(
        "LOKR",
        "both of low rank",
        lambda model: LoKrConfig(r=2, alpha=4, decompose_both=True, target_modules=ALL_LINEAR),
    ),
    peft_case(
        "LOKR",
        "whole factors",
        lambda model: LoKrConfig(r=64, alpha=64, decompose_factor=4, target_modules=["k_proj", "down_proj"]),
    ),
    peft_case(
        "LOKR",
        "patterns",
        lambda model: LoKrConfig(
            r=4,
            rank_pattern=_PATTERNS,
            alpha_pattern={"v_proj": 9},
            init_weights="lycoris",
            target_modules=ATTENTION,
        ),
    ),
    peft_case("DELORA", "", lambda model: DeloraConfig(r=4, delora_lambda=3, target_modules=ALL_LINEAR)),
    peft_case(
        "DELORA",
        "patterns",
        lambda model: DeloraConfig(
            r=8,
            delora_lambda=3,
            rank_pattern=_PATTERNS,
            lambda_pattern={"v_proj": 5},
            target_modules=ATTENTION,
        ),
    ),
    peft_case("GRALORA", "", lambda model: GraloraConfig(r=8, alpha=16, target_modules=ALL_LINEAR)),
    peft_case(
        "GRALORA",
        "hybrid, k = 4",
        lambda model: GraloraConfig(r=8, hybrid_r=3, gralora_k=4, alpha=22, target_modules=ATTENTION),
    ),
    peft_case("HRA", "", lambda model: HRAConfig(r=4, target_modules=ALL_LINEAR)),
    peft_case("HRA", "apply_GS", lambda model: HRAConfig(r=4, apply_GS=True, target_modules=ATTENTION)),
    peft_case("MISS", "", lambda model: MissConfig(r=8, target_modules=ALL_LINEAR)),
    peft_case("MISS", "r does not divide", lambda model: MissConfig(r=7, target_modules=ATTENTION)),
    peft_case(
        "MISS", "mini", lambda model: MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=ATTENTION)
    ),
    peft_case("MISS", "bat", lambda model: MissConfig(r=8, init_weights="bat", target_modules=ATTENTION)),
    peft_case(
        "RANDLORA",
        "",
        lambda model: RandLoraConfig(r=10, randlora_alpha=10, target_modules=["q_proj", "v_proj"]),
    ),
    peft_case(
        "RANDLORA",
        "bases drawn again",
        lambda model: RandLoraConfig(
            r=8,
            randlora_alpha=8,
            save_projection=False,
            projection_prng_key=7,
            target_modules=["k_proj", "up_proj", "down_proj"],
        ),
    ),
    peft_case(
        "RANDLORA",
        "sparse",
        lambda model: RandLoraConfig(r=16, randlora_alpha=16, sparse=True, target_modules=ATTENTION),
    ),
    peft_case(
        "RANDLORA",
        "very sparse, drawn again",
        lambda model: RandLoraConfig(
            r=16, randlora_alpha=16, very_sparse=True, save_projection=False, target_modules=ATTENTION
        ),
    ),
]
