"""The engine with adapters in this process: mixed batches against PEFT, ends of sequences, memory, calls."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.engine.adapters import save_lora
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

from veneer.engine.messages import (
    CheckAdapter,
    Done,
    DropAdapter,
    Generate,
    PinAdapter,
    SamplingParams,
)

RANKS = (1, 4, 7, 16, 64)


def digest_of(rank: int) -> str:
    return f"{rank:064x}"


@pytest.fixture(scope="module")
def adapters(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's blobs: one random LoRA adapter of each rank for the tiny Llama, saved by PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    for rank in RANKS:
        targets: Any = "all-linear" if rank != 7 else ["q_proj", "down_proj", "lm_head"]
        folder = root / "blobs" / digest_of(rank)
        save_lora(folder, tiny_model("llama"), rank, target_modules=targets, lora_bias=rank == 4)
    return root


@pytest.fixture
def store(adapters: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(adapters, tmp_path / "store"))


class Peft:
    """Teacher-forced log probabilities of the tiny Llama with any of the adapters, by PEFT."""

    def __init__(self, folder: Path, adapters: Path) -> None:
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = PeftModel.from_pretrained(base, adapters / "blobs" / digest_of(1), digest_of(1))
        for rank in RANKS[1:]:
            self.model.load_adapter(adapters / "blobs" / digest_of(rank), digest_of(rank))
        self.model.eval()

    def logprobs(self, adapter: str | None, ids: list[int]) -> torch.Tensor:
        if adapter is not None:
            self.model.set_adapter(adapter)
        with torch.inference_mode(), self.model.disable_adapter() if adapter is None else nullcontext():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0], -1)


@pytest.fixture(scope="module")
def peft(tiny_model: Callable[[str], Path], adapters: Path) -> Peft:
    return Peft(tiny_model("llama"), adapters)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_mixed_batch_equals_alone_and_peft(
    prefix_caching: bool,
    tiny_model: Callable[[str], Path],
    store: Path,
    make_engine: Callable[..., Any],
    peft: Peft,
) -> None:
    folder = tiny_model("llama")
    driver = make_engine(folder, store=str(store), max_loras=2, prefix_caching=prefix_caching)
    choices = [None, *map(digest_of, RANKS)] * 3
    prompts = [[3 + i, 9, 27, 81, 5, 25, 3 + i % 2] + [40 + i] * (i % 5) for i in range(len(choices))]
    pairs = list(zip(prompts, choices, strict=True))
    ids = [driver.submit(prompt, adapter, logprobs=3) for prompt, adapter in pairs]
    together = driver.run(*ids)
    assert together == [driver.generate(prompt, adapter) for prompt, adapter in pairs]
    for identifier, (prompt, adapter), tokens in zip(ids, pairs, together, strict=True):
        expected = peft.logprobs(adapter, prompt + tokens)[len(prompt) - 1 : -1]
        found = [item.logprobs[0] for item in driver.outputs[identifier]]
        own = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert torch.tensor([entry.logprob for entry in found]) == pytest.approx(own, abs=1e-4)
        top = torch.tensor([entry.top_logprobs for entry in found])
        assert (top - expected.topk(3).values).abs().max() < 1e-4
    assert len({tuple(tokens) for tokens in together}) > len(RANKS)
    assert sum(entry.evictions for entry in driver.engine.stats().adapters.values()) > 0


def test_base_is_resident_once(tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]) -> None:
    def weights_alive() -> int:
        """Bytes of distinct storages of all live tensors of two dimensions and more."""
        gc.collect()
        found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.ndim >= 2]
        tensors = [t for t in found if not (t.is_meta or isinstance(t, FakeTensor))]  # those have no bytes
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    before = weights_alive()
    driver = make_engine(tiny_model("llama-tied"), kv_cache_memory=1 << 20, adapter_memory=1 << 16)
    engine = driver.engine
    driver.generate([5, 6, 7])
    step, size = engine.base.context, engine.base.memory_bytes()
    buffers = [step.added, step.tables.entries, step.tables.entries_host, *chain(*step.kv_cache)]
    # tiles and norms (one dimension) are small beside the weights
    assert abs(weights_alive() - before - sum(each.nbytes for each in buffers) - size) < 0.1 * size


def test_an_engine_is_freed_with_its_last_reference(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    first = make_engine(tiny_model("llama"))  # which the fixture refers to
    driver = type(first)(first.engine.config)
    driver.generate([5, 6, 7])
    driver.engine.close()
    engine = weakref.ref(driver.engine)
    del driver
    assert engine() is None


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_base_is_resident_once(
    quantization: str, tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), quantization=quantization)
    base = driver.engine.base
    linears = sum(s.in_features * s.out_features for name, s in base.sites.items() if name != "lm_head")
    others = 4 * (2 * 128 * 64 + 7 * 64)  # embedding, head and norms in float32
    bits = 4.6 if quantization == "nf4" else 8.3
    code_tables = 2048 * len(base.sites)  # bitsandbytes keeps its code tables for each layer
    assert others < base.memory_bytes() < others + linears * bits / 8 + code_tables
    first = driver.generate([5, 6, 7, 8])
    assert driver.generate([5, 6, 7, 8]) == first


def test_ends_of_sequences(tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]) -> None:
    driver = make_engine(tiny_model("llama"))
    free = driver.generate([9, 8, 7], max_tokens=12)
    stop = free[4]
    stopped = driver.submit([9, 8, 7], max_tokens=12, stop_token_ids=[stop])
    tokens = driver.run(stopped)[0]
    assert tokens == free[: free.index(stop) + 1]
    last = driver.outputs[stopped][-1]
    assert (last.finish_reason, last.stop_token) == ("stop", stop)
    driver.engine.base.eos_token_ids = (stop,)
    assert driver.generate([9, 8, 7], max_tokens=12, ignore_eos=False) == tokens
    later = driver.generate([9, 8, 7], max_tokens=12, ignore_eos=False, min_tokens=9)
    assert len(later) >= 9
    assert stop not in later[:9]
    short = make_engine(tiny_model("llama"), max_model_len=8)
    limited = short.submit([9, 8, 7], max_tokens=100)
    assert len(short.run(limited)[0]) == 5
    assert short.outputs[limited][-1].finish_reason == "length"


def test_refusals_are_answers(tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]) -> None:
    driver = make_engine(tiny_model("llama"), max_model_len=16, max_queue=1)
    too_long = driver.submit(list(range(3, 40)))
    assert driver.outputs[too_long][-1].error.code == "context_length_exceeded"
    driver.submit([3, 4])
    full = driver.submit([3, 4])
    assert driver.outputs[full][-1].error.status == 429
    late = make_engine(tiny_model("llama"))
    identifier = late.submit([3, 4], max_tokens=5)
    late.engine.scheduler.waiting[0].deadline = 0.0
    late.run(identifier)
    assert late.outputs[identifier][-1].error.code == "deadline_exceeded"
    unknown = late.submit([3, 4], adapter="f" * 64)
    late.run(unknown)
    assert late.outputs[unknown][-1].error is not None
    assert late.generate([3, 4], max_tokens=2)


def test_seeded_sampling_ignores_the_batch_and_preemption(
    tiny_model: Callable[[str], Path], store: Path, make_engine: Callable[..., Any]
) -> None:
    folder = tiny_model("llama")
    wide = make_engine(folder, store=str(store))
    asks = [([7 + i, 50, 3], digest_of(RANKS[i % 5]) if i % 3 else None, i) for i in range(9)]
    alone = [wide.generate(p, a, temperature=1.0, seed=s, top_p=0.9, max_tokens=20) for p, a, s in asks]
    page = 2 * 3 * 4 * 2 * 16 * 4  # K and V, layers, tokens, heads, head_dim, float32
    narrow = make_engine(folder, store=str(store), kv_cache_memory=14 * page, max_num_batched_tokens=8)
    ids = [narrow.submit(p, a, temperature=1.0, seed=s, top_p=0.9, max_tokens=20) for p, a, s in asks]
    assert narrow.run(*ids) == alone
    assert narrow.engine.scheduler.preemptions > 0


def test_adapter_calls(
    tiny_model: Callable[[str], Path], store: Path, tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(store), max_loras=2)
    staged = store / "blobs" / digest_of(4)
    reply = driver.call(CheckAdapter("c1", str(staged), digest_of(4)))
    assert reply.error is None
    assert (reply.info.kind, reply.info.rank) == ("lora", 4)
    assert reply.info.primitives == ["low_rank", "bias"]
    assert reply.info.portability == "independent"
    assert reply.info.effect > 1e-3
    assert reply.info.warnings == []

    assert driver.call(PinAdapter("p1", digest_of(4), True)).error is None
    refused = driver.call(PinAdapter("p2", digest_of(7), True))
    assert refused.error.status == 409

    broken = Path(shutil.copytree(staged, tmp_path / "broken"))
    weights = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(weights[:-10])
    refused = driver.call(CheckAdapter("c2", str(broken), "e" * 64))
    assert refused.error.status == 400
    assert "adapter_model.safetensors" in refused.error.message

    running = driver.submit([5, 6], digest_of(16), max_tokens=30)
    while not driver.tokens(running):
        driver.step()
    assert driver.engine.handle(DropAdapter("d1", digest_of(16))) == []  # it waits for its user
    answers: list[Any] = []
    for _ in range(1000):
        answers += [reply for reply in driver.step() if isinstance(reply, Done)]
        if answers:
            break
    assert driver.finished(running)
    assert len(driver.tokens(running)) == 30
    assert digest_of(16) not in driver.engine.residency.stats()


def test_an_adapter_that_changes_nothing_is_refused_unless_allowed(
    tiny_model: Callable[[str], Path], tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "zero")
    driver = make_engine(tiny_model("llama"))
    (Path(driver.engine.config.store) / "blobs").mkdir(parents=True)
    refused = driver.call(CheckAdapter("c", str(tmp_path / "zero"), "a" * 64))
    assert refused.error.status == 400
    assert "changes nothing" in refused.error.message
    assert "allow_ineffective" in refused.error.message
    reply = driver.call(CheckAdapter("d", str(tmp_path / "zero"), "a" * 64, allow_ineffective=True))
    assert any("changes nothing" in warning for warning in reply.info.warnings)
    assert reply.info.effect < 1e-4


def test_chores_wait_until_there_was_nothing_to_do_for_a_while(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama")).engine
    now, done = 1000.0, list[str]()
    monkeypatch.setattr("veneer.engine.engine.time.monotonic", lambda: now)

    def fail() -> None:
        done.append("second")
        raise RuntimeError("out of memory")  # is logged, and nothing else

    engine.runner.chores += [lambda: done.append("first"), fail]
    engine.handle(Generate(id="r", prompt=[5], sampling=SamplingParams(max_tokens=2, temperature=0.0)))
    for passed, more, expected in (
        (10.0, True, []),  # it runs
        (10.0, True, []),
        (2.9, False, []),
        (0.2, True, ["first"]),
        (0.0, False, ["first", "second"]),
        (9.0, False, ["first", "second"]),
    ):
        now += passed
        assert engine.step()[1] == more
        assert done == expected
