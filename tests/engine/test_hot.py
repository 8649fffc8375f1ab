"""A merged copy serves the adapter that dominates: the same tokens, beside others, until it has to go."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig
from tests.engine.adapters import digest_of, load, prompt_of, save_random, told

from veneer.adapters.deltas import bias_change, weight_change
from veneer.adapters.recipes import Part, recipe
from veneer.adapters.registry import lower
from veneer.engine import hot, merged_copy
from veneer.engine.hot_policy import HotPolicy
from veneer.engine.memory import available_memory
from veneer.engine.messages import Done, DropAdapter
from veneer.errors import InvalidRequest

LORA, OTHER, BIASED, SCALED, PREFIX, TINY, TOKENS = (
    digest_of(name) for name in ("lora", "other", "biased", "scaled", "prefix", "tiny", "tokens")
)
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "other": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "biased": lambda: LoraConfig(r=4, bias="lora_only", target_modules=["q_proj", "down_proj"]),
    "scaled": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "tiny": lambda: LoraConfig(r=2, target_modules=["q_proj"]),
    "tokens": lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5]),
}


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for name, config in CONFIGS.items():
        strength = 1e-4 if name == "tiny" else 0.2
        save_random(root / "blobs" / digest_of(name), load(base), config(), seed=len(name), strength=strength)
    return root


@pytest.fixture
def make(
    make_engine: Callable[..., Any], base: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """A driver whose copies come when `heat` asks for them."""
    monkeypatch.setattr(hot, "INTERVAL", 0.0)

    def made(**fields: Any) -> Any:
        driver = make_engine(base, store=str(store), **{"hot_adapter_memory": 8 << 20, **fields})
        driver.engine._hot._policy = HotPolicy(window=1e9)
        return driver

    return made


def shown(driver: Any) -> Any:
    return driver.engine.stats().hot_adapter


def heat(driver: Any, adapter: str, until: str = "serving") -> None:
    """Say that an adapter dominates, once, and step until its copy is in that state."""
    policy = driver.engine._hot._policy
    policy.candidate = lambda: adapter
    driver.step()
    policy.candidate = lambda: None
    for _ in range(2000):
        if shown(driver).state in (until, "watching"):
            break
        driver.step()
    assert shown(driver).state == until, shown(driver)


def storages(driver: Any) -> list[bytes]:
    """What is in the base's memory, each storage once."""
    model = driver.engine.base.model
    found = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    raw = (torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in found.values())
    return [each.numpy().tobytes() for each in raw]


# ---- the same tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [LORA, BIASED, SCALED])
def test_tokens_are_those_without_the_copy_and_the_base_is_untouched(make: Any, adapter: str) -> None:
    driver = make()
    prompts = [prompt_of(index) for index in range(6)]
    before = storages(driver)
    ids = [driver.submit(prompt, adapter, logprobs=3) for prompt in prompts]
    expected = driver.run(*ids)
    heat(driver, adapter)
    steps = shown(driver).steps
    again = [driver.submit(prompt, adapter, logprobs=3) for prompt in prompts]
    assert driver.run(*again) == expected
    assert shown(driver).steps >= steps + 16
    for ours, theirs in zip(again, ids, strict=True):
        torch.testing.assert_close(told(driver, ours), told(driver, theirs), rtol=0, atol=1e-4)
    assert storages(driver) == before
    assert shown(driver).error == 0
    assert shown(driver).logprob_difference < 1e-4
    assert shown(driver).made == 1


