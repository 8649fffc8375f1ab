"""`veneer eval` on the default base and a demo adapter: real answers, likelihoods that are transformers' own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT, LiveServer

from veneer.server.cli import main
from veneer.server.eval_client import ServerModels
from veneer.training.data.formats import Message

pytestmark = pytest.mark.model

BASE = "SmolLM2-135M-Instruct"
DATA = ROOT / "examples" / "data" / "negate.test.jsonl"
ROWS = 12
SCORED = 6


@pytest.fixture(scope="module")
def server(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    options = ["--store", str(tmp_path_factory.mktemp("store")), "--quantization", "none", "--threads", "1"]
    modules = ["--lora-modules", f"negate={ROOT / 'examples' / 'negate'}"]
    return live_server(*options, "--kv-cache-memory", "256MiB", *modules)


@pytest.fixture
def found(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A function: options of `veneer eval` -> its JSON, base and adapter side by side."""

    def run(data: Path, *options: str, status: int = 0) -> Any:
        models = ["--model", "base", "--model", "negate@1"]
        arguments = ["eval", "--data", str(data), *models, "--url", server.url, "--json", *options]
        assert main(arguments) == status, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def test_the_adapter_answers_and_the_base_does_not(found: Callable[..., Any], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    options = ["--rows", str(ROWS), "--max-new-tokens", "24", "--no-worse-than", "base", "--at-least", "0.9"]
    result = found(DATA, *options, "--output", str(report))
    base, adapter = (
        {name: each["value"] for name, each in model["metrics"].items()} for model in result["models"]
    )
    assert base["exact_match"] == 0
    assert adapter["exact_match"] >= 0.9
    assert adapter["exact_match"] <= adapter["normalized_match"] <= adapter["token_f1"]
    assert sum(result["models"][0]["errors"].values()) == ROWS
    difference = result["comparisons"][0]["differences"]["exact_match"]
    assert difference["significant"]
    assert difference["low"] > 0.5
    assert result["gate"]["passed"]
    assert "negate@1" in report.read_text()


def test_likelihoods_tell_the_adapter_from_the_base(found: Callable[..., Any], tmp_path: Path) -> None:
    """Of the right answer, and of the right one beside the sentence as it was."""
    result = found(DATA, "--rows", str(SCORED), "--metric", "perplexity")
    base, adapter = (model["metrics"]["perplexity"] for model in result["models"])
    assert 1 <= adapter["value"] < 1.2
    assert adapter["high"] < base["low"]
    rows = [json.loads(line) for line in DATA.read_text().splitlines()[:SCORED]]
    choices = tmp_path / "choices.jsonl"
    with choices.open("w") as file:
        for row in rows:
            texts = [row["prompt"], row["completion"]]
            file.write(json.dumps({"prompt": row["prompt"], "choices": texts, "answer": 1}) + "\n")
    result = found(choices)
    base, adapter = (model["metrics"]["accuracy"]["value"] for model in result["models"])
    assert adapter == 1
    assert base < adapter


def test_likelihoods_are_those_of_transformers(server: LiveServer) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veneer.engine.source import resolve

    folder = resolve(None)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = (Message("system", "Be brief."), Message("user", "Which colour is the sky?"))
    texts = ["Blue.", "The sky is green, as everybody knows."]

    async def ask() -> list[list[float]]:
        async with ServerModels(server.url) as models:
            return await models.score(BASE, prompt, texts)

    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for text, scores in zip(texts, asyncio.run(ask()), strict=True):
        before, whole = (
            tokenizer(each, add_special_tokens=False)["input_ids"] for each in (start, start + text)
        )
        with torch.inference_mode():
            expected = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(before), len(whole))
        assert scores == pytest.approx([expected[at - 1, whole[at]].item() for at in places], abs=1e-3)
