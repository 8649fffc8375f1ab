"""Blends through the engine against sums of PEFT's weights; mixed batches, eviction, deletion, and merges."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, ShiraConfig
from tests.engine.adapters import digest_of, load, prompt_of, save_random, told

from veneer.adapters.merging import follow, merge_site
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.recipes import Part, digests_of, recipe
from veneer.adapters.registry import lower
from veneer.engine.messages import (
    CancelMerge,
    CheckBlend,
    Done,
    DropAdapter,
    MergeAdapters,
    Merged,
    MergeProgress,
)

LAYERS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "rslora": lambda: LoraConfig(r=8, use_rslora=True, target_modules=LAYERS),
    "dora": lambda: LoraConfig(r=3, use_dora=True, target_modules=LAYERS),
    "shira": lambda: ShiraConfig(r=4, target_modules=LAYERS),
    "ia3": lambda: IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
WEIGHED = [name for name in CONFIGS if name != "prefix"]


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for name, config in CONFIGS.items():
        folder = root / "blobs" / digest_of(name)
        save_random(folder, load(base), config(), seed=len(name), strength=0.1)
    return root


def key_of(weights: dict[str, float], method: str = "linear", **fields: Any) -> str:
    key = recipe([Part(digest_of(name), weight) for name, weight in weights.items()], method, **fields).key
    assert key is not None
    return key


class Summed:
    """The base with the weighted differences of PEFT's merged weights, in float64."""

    def __init__(self, base: Path, store: Path) -> None:
        self.model = load(base).double()
        self._own = {name: each.clone() for name, each in self.model.state_dict().items()}
        self._moved = {}
        for name in WEIGHED:
            merged = PeftModel.from_pretrained(load(base).double(), store / "blobs" / digest_of(name))
            weights = merged.merge_and_unload().state_dict()
            self._moved[name] = {key: weights[key].double() - own for key, own in self._own.items()}

    def logprobs(self, weights: dict[str, float], prompt: list[int], output: list[int]) -> torch.Tensor:
        """Of the output's tokens, [tokens, vocabulary]."""
        changed = {
            key: own + sum(w * self._moved[name][key] for name, w in weights.items())
            for key, own in self._own.items()
        }
        self.model.load_state_dict(changed)
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1)


@pytest.fixture(scope="module")
def summed(base: Path, store: Path) -> Summed:
    return Summed(base, store)


BLENDS: list[dict[str, float]] = [
    {"lora": 0.7, "rslora": -0.5},
    {"lora": 1.0, "dora": 0.5},
    {"dora": -0.3, "shira": 2.0, "rslora": 0.2},
    {"ia3": 0.5, "lora": -1.0},
    {"ia3": 0.5, "dora": 0.5},  # one scales outputs by less than the other: they add up
    dict.fromkeys(WEIGHED, 0.25),
    {"lora": -1.0},
    {"shira": 0.5},
]


def assert_summed(
    driver: Any, summed: Summed, weights: dict[str, float], prompt: list[int], asked: str
) -> None:
    tokens = driver.tokens(asked)
    expected = summed.logprobs(weights, prompt, tokens)
    assert tokens == expected.argmax(-1).tolist()
    assert (told(driver, asked)[:, 1:] - expected.topk(3).values).abs().max() < 1e-4


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_mixed_batch_of_blends_is_the_sum_of_pefts_weights(
    base: Path, store: Path, summed: Summed, make_engine: Callable[..., Any], lookahead: bool
) -> None:
    """All at once: blends, their parts alone and the base. Chunks of prompts beside decoding rows."""
    driver = make_engine(base, store=str(store), lookahead=lookahead, max_loras=20, max_num_batched_tokens=16)
    everything = [*BLENDS, *({name: 1.0} for name in WEIGHED)]
    prompts = [prompt_of(index) for index in range(len(everything))]
    asked = [
        driver.submit(prompt, key_of(weights), max_tokens=5, logprobs=3)
        for prompt, weights in zip(prompts, everything, strict=True)
    ]
    asked.append(driver.submit(prompt_of(0), None, max_tokens=5, logprobs=3))
    driver.run(*asked)
    for weights, prompt, identifier in zip([*everything, {}], [*prompts, prompt_of(0)], asked, strict=True):
        assert_summed(driver, summed, weights, prompt, identifier)