def test_a_blend_has_a_copy_too(make: Any) -> None:
    key = recipe([Part(LORA, 0.5), Part(SCALED, -0.7)]).key
    assert key is not None
    driver = make()
    expected = driver.generate(prompt_of(1), key)
    heat(driver, key)
    assert driver.generate(prompt_of(1), key) == expected


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("adapter", [BIASED, SCALED])
def test_its_linears_compute_with_the_sum(make: Any, store: Path, adapter: str, quantization: str) -> None:
    base = make(quantization=quantization).engine.base
    program = lower(store / "blobs" / adapter, base, 64)
    copy = merged_copy.make_copy(adapter, program, base, "full")
    assert copy is not None
    for number, site in enumerate(base.sites.values()):
        if site.name not in program.sites:
            continue
        part, x = program.sites[site.name], torch.randn(3, site.in_features)
        expected = x @ (base.weight(site.name) + weight_change(part, site, base)).T
        for bias in (base.bias(site.name), bias_change(part, site, base)):
            expected += 0 if bias is None else bias
        torch.testing.assert_close(copy.linears[number](x), expected, rtol=0, atol=1e-4)
    assert copy.bytes == sum(
        m.weight.nbytes + (m.bias.nbytes if m.bias is not None else 0)
        for m in copy.linears.values()
        if isinstance(m, torch.nn.Linear)
    )


@pytest.mark.parametrize("adapter", [LORA, OTHER])  # OTHER changes q and v of the fused q, k, v
def test_on_nf4_a_full_copy_is_close(make: Any, adapter: str) -> None:
    driver = make(quantization="nf4")
    before = storages(driver)
    first = driver.submit(prompt_of(3), adapter, logprobs=3, max_tokens=1)
    driver.run(first)
    heat(driver, adapter)
    again = driver.submit(prompt_of(3), adapter, logprobs=3, max_tokens=1)
    driver.run(again)
    torch.testing.assert_close(told(driver, again), told(driver, first), rtol=0, atol=1e-3)
    assert storages(driver) == before
    assert (shown(driver).format, shown(driver).error) == ("full", 0)


def test_in_bfloat16_the_copy_says_what_rounding_costs(make: Any) -> None:
    driver = make(dtype="bfloat16")
    heat(driver, LORA)
    assert 1e-4 < shown(driver).error < 4e-3  # of a relative rounding of at most 2^-8
    assert shown(driver).error < shown(driver).lost


def test_quantized_again_the_copy_says_what_it_loses(make: Any) -> None:
    driver = make(quantization="nf4", hot_adapter_format="nf4")
    heat(driver, LORA)
    assert 0.01 < shown(driver).error < shown(driver).lost < merged_copy.MOST_LOST
    assert shown(driver).bytes < driver.engine.base.memory_bytes()
    driver.generate(prompt_of(2), LORA)


# ---- what has no copy -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "fields", "why"),
    [
        (PREFIX, {}, "virtual tokens"),
        (TOKENS, {}, "embedding"),
        (LORA, {"hot_adapter_memory": 1000}, "--hot-adapter-memory is 1000"),
        (TINY, {"quantization": "nf4", "hot_adapter_format": "nf4"}, "For a copy use format full"),
        (TINY, {"dtype": "bfloat16"}, "serve in float32"),
    ],
)
def test_refusals_are_told_once(make: Any, adapter: str, fields: dict[str, Any], why: str) -> None:
    driver = make(**fields)
    expected = driver.generate(prompt_of(0), adapter)
    heat(driver, adapter, until="watching")
    assert why in shown(driver).note
    assert adapter in shown(driver).note
    assert shown(driver).dropped == {"refused": 1}
    for _ in range(5):
        heat(driver, adapter, until="watching")
    assert driver.generate(prompt_of(0), adapter) == expected
    assert shown(driver).dropped == {"refused": 1}


def test_the_base_itself_needs_none(make: Any) -> None:
    driver = make()
    driver.engine._hot._policy._window = 0.01
    for index in range(5):
        driver.generate(prompt_of(index))
    assert (shown(driver).state, shown(driver).made, shown(driver).note) == ("watching", 0, "")


# ---- beside others ----------------------------------------------------------------------------------


def test_others_run_beside_it_and_both_get_on(make: Any) -> None:
    driver = make()
    wanted = [(prompt_of(index), [LORA, OTHER, None][index % 3]) for index in range(9)]
    expected = [driver.generate(prompt, adapter) for prompt, adapter in wanted]
    heat(driver, LORA)
    steps, merged = driver.engine.steps, shown(driver).steps
    assert driver.run(*(driver.submit(prompt, adapter) for prompt, adapter in wanted)) == expected
    merged, steps = shown(driver).steps - merged, driver.engine.steps - steps
    assert 16 <= merged <= 20
    assert 16 <= steps - merged <= 20


