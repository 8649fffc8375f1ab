"""The random models: in memory and on disk they have the same shapes, and what is on disk can be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.models import (
    RANK,
    adapter_bytes,
    kv_token_bytes,
    linear_shapes,
    llama_config,
    random_adapters,
    random_base,
    random_checkpoint,
    random_program,
    write_subword_tokenizer,
)
from tokenizers import Tokenizer

from veneer.adapters.registry import lower
from veneer.engine.base import load_base
from veneer.engine.source import check_folder
from veneer.server.text import TextTokenizer


def test_shapes_of_8b() -> None:
    config = llama_config()
    assert sum(n * k for n, k in linear_shapes(config).values()) == 218_103_808  # of one layer
    assert adapter_bytes(config, 2) == 83_886_080
    assert kv_token_bytes(config, 2) == 131_072


def test_memory_and_disk_agree(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "base", shapes="tiny")
    loaded = load_base(
        check_folder(folder), quantization="nf4", dtype=torch.float32, device=torch.device("cpu")
    )
    made = random_base(shapes="tiny")
    assert dict(loaded.sites) == dict(made.sites)
    assert loaded.eos_token_ids == ()
    adapters = random_adapters(tmp_path / "adapters", 2, shapes="tiny")
    for adapter in adapters:
        program = lower(adapter, loaded, RANK)
        assert program.num_bytes(4) == random_program(made).num_bytes(4)
        assert program.num_bytes(4) == adapter_bytes(made.config, 4)
    first, second = ((adapter / "adapter_model.safetensors").read_bytes() for adapter in adapters)
    assert first != second


def test_each_word_is_a_token(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(random_checkpoint(tmp_path, shapes="tiny"))
    assert tokenizer.encode("w5 w0 w511", add_special_tokens=True) == [5, 0, 511]
    assert tokenizer.token_bytes(511) == b" w511"


@pytest.mark.model
@pytest.mark.parametrize("size", [512, 49_152, 60_000])
def test_a_tokenizer_of_any_size(tmp_path: Path, size: int) -> None:
    tokenizer = Tokenizer.from_file(str(write_subword_tokenizer(tmp_path, size) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size
    text = '{"the pilot": [1, true]}'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_checkpoint_is_made_once(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, layers=1, shapes="tiny")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    random_checkpoint(tmp_path, layers=1, shapes="tiny")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 1
