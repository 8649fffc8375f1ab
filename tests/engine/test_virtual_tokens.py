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
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from veneer.engine.graphs import Variant
from veneer.engine.messages import AdapterChecked, CheckAdapter, DropAdapter

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


def digest_of(name: str) -> str:
    return f"{sum(map(ord, name)):064x}"


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stores(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function: architecture -> a store's folder with one adapter of each config, saved by PEFT."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("store")
            for name, config in CONFIGS.items():
                torch.manual_seed(len(name))
                adapted = get_peft_model(load_base(tiny_model(architecture)), config())
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        strength = 0.05 if name == "LoRA" else 0.3
                        parameter.data += strength * torch.randn_like(parameter)
                adapted.save_pretrained(made[architecture] / "blobs" / digest_of(name))
        return made[architecture]

    return make


class Peft:
    """Teacher-forced log probabilities by PEFT."""

    def __init__(self, base: Path, store: Path) -> None:
        self.base, self.store = base, store
        self.models: dict[str | None, Any] = {None: load_base(base)}

    def logprobs(self, name: str | None, ids: list[int]) -> torch.Tensor:
        if name not in self.models:
            folder = self.store / "blobs" / digest_of(name or "")
            self.models[name] = PeftModel.from_pretrained(load_base(self.base), folder).eval()
        tasks = {"task_ids": torch.tensor([0])} if name == "multitask" else {}
        with torch.inference_mode():
            logits = self.models[name](input_ids=torch.tensor([ids]), **tasks).logits[0]
        return torch.log_softmax(logits[-len(ids) :], -1)


def asks() -> list[tuple[list[int], str | None]]:
    names = [None, *CONFIGS, *CONFIGS]
    return [([3 + i, 9, 27, 81, 5, 3 + i % 2] + [40 + i] * (i % 7), name) for i, name in enumerate(names)]


def check_against_peft(
    driver: Any, peft: Peft, asked: list[tuple[list[int], str | None]], **sampling: Any
) -> None:
    """All at once; tokens and log probabilities are PEFT's."""
    ids = [driver.submit(p, name and digest_of(name), logprobs=3, **sampling) for p, name in asked]
    for identifier, (prompt, name), tokens in zip(ids, asked, driver.run(*ids), strict=True):
        expected = peft.logprobs(name, prompt + tokens)[len(prompt) - 1 : -1]
        found = [item.logprobs[0] for item in driver.outputs[identifier]]
        assert tokens == expected.argmax(-1).tolist(), name
        top = torch.tensor([entry.top_logprobs for entry in found])
        assert (top - expected.topk(3).values).abs().max() < 1e-4, name


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3", "phi3"])
def test_every_kind_in_one_batch_is_pefts(
    architecture: str,
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    folder, store = tiny_model(architecture), stores(architecture)
    peft = Peft(folder, store)
    prompt = [5, 6, 7, 8]
    plain = peft.logprobs(None, prompt)
    for name in CONFIGS:
        assert (peft.logprobs(name, prompt) - plain).abs().max() > 0.05, f"{name} must matter"
    driver = make_engine(folder, store=str(store))
    check_against_peft(driver, peft, asks())
    check_against_peft(driver, peft, asks())  # with what is cached now
    assert driver.engine.pool.hit_tokens > 0


PAGE = 2 * 3 * 4 * 2 * 16 * 4  # bytes: K and V, layers, tokens, heads, head_dim, float32


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
    peft = Peft(folder, store)
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
    peft = Peft(folder, store)
    prompt = [9, 8, 7]
    tokens = driver.generate(prompt, digest_of("prefix"), repetition_penalty=3.0, max_tokens=8)
    peft.logprobs("prefix", prompt)
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
        info = check(driver, CheckAdapter(f"c{call}", str(folder), digest_of(name))).info
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
    error = check(driver, CheckAdapter("c", str(folder), digest_of("long prompt"))).error
    assert error.status == 400
    assert "33 of them the adapter's virtual ones, and the context holds 32" in error.message


def check(driver: Any, request: CheckAdapter) -> Any:
    driver.engine.handle(request)
    for _ in range(1000):
        for reply in driver.step():
            if isinstance(reply, AdapterChecked):
                return reply
    raise AssertionError("no answer")


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
