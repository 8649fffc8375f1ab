"""PEFT's prompt methods against PEFT: the virtual tokens that the file holds give PEFT's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods import (
    cartridge,
    cpt,
    multitask_prompt_tuning,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
)
from veneer.adapters.methods.base import Method
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import Program
from veneer.errors import AdapterRefused

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
LOWER: dict[str, Method] = {
    "CARTRIDGE": cartridge.lower,
    "CPT": cpt.lower,
    "MULTITASK_PROMPT_TUNING": multitask_prompt_tuning.lower,
    "PREFIX_TUNING": prefix_tuning.lower,
    "PROMPT_TUNING": prompt_tuning.lower,
    "P_TUNING": p_tuning.lower,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(**CAUSAL),
    "prefix of one token": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
    "prefix with projection": lambda: PrefixTuningConfig(
        **CAUSAL, prefix_projection=True, encoder_hidden_size=24
    ),
    "cartridge": lambda: CartridgeConfig(**CAUSAL, num_frozen_tokens=2),
    "prompt": lambda: PromptTuningConfig(**CAUSAL),
    "prompt from the vocabulary": lambda: PromptTuningConfig(**CAUSAL, prompt_tuning_init="SAMPLE_VOCAB"),
    "P-tuning by an MLP": lambda: PromptEncoderConfig(**CAUSAL, encoder_hidden_size=24),
    "P-tuning by an LSTM": lambda: PromptEncoderConfig(**CAUSAL, encoder_reparameterization_type="LSTM"),
    "multitask": lambda: MultitaskPromptTuningConfig(**CAUSAL),
    "multitask of rank 3": lambda: MultitaskPromptTuningConfig(**CAUSAL, num_ranks=3),
    "CPT": lambda: CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[3, 4, 5, 9],
        cpt_mask=[1, 1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3, 4],
        opt_projection_epsilon=5.0,
        opt_projection_format_epsilon=5.0,
    ),
}
KV = {"prefix", "prefix of one token", "prefix with projection", "cartridge"}


@dataclass(frozen=True)
class LlamaBase:
    """What these methods ask about `tiny_llama`."""

    num_layers: int = 2
    num_kv_heads: int = 2
    head_dim: int = 16
    hidden_size: int = 64


def save(model: Any, config: Any, folder: Path) -> None:
    """Let PEFT make and save an adapter with random values."""
    made = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn_like(parameter)
    made.save_pretrained(folder)


def peft_logits(model: Any, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    loaded = PeftModel.from_pretrained(model, folder).eval()
    tasks = {"task_ids": torch.tensor([0])} if "MULTITASK" in str(loaded.active_peft_config.peft_type) else {}
    logits: torch.Tensor = loaded(tokens, **tasks).logits
    return logits[:, -tokens.shape[1] :]


def logits_of(model: Any, program: Program, tokens: torch.Tensor) -> torch.Tensor:
    """What a plain model says after the virtual tokens."""
    prompt = program.prompt
    assert prompt is not None
    if prompt.kv is not None:
        assert prompt.embeddings is None
        cache = DynamicCache(
            [(keys.transpose(0, 1)[None], values.transpose(0, 1)[None]) for keys, values in prompt.kv]
        )
        found: torch.Tensor = model(tokens, past_key_values=cache).logits
        return found
    assert prompt.embeddings is not None
    embedded = model.get_input_embeddings()(tokens)
    logits: torch.Tensor = model(inputs_embeds=torch.cat([prompt.embeddings[None], embedded], 1)).logits
    return logits[:, prompt.tokens :]


def lower(folder: Path, base: Any = LlamaBase()) -> Program:
    checkpoint = Checkpoint(folder)
    return LOWER[checkpoint.config["peft_type"]](checkpoint, base, 64)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_pefts(
    name: str, make_llama: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    save(make_llama(), CONFIGS[name](), tmp_path)
    with torch.no_grad():
        program = lower(tmp_path)
        plain = make_llama()(tokens).logits
        expected = peft_logits(make_llama(), tmp_path, tokens)
        found = logits_of(make_llama(), program, tokens)
    scale = expected.abs().max()
    assert (plain - expected).abs().max() > 1e-2 * scale, "the adapter must matter"
    assert (found - expected).abs().max() < 1e-5 * scale
    assert program.prompt is not None
    assert program.primitives == (("kv_prefix",) if name in KV else ("embedding_prefix",))
    assert program.prompt.shape == (2, 2, {"prefix of one token": 1, "CPT": 4}.get(name, 5), 2, 16)
    assert not program.is_identity
    assert program.portability == "independent"
    each = 128 if name in KV else 128 + 64  # numbers of a token
    assert program.num_bytes(4) == 4 * each * program.prompt.tokens


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("prefix", {"num_virtual_tokens": 0}, "at least one virtual token"),
        ("prefix", {"num_virtual_tokens": None}, "at least one virtual token"),
        ("prefix", {"num_virtual_tokens": 6}, "[5, 128]"),
        ("prefix", {"num_virtual_tokens": 10**15}, "[5, 128]"),
        ("prefix", {"token_dim": 64}, "token_dim = 64"),
        ("prefix", {"num_layers": 3}, "num_layers = 3"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads = 4"),
        ("prefix", {"num_transformer_submodules": 2}, "num_transformer_submodules = 2"),
        ("prefix", {"task_type": None}, "task_type = null"),
        ("prefix", {"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
        ("prefix", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("prefix", {"prefix_offset": 3}, "unknown fields 'prefix_offset'"),
        ("cartridge", {"num_frozen_tokens": "two"}, "num_frozen_tokens"),
        ("prompt", {"token_dim": 32}, "token_dim = 32"),
        ("prompt", {"num_virtual_tokens": 4}, "[5, 64]"),
        ("multitask", {"num_tasks": 2}, "[2, 5, 1]"),
        ("multitask", {"num_tasks": 0}, "from 1 to 256"),
        ("multitask", {"num_tasks": 257}, "num_tasks = 257"),
        ("multitask", {"num_ranks": 0}, "num_ranks = 0"),
        ("multitask", {"num_ranks": 2}, "[1, 5, 1]"),
        ("CPT", {"num_virtual_tokens": 5}, "num_virtual_tokens = 5"),
        ("CPT", {"cpt_token_ids": [1, 2], "num_virtual_tokens": 2}, "[4, 64]"),
    ],
)
def test_config_is_honoured_or_refused(
    name: str, changes: dict[str, Any], word: str, make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    save(make_llama(), CONFIGS[name](), tmp_path)
    config = tmp_path / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(AdapterRefused) as error:
        lower(tmp_path)
    assert word in error.value.message


@pytest.mark.parametrize("name", ["prefix", "prompt", "multitask"])
def test_other_tensors_are_refused(name: str, make_llama: Callable[..., Any], tmp_path: Path) -> None:
    save(make_llama(), CONFIGS[name](), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(96, 64)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match="1 tensor cannot be served"):
        lower(tmp_path)
    renamed = {key.replace("prompt_", "prefix_"): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match="1 tensor missing"):
        lower(tmp_path)
    save_file(tensors | {"prompt_embeddings": tensors["prompt_embeddings"] / 0}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match="NaN or infinite"):
        lower(tmp_path)


def test_another_base_is_refused(make_llama: Callable[..., Any], tmp_path: Path) -> None:
    save(make_llama(), CONFIGS["prefix"](), tmp_path)
    for base in (LlamaBase(num_layers=4), LlamaBase(num_kv_heads=4), LlamaBase(head_dim=32)):
        with pytest.raises(AdapterRefused, match="train on this base"):
            lower(tmp_path, base)
