"""Adapters merged into a checkpoint: transformers loads it and gives what PEFT gives, and the checkpoint stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    ShiraConfig,
)
from tests.engine.adapters import load, save_random
from transformers import AutoModelForCausalLM

from veneer.engine import into_base
from veneer.engine.checkpoint_base import open_base
from veneer.engine.into_base import merge_into_base
from veneer.errors import AdapterRefused, Conflict, InvalidRequest

LAYERS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=LAYERS),
    "ia3": lambda: IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=LAYERS),
    "shira": lambda: ShiraConfig(r=4, target_modules=LAYERS),
    "norms": lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "whole": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["v_proj", "lm_head"]),
    "embedding": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "tokens": lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 9]),
    "head": lambda: LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
    "bias": lambda: LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "alora": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
    ),
}
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 27, 81, 5, 3]])


@pytest.fixture(scope="module")
def adapters(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A function: architecture and name of a config -> the folder of an adapter."""
    root = tmp_path_factory.mktemp("adapters")

    def make(architecture: str, name: str) -> Path:
        folder = root / architecture / name
        if not folder.exists():
            save_random(folder, load(tiny_model(architecture)), CONFIGS[name](), seed=len(name), strength=0.1)
        return folder

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(PROMPT).logits[0]
    return found


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(("llama", name) for name in CONFIGS if name not in ("bias", "prefix", "alora")),
        *(("llama-tied", name) for name in ("lora", "embedding", "tokens", "head")),
        *(("gemma3", name) for name in ("lora", "embedding", "tokens")),
        ("qwen2", "bias"),
        ("qwen3", "dora"),
    ],
)
def test_transformers_loads_what_peft_computes(
    tiny_model: Callable[[str], Path],
    adapters: Callable[[str, str], Path],
    tmp_path: Path,
    architecture: str,
    name: str,
) -> None:
    model, folder = tiny_model(architecture), adapters(architecture, name)
    before = files_of(model)
    report = merge_into_base([folder], [1.0], model, tmp_path / "merged")
    assert 0 < report.changed < report.tensors
    expected = logits(PeftModel.from_pretrained(load(model), folder).eval())
    merged = load(tmp_path / "merged")
    assert (logits(merged) - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (logits(merged) - logits(load(model))).abs().max() > 1e-3 * expected.abs().max()
    assert files_of(model) == before, "the base's checkpoint is only read"
    assert files_of(tmp_path / "merged").keys() == before.keys()


def test_weights_add_up(
    tiny_model: Callable[[str], Path], adapters: Callable[[str, str], Path], tmp_path: Path
) -> None:
    model, weights = tiny_model("llama"), {"lora": 0.5, "dora": -0.5, "boft": 1.0}
    folders = [adapters("llama", name) for name in weights]
    merge_into_base(folders, list(weights.values()), model, tmp_path / "merged")
    own, found = load(model).state_dict(), load(tmp_path / "merged").state_dict()
    expected = {key: value.double() for key, value in own.items()}
    for folder, weight in zip(folders, weights.values(), strict=True):
        alone = PeftModel.from_pretrained(load(model).double(), folder).merge_and_unload().state_dict()
        expected = {key: total + weight * (alone[key] - own[key].double()) for key, total in expected.items()}
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 1e-5, key


def test_shards_and_their_dtype_stay(
    tiny_model: Callable[[str], Path], adapters: Callable[[str, str], Path], tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama-tied"), dtype=torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    (sharded / "tokenizer.json").write_text("{}")
    folder = adapters("llama-tied", "head")
    merge_into_base([folder], [1.0], sharded, tmp_path / "merged")
    assert files_of(tmp_path / "merged").keys() == files_of(sharded).keys()
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight.data_ptr() != merged.model.embed_tokens.weight.data_ptr()
    peft = PeftModel.from_pretrained(model.float(), folder).eval()
    expected = peft.base_model.model.lm_head
    weight = expected.base_layer.weight + expected.get_delta_weight("default")
    torch.testing.assert_close(merged.lm_head.weight, weight.bfloat16(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(merged.model.embed_tokens.weight, model.model.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("prefix", "virtual tokens"),
        ("alora", "acts on some tokens"),
        ("bias", r"changes model\.layers\.0\.self_attn\.q_proj\.bias, which the base does not have"),
    ],
)
def test_what_is_no_change_of_the_weights_is_refused(
    tiny_model: Callable[[str], Path],
    adapters: Callable[[str, str], Path],
    tmp_path: Path,
    name: str,
    why: str,
) -> None:
    with pytest.raises(AdapterRefused, match=why):
        merge_into_base([adapters("llama", name)], [1.0], tiny_model("llama"), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(
    tiny_model: Callable[[str], Path], adapters: Callable[[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(Conflict, match="exists and is not overwritten"):
        merge_into_base([adapters("llama", "lora")], [1.0], tiny_model("llama"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_off_leaves_nothing(
    tiny_model: Callable[[str], Path],
    adapters: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any, **fields: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(into_base, "_copy_rest", fail)
    with pytest.raises(KeyboardInterrupt):
        merge_into_base([adapters("llama", "lora")], [1.0], tiny_model("llama"), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_single_adapters_tokenizer_goes_along(
    tiny_model: Callable[[str], Path], adapters: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in adapters("llama", "lora").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text("hello")
    merge_into_base([folder], [1.0], tiny_model("llama"), tmp_path / "one")
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "hello"
    merge_into_base([folder, folder], [1.0, 1.0], tiny_model("llama"), tmp_path / "two")
    assert not (tmp_path / "two" / "chat_template.jinja").exists()


def test_checkpoints_that_cannot_be_read_exactly_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(InvalidRequest, match="'gpt2' is not known exactly"):
        open_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="is not a readable safetensors file"):
        open_base(tmp_path)