def test_a_batch_gives_each_what_it_gets_alone(
    base: Path, store: Path, make_engine: Callable[..., Any]
) -> None:
    together = make_engine(base, store=str(store), max_loras=16)
    asked = [together.submit(prompt_of(1), key_of(weights), max_tokens=6, logprobs=3) for weights in BLENDS]
    together.run(*asked)
    alone = make_engine(base, store=str(store), prefix_caching=False)
    for weights, identifier in zip(BLENDS, asked, strict=True):
        one = alone.submit(prompt_of(1), key_of(weights), max_tokens=6, logprobs=3)
        assert alone.run(one) == [together.tokens(identifier)]
        torch.testing.assert_close(told(alone, one), told(together, identifier), rtol=0, atol=1e-5)


def test_the_prefix_cache_knows_blends_by_what_they_are(
    base: Path, store: Path, make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(base, store=str(store))
    pool, prompt = driver.engine.pool, [*range(3, 30)]
    driver.generate(prompt, key_of({"lora": 0.5, "dora": 0.25}), max_tokens=1)
    assert pool.hit_tokens == 0
    driver.generate(prompt, key_of({"dora": 0.25, "lora": 0.5}), max_tokens=1)  # the same in another order
    assert (hits := pool.hit_tokens) > 0
    for weights in (
        {"lora": 0.5, "dora": 0.2500001},
        {"lora": 0.5},
        {"lora": 1.0},
        {"lora": 0.25, "dora": 0.5},
    ):
        driver.generate(prompt, key_of(weights), max_tokens=1)
    assert pool.hit_tokens == hits


def test_any_number_of_blends_goes_through_few_slots(
    base: Path, store: Path, summed: Summed, make_engine: Callable[..., Any]
) -> None:
    """Clients make up weights; what is remembered of blends must not grow with them."""
    driver = make_engine(base, store=str(store), max_loras=2, host_adapter_memory=1 << 18)
    blends = [{"lora": 0.5 + index / 16, "rslora": -index / 16} for index in range(1, 13)]
    asked = [driver.submit(prompt_of(2), key_of(weights), max_tokens=4, logprobs=3) for weights in blends]
    driver.run(*asked)
    for weights, identifier in zip(blends, asked, strict=True):
        assert_summed(driver, summed, weights, prompt_of(2), identifier)
    residency = driver.engine.residency
    on_host = len(residency._loader.cache.keys())
    assert len(residency._adapters) <= 2 + on_host
    assert on_host < len(blends)
    first = driver.submit(prompt_of(2), key_of(blends[0]), max_tokens=4, logprobs=3)  # made anew
    driver.run(first)
    assert_summed(driver, summed, blends[0], prompt_of(2), first)


def test_statistics_are_by_adapter(base: Path, store: Path, make_engine: Callable[..., Any]) -> None:
    driver = make_engine(base, store=str(store), max_loras=2)
    asked = driver.submit(prompt_of(0), key_of({"lora": 0.5, "dora": 0.5}), max_tokens=8)
    while not driver.tokens(asked):
        driver.step()
    stats = driver.engine.stats().adapters
    assert set(stats) == {digest_of("lora"), digest_of("dora")}
    assert [each.running for each in stats.values()] == [1, 1]


def test_deleting_a_part_waits_for_its_blends_and_drops_them(
    base: Path, store: Path, make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(base, store=str(store), max_loras=4)
    key, other = key_of({"lora": 0.5, "dora": 0.5}), key_of({"rslora": 0.5, "dora": 0.5})
    prompt = [*range(3, 30)]
    driver.generate(prompt, other, max_tokens=2)
    running = driver.submit(prompt, key, max_tokens=12)
    while not driver.tokens(running):
        driver.step()
    assert driver.engine.handle(DropAdapter("drop", digest_of("lora"))) == []
    replies: list[Any] = []
    while not driver.finished(running):
        replies += driver.step()
    for _ in range(1000):
        if any(isinstance(reply, Done) for reply in replies):
            break
        replies += driver.step()
    else:
        raise AssertionError("the drop was not answered")
    assert len(driver.tokens(running)) == 12
    known = driver.engine.residency.stats().keys()
    assert not any(digest_of("lora") in digests_of(each) for each in known)
    assert other in known
    hits = driver.engine.pool.hit_tokens
    driver.generate(prompt, other, max_tokens=1)
    assert driver.engine.pool.hit_tokens > hits
    hits = driver.engine.pool.hit_tokens
    driver.generate(prompt, key, max_tokens=1)  # its files are there still: made anew
    assert driver.engine.pool.hit_tokens == hits


def test_no_adapter_waits_for_a_blend_that_takes_long(
    base: Path, store: Path, make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_engine(base, store=str(store))
    go_on = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(30)
        return follow(*arguments)

    monkeypatch.setattr("veneer.adapters.loader.follow", slow)
    blend = driver.submit([5, 6, 7], key_of({"lora": 0.5, "dora": 0.5}), max_tokens=2)
    assert len(driver.generate([5, 6, 7], digest_of("rslora"), max_tokens=2)) == 2
    assert not driver.finished(blend)
    go_on.set()
    assert len(driver.run(blend)[0]) == 2


def test_a_part_that_is_gone_fails_its_blend_alone(
    base: Path, store: Path, make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(base, store=str(store))
    gone = recipe([Part("e" * 64, 0.5), Part(digest_of("lora"), 0.5)]).key
    asked, fine = driver.submit([5, 6, 7], gone), driver.submit([5, 6, 7], digest_of("lora"))
    driver.run(asked, fine)
    error = driver.outputs[asked][-1].error
    assert (error.status, error.code) == (404, "not_found")
    assert driver.outputs[fine][-1].finish_reason == "length"
    assert gone not in driver.engine.residency._adapters


@pytest.mark.parametrize(
    ("weights", "fields", "why"),
    [
        ({"prefix": 1.0, "lora": 1.0}, {}, "virtual tokens"),
        ({"lora": 0.5, "rslora": 0.5}, {}, "add up to 12, and --max-lora-rank is 8"),
    ],
)
def test_refusals_come_from_the_check_and_from_requests_alike(
    base: Path,
    store: Path,
    make_engine: Callable[..., Any],
    weights: dict[str, float],
    fields: dict[str, Any],
    why: str,
) -> None:
    driver = make_engine(base, store=str(store), max_lora_rank=8)
    key = key_of(weights, **fields)
    answer = driver.call(CheckBlend("c", key))
    assert answer.error is not None
    assert why in answer.error.message
    assert answer.error.status == 400
    asked = driver.submit([5, 6, 7], key)
    driver.run(asked)
    assert driver.outputs[asked][-1].error == answer.error


def test_a_rank_cap_is_served_and_its_error_told(
    base: Path, store: Path, summed: Summed, make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(base, store=str(store), max_lora_rank=8)
    weights = {"lora": 0.5, "rslora": 0.5}
    answer = driver.call(CheckBlend("c", key_of(weights, rank=8)))
    assert answer.info is not None
    assert (answer.info.kind, answer.info.rank) == ("blend", 8)
    assert 0 < answer.info.error < 0.6
    asked = driver.submit(prompt_of(3), key_of(weights, rank=8), max_tokens=2, logprobs=3)
    driver.run(asked)
    expected = summed.logprobs(weights, prompt_of(3), driver.tokens(asked))
    difference = (told(driver, asked)[:, 1:] - expected.topk(3).values).abs().max()
    assert 1e-4 < difference < 2, "it is near the blend, and not the blend"
    whole = driver.call(CheckBlend("c", key_of({"lora": 0.5}, rank=8)))
    assert whole.info.error == pytest.approx(0, abs=1e-6)


# ---- merges ---------------------------------------------------------------------------------------


def merge(driver: Any, key: str, folder: Path, **fields: Any) -> tuple[list[MergeProgress], Merged]:
    """Step until a merge is done."""
    assert driver.engine.handle(MergeAdapters("m", key, str(folder), **fields)) == []
    seen: list[MergeProgress] = []
    for _ in range(5000):
        for reply in driver.step():
            if isinstance(reply, Merged):
                return seen, reply
            if isinstance(reply, MergeProgress):
                seen.append(reply)
    raise AssertionError("the merge was not answered")


def test_a_merge_runs_beside_requests_and_is_served_like_its_blend(
    base: Path, store: Path, summed: Summed, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    driver = make_engine(base, store=str(store), max_loras=3)
    weights = {"lora": 0.7, "dora": -0.5, "shira": 1.0}
    folder = store / "blobs" / digest_of("merged")
    folder.mkdir()
    running = driver.submit(prompt_of(0), digest_of("lora"), max_tokens=20, logprobs=3)
    seen, merged = merge(driver, key_of(weights), folder)
    assert merged.error is None
    assert merged.distance is not None
    assert merged.distance < 1e-6
    assert len(merged.warnings) == 1  # DoRA follows from the base's weights
    assert seen[-1].done == seen[-1].total > 0
    driver.run(running)
    assert_summed(driver, summed, {"lora": 1.0}, prompt_of(0), running)
    asked = driver.submit(prompt_of(4), digest_of("merged"), max_tokens=4, logprobs=3)
    driver.run(asked)
    assert_summed(driver, summed, weights, prompt_of(4), asked)


def test_a_merge_that_fails_says_why_and_leaves_no_file(
    base: Path, store: Path, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    driver = make_engine(base, store=str(store), max_lora_rank=8)
    cases = {
        "virtual tokens": (key_of({"prefix": 0.5, "lora": 1.0}), tmp_path),
        "rank 12": (key_of({"lora": 1.0, "rslora": 1.0}), tmp_path),
        "FileNotFoundError": (key_of({"lora": 1.0, "dora": 1.0}), tmp_path / "gone"),  # its upload broke off
    }
    for why, (key, folder) in cases.items():
        _, merged = merge(driver, key, folder, keep_rows=True)
        assert merged.error is not None
        assert why in merged.error.message
    assert list(tmp_path.iterdir()) == []
    _, merged = merge(driver, key_of({"lora": 1.0, "dora": 1.0}), tmp_path)  # the thread goes on
    assert merged.error is None
    assert (tmp_path / WEIGHTS_FILE).is_file()


def test_a_cancelled_merge_ends_at_its_next_site(
    base: Path, store: Path, make_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_engine(base, store=str(store))

    def cancel_first(*arguments: Any) -> Any:
        driver.engine.handle(CancelMerge("m"))
        return merge_site(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("veneer.adapters.merge.merge_site", cancel_first)
        seen, merged = merge(driver, key_of({"lora": 1.0, "dora": 1.0}), tmp_path)
    assert merged.error is not None
    assert (merged.error.status, merged.error.code) == (409, "merge_cancelled")
    assert [each.done for each in seen] == [0]
    assert list(tmp_path.iterdir()) == []
    assert merge(driver, key_of({"lora": 1.0, "dora": 1.0}), tmp_path)[1].error is None


def test_closing_ends_a_merge_at_its_next_site(
    base: Path, store: Path, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    driver = make_engine(base, store=str(store))
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        request = MergeAdapters(str(number), key_of({"lora": 1.0, "dora": 1.0}), str(tmp_path / str(number)))
        driver.engine.handle(request)
    driver.engine.close()
    assert not (tmp_path / "2" / WEIGHTS_FILE).exists()


def test_blends_of_other_methods_are_merges(
    base: Path, store: Path, make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    driver = make_engine(base, store=str(store), max_lora_rank=64)
    key = key_of({"lora": 1.0, "rslora": 0.5}, "dare_ties", density=0.5, seed=3)
    _, merged = merge(driver, key, tmp_path)
    assert merged.distance is not None
    assert merged.distance > 0.1
    program = lower(tmp_path, driver.engine.base, 64)
    asked = driver.submit(prompt_of(1), key, max_tokens=4, logprobs=3)
    driver.run(asked)
    assert "dense" in program.primitives or "sparse" in program.primitives
    folder = store / "blobs" / digest_of("dare")
    tmp_path.rename(folder)
    stored = driver.submit(prompt_of(1), digest_of("dare"), max_tokens=4, logprobs=3)
    assert driver.run(stored) == [driver.tokens(asked)]
    torch.testing.assert_close(told(driver, stored), told(driver, asked), rtol=0, atol=1e-5)
