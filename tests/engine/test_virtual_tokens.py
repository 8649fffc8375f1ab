"""Prompt methods through the engine: PEFT's log probabilities in mixed batches, whatever is cut or shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from tests.engine.adapters import PAGE, Peft, check_against_peft, digest_of, load, save_random

from veneer.engine.graphs import Variant
from veneer.engine.messages import CheckAdapter, DropAdapter

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(**TASK, num_virtual_tokens=6),
    "long prefix": lambda: PrefixTuningConfig(
        **TASK, num_virtual_tokens=29, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": lambda: CartridgeConfig(**TASK, num_virtual_tokens=8),
    "prompt": lambda: PromptTuningConfig(**TASK, num_virtual_tokens=7),
    "long prompt": lambda: PromptTuningConfig(**TASK, num_virtual_tokens=33),
    "P-tuning": lambda: PromptEncoderConfig(**TASK, num_virtual_tokens=4),
    "multitask": lambda: MultitaskPromptTuningConfig(**TASK, num_virtual_tokens=5, num_ranks=2),
    "CPT": lambda: CPTConfig(
        **TASK, cpt_token_ids=[3, 4, 9], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]
    ),
    "LoRA": lambda: LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
}
VIRTUAL = {"prefix": 6, "long prefix": 29, "cartridge": 8, "prompt": 7, "long prompt": 33}


@pytest.fixture(scope="module")
def stores(make_stores: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """A function: architecture -> a store's folder with one adapter of each config, saved by PEFT."""

    def write(base: Path, blobs: Path) -> None:
        for name, config in CONFIGS.items():
            strength = 0.05 if name == "LoRA" else 0.3
            save_random(blobs / digest_of(name), load(base), config(), seed=len(name), strength=strength)

    return make_stores(write)


class Tasks(Peft):
    def inputs(self, name: str | None, prompt: list[int], output: list[int]) -> dict[str, Any]:
        return {"task_ids": torch.tensor([0])} if name == "multitask" else {}


def asks() -> list[tuple[list[int], str | None]]:
    names = [None, *CONFIGS, *CONFIGS]
    return [([3 + i, 9, 27, 81, 5, 3 + i % 2] + [40 + i] * (i % 7), name) for i, name in enumerate(names)]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3", "phi3"])
def test_every_kind_in_one_batch_is_pefts(
    architecture: str,
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    folder, store = tiny_model(architecture), stores(architecture)
    peft = Tasks(folder, store)
    prompt = [5, 6, 7, 8]
    plain = peft.logprobs(None, prompt, [])
    for name in CONFIGS:
        assert (peft.logprobs(name, prompt, []) - plain).abs().max() > 0.05, f"{name} must matter"
    driver = make_engine(folder, store=str(store))
    check_against_peft(driver, peft, asks())
    check_against_peft(driver, peft, asks())  # with what is cached now
    assert driver.engine.pool.hit_tokens > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix_caching": False},
        {"max_num_batched_tokens": 8},  # chunks, and embeddings that take more than one forward
        {"max_loras": 2, "slot_patience": 0.0},
        {"kv_cache_memory": 24 * PAGE, "max_num_batched_tokens": 8},
        {"lookahead": True, "kv_cache_memory": 30 * PAGE},
        {"lookahead": True, "page_size": 16},
    ],
    ids=str,
)
def test_however_it_runs(
    fields: dict[str, Any],
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    folder, store = tiny_model("llama"), stores("llama")
    peft = Tasks(folder, store)
    driver = make_engine(folder, store=str(store), **fields)
    check_against_peft(driver, peft, asks())
    check_against_peft(driver, peft, asks()[::-1])
    stats = driver.engine.stats()
    if "kv_cache_memory" in fields:
        assert stats.preemptions > 0
    if "max_loras" in fields:
        assert sum(entry.evictions for entry in stats.adapters.values()) > 0
    while driver.engine.has_work:
        driver.step()
    assert driver.engine.pool.used == 0


def test_keys_and_values_are_made_once_and_shared(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(stores("llama")), prefix_caching=False)
    decoder = driver.engine.base.model.get_decoder()
    rows: list[int] = []
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(
            (kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]).shape[1]
        ),
        with_kwargs=True,
    )
    prompt = digest_of("long prompt")
    first = driver.generate([9, 8, 7], prompt, max_tokens=2)
    assert rows == [33, 3, 1]  # the embeddings once, then the prompt and a decode step, with no virtual rows
    ids = [driver.submit([9, 8, 7], prompt, max_tokens=2) for _ in range(4)]
    driver.step()
    running = driver.engine.scheduler.running
    assert (
        len({tuple(sequence.pages[:8]) for sequence in running}) == 1
    )  # 33 tokens are eight pages and one more
    assert len({sequence.pages[8] for sequence in running}) == 4
    assert driver.run(*ids) == [first] * 4
    assert rows == [33, 3, 1, 12, 4]


