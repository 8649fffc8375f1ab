"""Fixtures that several rooms share: tiny random models in transformers' own formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = 11  # shorter than the prompts, no multiple of a page


def _tiny_config(architecture: str) -> Any:
    import transformers as tf

    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    match architecture:
        case "llama":
            return tf.LlamaConfig(**_COMMON)
        case "llama-tied":
            return tf.LlamaConfig(**_COMMON, tie_word_embeddings=True)
        case "mistral":
            return tf.MistralConfig(**_COMMON, sliding_window=_WINDOW)
        case "qwen2":
            return tf.Qwen2Config(
                **_COMMON, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1
            )
        case "qwen3":
            return tf.Qwen3Config(**_COMMON, head_dim=32)
        case "gemma3":
            return tf.Gemma3TextConfig(
                **_COMMON, head_dim=32, sliding_window=_WINDOW, layer_types=layers, query_pre_attn_scalar=32
            )
        case "phi3":
            return tf.Phi3Config(**_COMMON, sliding_window=_WINDOW)
    raise ValueError(architecture)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: architecture -> folder of a random float32 model of it, made once a session."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            import torch
            from transformers import AutoModelForCausalLM

            torch.manual_seed(hash_of(architecture))
            model = AutoModelForCausalLM.from_config(_tiny_config(architecture), dtype=torch.float32)
            for name, parameter in model.named_parameters():
                # Flat logits would make greedy ties likely; norms near their initial values hide scale errors.
                scale = 0.15 if parameter.ndim > 1 else 0.3
                if parameter.ndim > 1:
                    parameter.data.normal_(0, scale)
                elif "norm" in name:
                    parameter.data += torch.randn_like(parameter) * scale
            folder = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return make


def hash_of(text: str) -> int:
    return sum(map(ord, text))
