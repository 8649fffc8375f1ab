"""Cases of what multiplies the base's inputs and outputs, or only adds to them: DoRA, IA3, OFT, BOFT, RoAd, …"""

from __future__ import annotations

from typing import Any

from peft import (
    BeftConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    RoadConfig,
)

from veneer.training.conformance.cases import Case, peft_case, randomize

ATTENTION = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _road(variant: str, **fields: Any) -> Case:
    return peft_case(
        "ROAD",
        variant,
        lambda model: RoadConfig(variant=variant, group_size=16, target_modules=ALL_LINEAR, **fields),
    )


def _strongly(model: Any) -> None:
    """For parameters of which a tenth would do little: skew-symmetric matrices, small norms."""
    for _ in range(3):
        randomize(model)


CASES = [
    peft_case(
        "LORA", "DoRA", lambda model: LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=ATTENTION)
    ),
    peft_case(
        "LORA",
        "DoRA, rsLoRA, all-linear",
        lambda model: LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules="all-linear"),
    ),
    peft_case(
        "IA3",
        "",
        lambda model: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        randomize=_strongly,
    ),
    peft_case(
        "IA3",
        "output scales",
        lambda model: IA3Config(target_modules=ALL_LINEAR, feedforward_modules=[]),
        randomize=_strongly,
    ),
    peft_case(
        "OFT",
        "",
        lambda model: OFTConfig(oft_block_size=8, target_modules=ALL_LINEAR),
    ),
    peft_case(
        "OFT",
        "exact Cayley",
        lambda model: OFTConfig(oft_block_size=16, use_cayley_neumann=False, target_modules=ATTENTION),
    ),
    peft_case(
        "OFT",
        "block_share",
        lambda model: OFTConfig(oft_block_size=16, block_share=True, target_modules=ALL_LINEAR),
    ),
    peft_case(
        "OFT",
        "by number of blocks",
        lambda model: OFTConfig(
            r=4, oft_block_size=0, num_cayley_neumann_terms=3, target_modules=["q_proj", "o_proj"]
        ),
    ),
    peft_case(
        "OFT",
        "COFT",
        lambda model: OFTConfig(oft_block_size=8, coft=True, eps=0.5, target_modules=ALL_LINEAR),
        randomize=_strongly,
    ),
    peft_case(
        "BOFT",
        "",
        lambda model: BOFTConfig(boft_block_size=4, target_modules=ALL_LINEAR),
        randomize=_strongly,
    ),
    peft_case(
        "BOFT",
        "by number of blocks",
        lambda model: BOFTConfig(boft_block_size=0, boft_block_num=8, target_modules=ATTENTION),
        randomize=_strongly,
    ),
    _road("road_1"),
    _road("road_2"),
    _road("road_4"),
    peft_case("BEFT", "", lambda model: BeftConfig(target_modules=["v_proj"]), randomize=_strongly),
    peft_case(
        "LN_TUNING",
        "",
        lambda model: LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
        randomize=_strongly,
    ),
]
