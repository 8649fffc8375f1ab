"""Cases of what replaces or extends the embedding and the output head: tokens' rows, LoRA on the embedding."""

from __future__ import annotations

from peft import LoraConfig, TrainableTokensConfig

from veneer.training.conformance.cases import peft_case

ATTENTION = ["q_proj", "v_proj"]
TOKENS = [7, 5, 64, 90, 9]  # in the prompt and among the tokens that follow it

CASES = [
    peft_case("TRAINABLE_TOKENS", "", lambda model: TrainableTokensConfig(token_indices=TOKENS)),
    peft_case(
        "TRAINABLE_TOKENS",
        "embedding and head",
        lambda model: TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens", "lm_head"]),
    ),
    peft_case(
        "LORA",
        "trainable_token_indices",
        lambda model: LoraConfig(r=4, target_modules=ATTENTION, trainable_token_indices=TOKENS),
    ),
    peft_case(
        "LORA",
        "trainable_token_indices of the head",
        lambda model: LoraConfig(
            r=4,
            target_modules=ATTENTION,
            trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [11, 83, 5]},
        ),
    ),
    peft_case(
        "LORA",
        "embed_tokens, lm_head",
        lambda model: LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, "embed_tokens", "lm_head"]),
    ),
    peft_case(
        "LORA",
        "embed_tokens, rsLoRA, patterns",
        lambda model: LoraConfig(
            r=4,
            use_rslora=True,
            target_modules=["embed_tokens", "v_proj"],
            rank_pattern={"embed_tokens": 7},
            alpha_pattern={"embed_tokens": 3},
        ),
    ),
    peft_case(
        "LORA",
        "embed_tokens with DoRA",
        lambda model: LoraConfig(r=4, use_dora=True, target_modules=[*ATTENTION, "embed_tokens"]),
        refused=True,
    ),
]