def test_limits_positions_and_counts(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(stores("llama")), max_model_len=40)
    free = driver.generate([9, 8, 7], digest_of("long prompt"), max_tokens=20)
    assert len(free) == 40 - 33 - 3  # the context is full
    assert driver.generate([9] * 6, digest_of("long prompt"), max_tokens=1)
    for length in (7, 12):
        refused = driver.submit([9] * length, digest_of("long prompt"))
        beside = driver.submit([9] * length, digest_of("prompt"), max_tokens=2)
        driver.run(refused, beside)
        (output,) = driver.outputs[refused]
        assert (output.error.status, output.error.code) == (400, "context_length_exceeded")
        assert f"{length + 33} tokens, 33 of them the adapter's virtual ones" in output.error.message
        assert len(driver.tokens(beside)) == 2
    assert driver.engine.stats().running == 0
    again = driver.submit([9, 8, 7], digest_of("long prompt"), max_tokens=2)
    driver.run(again)
    assert driver.outputs[again][-1].cached_tokens == 0  # the cached tokens are virtual, no prompt's


def test_penalties_do_not_see_virtual_tokens(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    folder, store = tiny_model("llama"), stores("llama")
    driver = make_engine(folder, store=str(store))
    peft = Tasks(folder, store)
    prompt = [9, 8, 7]
    tokens = driver.generate(prompt, digest_of("prefix"), repetition_penalty=3.0, max_tokens=8)
    peft.logprobs("prefix", prompt, [])
    for at in range(8):
        with torch.no_grad():
            scores = (
                peft.models["prefix"](input_ids=torch.tensor([prompt + tokens[:at]])).logits[0, -1].clone()
            )
        seen = torch.tensor(sorted({*prompt, *tokens[:at]}))
        scores[seen] = torch.where(scores[seen] > 0, scores[seen] / 3.0, scores[seen] * 3.0)
        assert int(scores.argmax()) == tokens[at]


def test_rows_with_virtual_tokens_alone_are_the_bases(
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
    replay_graphs: Callable[[Any], list[Any]],
) -> None:
    """Once their keys and values are in the cache, decoding costs what the base's does, eager and graphed."""
    fields = {"store": str(stores("llama")), "prefix_caching": False}
    eager, graphed = (make_engine(tiny_model("llama"), **fields) for _ in range(2))
    made = replay_graphs(graphed.engine)
    answers = []
    for driver in (eager, graphed):
        ids = [driver.submit([9, 8, 7], digest_of(name)) for name in ("prefix", "prompt")]
        answers.append(driver.run(*ids))
        assert not driver.engine.base.context.rows.adapted
    assert answers[0] == answers[1]
    assert {each.variant for each in made if each.replays} == {Variant.BASE}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_gives_one_answer_alone_and_together(
    quantization: str,
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(stores("llama")), quantization=quantization)
    alone = [driver.generate(p, name and digest_of(name)) for p, name in asks()]
    ids = [driver.submit(p, name and digest_of(name)) for p, name in asks()]
    assert driver.run(*ids) == alone
    assert len({tuple(tokens) for tokens in alone}) > len(CONFIGS)


def test_an_upload_is_probed_and_described_and_a_drop_forgets(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    store = stores("llama")
    driver = make_engine(tiny_model("llama"), max_model_len=64)
    for call, name in enumerate(VIRTUAL):
        folder = store / "blobs" / digest_of(name)
        info = driver.call(CheckAdapter(f"c{call}", str(folder), digest_of(name))).info
        assert (info.virtual_tokens, info.sites, info.rank) == (VIRTUAL[name], 0, 0)
        assert info.primitives == ["embedding_prefix" if "prompt" in name else "kv_prefix"]
        kv = 2 * 3 * 2 * 16 * VIRTUAL[name]
        assert info.bytes == 4 * (kv + (64 * VIRTUAL[name] if "prompt" in name else 0))
        assert info.effect > 0.05
    cached = len(driver.engine.pool._cached)
    driver.engine.handle(DropAdapter("d", digest_of("long prefix")))
    assert len(driver.engine.pool._cached) == cached - 29 // 4 - (29 % 4 + 8) // 4


def test_an_upload_that_leaves_no_room_for_a_prompt_is_refused(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), max_model_len=32)
    folder = stores("llama") / "blobs" / digest_of("long prompt")
    error = driver.call(CheckAdapter("c", str(folder), digest_of("long prompt"))).error
    assert error.status == 400
    assert "33 of them the adapter's virtual ones, and the context holds 32" in error.message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_graphed_equals_eager(
    architecture: str,
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    folder, store = tiny_model(architecture), stores(architecture)
    fields: dict[str, Any] = {"store": str(store), "device": "cuda", "page_size": 16}
    eager = make_engine(folder, enforce_eager=True, **fields)
    graphed = make_engine(folder, cuda_graphs="all", **fields)
    expected = [eager.generate(p, name and digest_of(name)) for p, name in asks()]
    for driver in (eager, graphed):
        ids = [driver.submit(p, name and digest_of(name)) for p, name in asks()]
        assert driver.run(*ids) == expected
    assert graphed.engine.runner.graphs.replays > 0
    assert graphed.engine.runner.mixed_graphs.replays > 0  # also steps that begin with virtual tokens
