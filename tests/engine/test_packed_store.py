"""The packed base written and read again: whole tiny models, to the bit, and everything that may go wrong."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Phi3Config

from veneer.engine import base, packed_store
from veneer.engine.base import forbid_repacking, quantization_config
from veneer.engine.layers import ATTENTION_NAME
from veneer.engine.packed import PackedLinear
from veneer.engine.packed_store import load_packed, store_path

CPU = torch.device("cpu")
ARCHITECTURES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3", "phi3"]
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the packed bases of the test."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint that the test may change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "checkpoint"))


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def quantize(folder: Path) -> nn.Module:
    """The checkpoint as a first start loads it, with biases that matter."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantization_config("nf4", torch.float32),
        attn_implementation=ATTENTION_NAME,
    )
    forbid_repacking(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


def never() -> nn.Module:
    raise AssertionError("the checkpoint was loaded although its packed form is in the cache")


class Loaded:
    """One start: the model with its packed linears in place."""

    model: Any

    def __init__(self, folder: Path, make: Callable[[], nn.Module] | None = None, config: Any = None) -> None:
        self.notes: list[str] = []
        self.made = 0

        def count() -> nn.Module:
            self.made += 1
            return quantize(folder)

        config = config or AutoConfig.from_pretrained(folder)
        self.model, self.replaced = load_packed(folder, config, torch.float32, CPU, make or count, self.notes)
        for name, module in self.replaced.items():
            parent, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, module)
        self.model.set_attn_implementation("sdpa")  # ours needs the engine's step

    def logits(self) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.arange(3, 40)[None]).logits
        return logits

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


def same(first: Loaded, second: Loaded) -> bool:
    a, b = first.tensors(), second.tensors()
    assert a.keys() == b.keys()
    equal = all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    return equal and torch.equal(first.logits(), second.logits())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_start_gives_the_same_bits(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(architecture)
    first = Loaded(folder)
    second = Loaded(folder, never)
    assert same(first, second)
    assert first.made == 1
    assert first.notes == second.notes == []
    assert list(first.replaced) == list(second.replaced)
    assert sum(isinstance(module, PackedLinear) for module in second.model.modules()) == 3 * 4
    assert not any(parameter.requires_grad for parameter in second.model.parameters())
    assert not second.model.training


def test_tied_embeddings_are_tied_again(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama-tied")
    Loaded(folder)
    model = Loaded(folder, never).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = tiny_model("llama")
    Loaded(untied)
    model = Loaded(untied, never).model
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            **SMALL,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        LlamaConfig(
            **SMALL,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        Phi3Config(
            **SMALL,
            original_max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [2.0 + i / 8 for i in range(8)],
            },
        ),
    ],
    ids=["llama3", "yarn", "longrope"],
)
def test_scaled_rotary_frequencies_are_kept(config: Any, tmp_path: Path) -> None:
    folder = save(config, tmp_path / "model")
    first, second = Loaded(folder), Loaded(folder, never)
    assert same(first, second)
    rotary = [loaded.model.model.rotary_emb for loaded in (first, second)]
    assert rotary[0].attention_scaling == rotary[1].attention_scaling
    assert rotary[1].inv_freq.dtype == torch.float32


def test_other_readers_of_safetensors_can_open_it(checkpoint: Path) -> None:
    tensors = Loaded(checkpoint).tensors()
    with safe_open(store_path(checkpoint), "pt") as file:
        found = file.get_tensor("model.layers.1.mlp.gate_proj.packed")
        assert torch.equal(found, tensors["model.layers.1.mlp.gate_proj.whole.packed"])


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: flip(path, -1), "1 of its tensors are damaged"),
        (lambda path: flip(path, path.stat().st_size // 2), "1 of its tensors are damaged"),
        (lambda path: flip(path, 0), "its header is damaged"),
        (lambda path: flip(path, 7), "its header is damaged"),  # a length of many petabytes
        (lambda path: flip(path, 40), "its header is damaged"),
        (lambda path: flip(path, 3000), "its header is damaged"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes and was written with"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes and was written with"),
        (lambda path: path.write_bytes(b""), "its header is damaged"),
        (lambda path: path.write_bytes(b"no tensors" * 100), "its header is damaged"),
    ],
)
def test_a_damaged_file_is_made_again(damage: Callable[[Path], Any], reason: str, checkpoint: Path) -> None:
    first = Loaded(checkpoint)
    damage(store_path(checkpoint))
    second = Loaded(checkpoint)
    assert second.made == 1
    assert [reason in note for note in second.notes] == [True]
    assert same(first, second)
    assert same(first, Loaded(checkpoint, never))


