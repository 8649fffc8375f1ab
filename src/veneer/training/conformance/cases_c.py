"""Cases of the sparse, circulant, spectral and scaled-base methods, and of LORA's variants."""

from __future__ import annotations

from typing import Any

import torch
from peft import (
    C3AConfig,
    FourierFTConfig,
    GloraConfig,
    HiraConfig,
    LoraConfig,
    ShiraConfig,
    SupertuningConfig,
    WaveFTConfig,
)
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig

from veneer.training.conformance.cases import peft_case

TARGETS = ["q_proj", "v_proj", "down_proj"]
BLOCKS = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=4)


def randomize_lora(model: Any) -> None:
    """Move every factor, also those that training leaves as they start."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


CASES = [
    peft_case("C3A", "", lambda model: C3AConfig(block_size=16, target_modules=TARGETS)),
    peft_case(
        "C3A",
        "block_size_pattern",
        lambda model: C3AConfig(block_size=32, block_size_pattern={"v_proj": 8}, target_modules=TARGETS),
    ),
    peft_case("FOURIERFT", "", lambda model: FourierFTConfig(n_frequency=200, target_modules=TARGETS)),
    peft_case(
        "FOURIERFT",
        "n_frequency_pattern",
        lambda model: FourierFTConfig(
            n_frequency=200, n_frequency_pattern={"v_proj": 12}, random_loc_seed=5, target_modules=TARGETS
        ),
    ),
    peft_case("GLORA", "", lambda model: GloraConfig(r=4, target_modules=TARGETS)),
    peft_case("GLORA", "vector", lambda model: GloraConfig(config_A_B="vector", target_modules=TARGETS)),
    peft_case("GLORA", "constant", lambda model: GloraConfig(config_A_B="constant", target_modules=TARGETS)),
    peft_case("HIRA", "", lambda model: HiraConfig(r=4, target_modules=TARGETS)),
    peft_case("SHIRA", "", lambda model: ShiraConfig(r=4, target_modules=TARGETS, random_seed=0)),
    peft_case("SUPERTUNING", "", lambda model: SupertuningConfig(sparsity=0.9, target_modules=TARGETS)),
    peft_case(
        "SUPERTUNING",
        "Supra",
        lambda model: SupertuningConfig(sparsity=0.9, r=4, lora_alpha=8, target_modules=TARGETS),
    ),
    peft_case("WAVEFT", "", lambda model: WaveFTConfig(n_frequency=200, target_modules=TARGETS)),
    peft_case(
        "WAVEFT",
        "db2",
        lambda model: WaveFTConfig(n_frequency=200, wavelet_family="db2", target_modules=TARGETS),
    ),
    peft_case(
        "WAVEFT",
        "no transform",
        lambda model: WaveFTConfig(n_frequency=200, use_idwt=False, target_modules=TARGETS),
    ),
    peft_case(
        "WAVEFT",
        "proportional",
        lambda model: WaveFTConfig(n_frequency=200, proportional_parameters=True, target_modules=TARGETS),
    ),
    peft_case(
        "LORA",
        "BD-LoRA",
        lambda model: LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], use_bdlora=BLOCKS),
    ),
    peft_case(
        "LORA",
        "MiCA",
        lambda model: LoraConfig(r=8, target_modules=TARGETS, init_lora_weights="mica"),
        randomize=randomize_lora,
    ),
    peft_case(
        "LORA",
        "VeLoRA",
        lambda model: LoraConfig(r=8, target_modules=TARGETS, velora_config=VeloraConfig(num_groups=4)),
    ),
    peft_case(
        "LORA",
        "MonteCLoRA",
        lambda model: LoraConfig(r=8, target_modules=TARGETS, monteclora_config=MontecloraConfig()),
    ),
]
