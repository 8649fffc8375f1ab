"""Cases of what replaces or extends the embedding and the output head: tokens' rows, LoRA on the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.training.conformance.cases import Case, peft_case

ATTENTION = ["q_proj", "v_proj"]
TOKENS = [7, 5, 64, 90, 9]  # in the prompt and among the tokens that follow it


def _last_layer(model: Any) -> Any:
    """Layer-wise training: the weights of the last decoder layer and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("model.layers.1.")
    return model


def _save_trained(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    save_file(
        {f"base_model.model.{name}": each.data for name, each in trained.items()}, folder / WEIGHTS_FILE
    )
    config = {"peft_type": "PARTIAL", "modules_to_save": ["layers.1"]}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def _load_trained(model: Any, folder: Path) -> Any:
    for key, tensor in load_file(folder / WEIGHTS_FILE).items():
        model.get_parameter(key.removeprefix("base_model.model.")).data.copy_(tensor)
    return model


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
        "modules_to_save lm_head, embed_tokens",
        lambda model: LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"]),
    ),
    peft_case(
        "LORA",
        "modules_to_save linear layers and norms",
        lambda model: LoraConfig(
            r=4,
            target_modules=ATTENTION,
            modules_to_save=["o_proj", "layers.1.mlp.down_proj", "input_layernorm", "model.norm"],
        ),
    ),
    peft_case(
        "IA3",
        "modules_to_save",
        lambda model: IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            modules_to_save=["input_layernorm", "gate_proj"],
        ),
    ),
    Case("PARTIAL the last layer", "PARTIAL", _last_layer, save=_save_trained, load=_load_trained),
    peft_case(
        "LORA",
        "embed_tokens with DoRA",
        lambda model: LoraConfig(r=4, use_dora=True, target_modules=[*ATTENTION, "embed_tokens"]),
        refused=True,
    ),
]