def test_a_file_of_another_model_is_not_taken(checkpoint: Path) -> None:
    Loaded(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    config.num_hidden_layers = 2
    second = Loaded(checkpoint, config=config)
    assert second.made == 1
    assert "it has linears that the model has not, first 'model.layers.2." in second.notes[0]


def change_weights(checkpoint: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)
    model.save_pretrained(checkpoint)
    return "weights"


def change_config(checkpoint: Path) -> str:
    path = checkpoint / "config.json"
    path.write_text(path.read_text() + "\n")
    return "config"


@pytest.mark.parametrize("change", [change_weights, change_config])
def test_a_changed_checkpoint_replaces_the_file(
    change: Callable[[Path], str], checkpoint: Path, cache: Path
) -> None:
    first = Loaded(checkpoint)
    changed = change(checkpoint)
    second = Loaded(checkpoint)
    assert second.made == 1
    assert second.notes == [
        f"the packed base in the cache was not used and is made again: it was made from other {changed}"
    ]
    assert same(first, second) == (change is change_config)
    assert same(second, Loaded(checkpoint, never))
    assert files(cache) == [store_path(checkpoint).name]


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("constant", ["LAYOUT_VERSION", "FILE_VERSION", "FUSED"])
def test_another_version_is_made_again(
    constant: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Loaded(checkpoint)
    other = () if constant == "FUSED" else 99
    monkeypatch.setattr(packed_store, constant, other)
    second = Loaded(checkpoint)
    assert second.made == 1
    assert f"made from other {'groups' if constant == 'FUSED' else 'versions'}" in second.notes[0]


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(checkpoint: Path, cache: Path) -> None:
    def make() -> nn.Module:
        model: nn.Module = quantize(checkpoint)
        os.utime(checkpoint / "model.safetensors")
        return model

    loaded = Loaded(checkpoint, make)
    assert "the checkpoint changed while it was read" in loaded.notes[0]
    assert not cache.exists()


def test_a_full_disk_is_noted_before_writing(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    first = Loaded(checkpoint)
    assert "each start quantizes the checkpoint again: the cache" in first.notes[0]
    assert "has 1 MiB free" in first.notes[0]
    assert files(cache) == []
    monkeypatch.undo()
    monkeypatch.setenv("VENEER_CACHE", str(cache.parent))
    second = Loaded(checkpoint)
    assert second.notes == []
    assert same(first, second)


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    loaded = Loaded(checkpoint)
    assert "No space left on device" in loaded.notes[0]
    assert files(cache) == []
    assert loaded.logits().isfinite().all()


def test_a_cache_that_cannot_be_written_is_noted(checkpoint: Path, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    loaded = Loaded(checkpoint)
    assert "the packed base is not kept" in loaded.notes[0]
    assert loaded.logits().isfinite().all()


def test_a_layer_that_cannot_be_packed_is_noted(tmp_path: Path, cache: Path) -> None:
    folder = save(LlamaConfig(**{**SMALL, "intermediate_size": 96}), tmp_path / "model")
    loaded = Loaded(folder)
    assert "2 linears cannot be packed, first 'model.layers.0.mlp.down_proj'" in loaded.notes[0]
    assert not cache.exists()


def test_starts_at_the_same_time_write_one_sound_file(checkpoint: Path, cache: Path) -> None:
    barrier = threading.Barrier(3)
    loaded: list[Loaded] = []
    lock = threading.Lock()

    def make() -> nn.Module:
        with lock:  # transformers loads one model at a time in a process
            model: nn.Module = quantize(checkpoint)
        barrier.wait(60)
        return model

    threads = [threading.Thread(target=lambda: loaded.append(Loaded(checkpoint, make))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [item.notes for item in loaded] == [[], [], []]
    assert files(cache) == [store_path(checkpoint).name]
    third = Loaded(checkpoint, never)
    assert all(same(item, third) for item in loaded)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import veneer.engine.tensor_file as tensor_file
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
tensor_file.write_tensors(Path(sys.argv[1]), {"x": torch.ones(1000)}, {})
"""


def test_a_killed_writer_leaves_no_file_and_the_next_one_cleans_up(checkpoint: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    path = store_path(checkpoint)
    child = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert [Path(name).suffix for name in files(cache)] == [".partial"]
    first = Loaded(checkpoint)
    assert first.notes == []
    assert files(cache) == [path.name]
    assert same(first, Loaded(checkpoint, never))


ON_GPU = pytest.param(
    "cuda",
    "bfloat16",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ON_GPU])
def test_an_engine_answers_the_same_after_a_second_start(
    device: str,
    dtype: str,
    architecture: str,
    tiny_model: Callable[[str], Path],
    make_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "packed_runs", lambda *arguments: True)  # on the CPU in torch's operations
    settings = {"device": device, "dtype": dtype, "quantization": "nf4", "nf4_kernels": "packed"}
    folder, prompt = tiny_model(architecture), list(range(3, 40))
    first = make_engine(folder, **settings)
    assert store_path(folder).exists()
    monkeypatch.setattr(base, "_load_model", lambda *arguments: never())
    second = make_engine(folder, **settings)
    a, b = (driver.engine.base for driver in (first, second))
    assert a.memory_bytes() == b.memory_bytes()
    assert list(a.sites.items()) == list(b.sites.items())
    assert a.notes == b.notes
    buffers = dict(b.model.named_buffers())
    for name, tensor in a.model.named_buffers():
        assert torch.equal(tensor, buffers[name]), name
    assert second.generate(prompt) == first.generate(prompt)