def test_cancelled_and_preempted_sequences_leave_nothing(make: Any) -> None:
    driver = make(kv_cache_memory=24 << 10, max_model_len=40, prefix_caching=False)
    assert driver.engine.pool.num_pages < 20
    prompts = [prompt_of(index) for index in range(6)]
    expected = [driver.generate(prompt, LORA) for prompt in prompts]
    heat(driver, LORA)
    before = driver.engine.scheduler.preemptions
    ids = [driver.submit(prompt, LORA) for prompt in prompts]
    doomed = driver.submit(prompts[0], LORA)
    driver.step()
    driver.engine.scheduler.cancel(doomed)
    assert driver.run(*ids) == expected
    assert driver.engine.scheduler.preemptions > before
    assert driver.engine.pool.used == 0


def test_scores_and_vectors_of_a_prompt_come_from_the_copy(make: Any) -> None:
    driver = make(prefix_caching=False)
    asked: list[dict[str, Any]] = [
        {"prompt_logprobs": 2, "max_tokens": 1},
        {"pooling": "mean", "max_tokens": 0},
    ]

    def answers() -> list[Any]:
        ids = [driver.submit(prompt_of(5), LORA, **each) for each in asked]
        driver.run(*ids)
        scores = [entry.logprob for item in driver.outputs[ids[0]] for entry in item.prompt_logprobs]
        return [
            torch.tensor(scores),
            torch.frombuffer(bytearray(driver.outputs[ids[1]][-1].pooled), dtype=torch.float32),
        ]

    expected = answers()
    heat(driver, LORA)
    steps = shown(driver).steps
    for found, wanted in zip(answers(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert shown(driver).steps > steps


def test_drafts_are_checked_on_the_copy(make: Any) -> None:
    driver = make()
    prompt = [7, 8, 9, 10] * 4
    expected = driver.generate(prompt, LORA, max_tokens=24)
    heat(driver, LORA)
    drafted, steps = driver.engine.draft_tokens, shown(driver).steps
    assert driver.generate(prompt, LORA, max_tokens=24, draft_tokens=4, prediction=expected) == expected
    assert driver.engine.draft_tokens > drafted
    assert 0 < shown(driver).steps - steps < 24


# ---- when it goes -----------------------------------------------------------------------------------


def running(driver: Any) -> str:
    """A long request that the copy has begun to answer."""
    identifier: str = driver.submit(prompt_of(1), LORA, max_tokens=40)
    while len(driver.tokens(identifier)) < 5:
        driver.step()
    assert driver.engine.scheduler.running[-1].merged
    return identifier


def test_under_memory_pressure_it_goes_at_once_and_tokens_go_on(make: Any) -> None:
    driver = make()
    expected = driver.generate(prompt_of(1), LORA, max_tokens=40)
    heat(driver, LORA)
    identifier = running(driver)
    driver.engine._hot._available = lambda: hot.MARGIN - 1
    driver.step()
    assert driver.engine.runner.copy is None
    assert (shown(driver).state, shown(driver).bytes, shown(driver).dropped) == ("watching", 0, {"memory": 1})
    assert driver.run(identifier) == [expected]
    driver.engine._hot._available = available_memory
    heat(driver, OTHER)


def test_without_memory_none_is_made(make: Any) -> None:
    driver = make()
    driver.engine._hot._available = lambda: hot.MARGIN + 1000
    heat(driver, LORA, until="watching")
    assert shown(driver).dropped == {"memory": 1}
    assert "must stay free" in shown(driver).note


def test_a_failure_is_told_and_does_not_end_the_engine(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(hot, "make_copy", fail)
    driver = make()
    heat(driver, LORA, until="watching")
    assert shown(driver).dropped == {"failed": 1}
    assert "can't allocate" in shown(driver).note


def test_when_others_take_over_its_sequences_end_on_it(make: Any) -> None:
    driver = make()
    expected = driver.generate(prompt_of(1), LORA, max_tokens=40)
    heat(driver, LORA)
    identifier = running(driver)
    driver.engine._hot._leave("minor", "others have most of the tokens")
    late = driver.submit(prompt_of(1), LORA, max_tokens=40)
    assert shown(driver).state == "leaving"
    assert driver.run(identifier, late) == [expected, expected]
    driver.step()
    assert (shown(driver).state, shown(driver).dropped) == ("watching", {"minor": 1})


def test_a_deleted_adapters_sequences_end_on_the_copy(make: Any) -> None:
    driver = make()
    expected = driver.generate(prompt_of(1), LORA, max_tokens=40)
    heat(driver, LORA)
    identifier = running(driver)
    assert driver.engine.handle(DropAdapter("d", LORA)) == []
    while not driver.finished(identifier):
        assert not any(isinstance(reply, Done) for reply in driver.step())
    assert driver.tokens(identifier) == expected
    replies: list[Any] = []
    while not replies:
        replies = driver.step()
    assert replies == [Done(call="d")]
    assert (driver.engine.runner.copy, shown(driver).dropped) == (None, {"deleted": 1})


def test_deleted_while_it_is_made(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    real = merged_copy.make_copy

    def slowly(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return real(*arguments)

    monkeypatch.setattr(hot, "make_copy", slowly)
    driver = make()
    heat(driver, LORA, until="making")
    assert begun.wait(60)
    assert driver.call(DropAdapter("d", LORA)) == Done(call="d")
    go_on.set()
    assert (shown(driver).state, shown(driver).dropped) == ("watching", {"deleted": 1})
    heat(driver, OTHER)  # the thread is free again


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_it_comes_with_traffic_and_stays_only_when_it_is_faster(make: Any, factor: float) -> None:
    """Steps are said to take a tenth of a second, those on the copy `factor` times as long."""
    driver = make(prefix_caching=False)
    driver.engine._hot._policy = policy = HotPolicy(window=1.0)
    real = policy.stepped
    policy.stepped = lambda tokens, seconds, merged: real(tokens, 0.1 * factor if merged else 0.1, merged)  # type: ignore[method-assign]
    for _ in range(100):
        driver.generate(prompt_of(0), LORA)
        if shown(driver).dropped or shown(driver).tokens_per_second is not None:
            break
    driver.step()
    if factor < 1:
        assert shown(driver).state == "serving", shown(driver)
        assert shown(driver).tokens_per_second == pytest.approx(2 * shown(driver).tokens_per_second_before)
    else:
        assert shown(driver).dropped == {"slower": 1}
        assert "before, in equal rounds" in shown(driver).note


# ---- settings ---------------------------------------------------------------------------------------


def test_off_unless_asked_for(make_engine: Callable[..., Any], base: Path) -> None:
    assert make_engine(base).engine.stats().hot_adapter is None


def test_an_engine_with_a_copy_is_freed_with_its_last_reference(make: Any) -> None:
    first = make()  # which the fixture refers to
    driver = type(first)(first.engine.config)
    heat(driver, LORA)
    driver.engine.close()
    engine = weakref.ref(driver.engine)
    del driver
    assert engine() is None


def test_refused_on_cuda(
    make_engine: Callable[..., Any], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.engine import engine

    monkeypatch.setattr(engine, "resolve_device", lambda name: torch.device("cuda:0"))
    with pytest.raises(InvalidRequest, match="on the CPU"):
        make_engine(base, hot_adapter_memory=1 << 20)


@pytest.mark.parametrize("version", [1, 2])
def test_the_containers_limit_counts(tmp_path: Path, version: int) -> None:
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    for name, text in zip(names, ("5000\n", "3000\n"), strict=True):
        (folder / name).write_text(text)
    (folder / "memory.stat").write_text("anon 7\ninactive_file 500\ntotal_inactive_file 500\n")
    assert available_memory(tmp_path) == 2500
    (folder / names[0]).write_text("max\n")
    assert available_memory(tmp_path) > 2500
