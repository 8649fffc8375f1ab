"""The committed demo adapters: small, reproducible data, honest numbers, loadable, and they answer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from veneer.engine.source import DEFAULT_MODEL, resolve
from veneer.training.data.encoding import Encoded, Encoder
from veneer.training.data.rows import read_rows
from veneer.training.data.splitting import check_apart
from veneer.training.evaluation.metrics import exact_match
from veneer.training.recipe import read_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["negate", "past-tense", "reminder"]
LARGEST = 1_500_000  # bytes of an adapter's folder


def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", EXAMPLES / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_gives_the_committed_data(tmp_path: Path) -> None:
    make_data().main(tmp_path)
    committed = {path.name: path.read_bytes() for path in (EXAMPLES / "data").iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed
    assert sum(map(len, committed.values())) <= 200_000


@pytest.mark.parametrize("name", NAMES)
def test_held_out_rows_recombine_known_words(name: str) -> None:
    training = read_rows(EXAMPLES / "data" / f"{name}.train.jsonl")
    held_out = read_rows(EXAMPLES / "data" / f"{name}.test.jsonl")
    check_apart(training, held_out)
    known = {word for row in training for word in f"{row.prompt[0].content} {row.answer}".split()}
    unknown = {word for row in held_out for word in f"{row.prompt[0].content} {row.answer}".split()} - known
    assert unknown == set()


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_complete_and_small(name: str) -> None:
    files = {path.name: path.stat().st_size for path in (EXAMPLES / name).iterdir()}
    assert set(files) - {"data.png", "evaluation.html"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.yaml",
        "report.json",
        "loss.csv",
        "loss.png",
        "README.md",
    }
    assert sum(files.values()) <= LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_the_report_is_of_this_recipe_and_shows_that_it_works(name: str) -> None:
    folder = EXAMPLES / name
    report = json.loads((folder / "report.json").read_text())
    recipe = read_recipe(folder / "recipe.yaml").model_dump(
        mode="json", exclude={"output"}, exclude_unset=True
    )
    for field in ("data", "test_data"):
        recipe[field] = Path(recipe[field]).name
    assert report["recipe"] == {**recipe, "base": DEFAULT_MODEL}
    assert report["before"]["rows"] == report["after"]["rows"] == 100
    assert report["before"]["exact_match"] <= 0.05
    assert report["after"]["exact_match"] >= 0.95
    readme = (folder / "README.md").read_text()
    for side in ("before", "after"):
        assert f"{report[side]['correct']} of 100" in readme


@pytest.mark.parametrize("name", NAMES)
def test_the_config_names_the_public_base(name: str) -> None:
    config = json.loads((EXAMPLES / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == DEFAULT_MODEL


@pytest.mark.model
def test_each_loads_in_peft_and_answers_its_own_task() -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve(None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, EXAMPLES / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(EXAMPLES / name, adapter_name=name)
    for name, other in zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True):
        rows = read_rows(EXAMPLES / "data" / f"{name}.test.jsonl")[:4]
        encoded = [Encoder(tokenizer, [2]).row(row) for row in rows]
        correct = {}
        for adapter in (name, other):
            model.set_adapter(adapter)
            answers = [answer(model, tokenizer, item) for item in encoded]
            pairs = zip(answers, rows, strict=True)
            correct[adapter] = sum(exact_match(text, row.answer) for text, row in pairs)
        assert correct == {name: 4, other: 0}


def answer(model: Any, tokenizer: Any, item: Encoded) -> str:
    """By PEFT and transformers."""
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=len(item.answer), eos_token_id=[2], pad_token_id=2
    )
    ids = torch.tensor([item.prompt])
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)[0]
    text: str = tokenizer.decode(tokens[len(item.prompt) :], skip_special_tokens=True)
    return text
