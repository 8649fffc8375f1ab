"""Cases of LORA: the plain method and the options of its config that decide what it computes."""

from __future__ import annotations

from peft import LoraConfig

from veneer.training.conformance.cases import peft_case

ATTENTION = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = [
    peft_case("LORA", "", lambda model: LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION)),
    peft_case("LORA", "all-linear", lambda model: LoraConfig(r=4, target_modules="all-linear")),
    peft_case(
        "LORA",
        "rsLoRA, patterns",
        lambda model: LoraConfig(
            r=8,
            use_rslora=True,
            rank_pattern={"v_proj": 2, "layers.0.self_attn.q_proj": 5},
            alpha_pattern={"layers.1.mlp.down_proj": 20},
            target_modules=[*ATTENTION, "down_proj"],
        ),
    ),
    peft_case(
        "LORA",
        "layers_to_transform",
        lambda model: LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION, layers_to_transform=[1]),
    ),
    peft_case("LORA", "lora_bias", lambda model: LoraConfig(r=8, target_modules=ALL_LINEAR, lora_bias=True)),
    # Invoked in the second page of one prompt and in the first of the other, so the base's page comes before.
    peft_case(
        "LORA",
        "aLoRA",
        lambda model: LoraConfig(
            r=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM", alora_invocation_tokens=[14, 1]
        ),
    ),
    peft_case("LORA", "lm_head", lambda model: LoraConfig(r=8, target_modules=[*ATTENTION, "lm_head"])),
    peft_case(
        "LORA",
        "PiSSA, unconverted",
        lambda model: LoraConfig(r=8, target_modules=ATTENTION, init_lora_weights="pissa"),
        refused=True,
    ),
]
