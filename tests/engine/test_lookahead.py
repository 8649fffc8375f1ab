"""Steps launched before the last one's tokens are known: the same answers, and nothing left over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.adapters import PAGE, save_lora

from veneer.engine.graphs import DecodeGraphs, Variant, _Captured, buckets_up_to
from veneer.engine.messages import Cancel, Done, DropAdapter, SequenceOutput
from veneer.engine.step_tables import LENGTHS
from veneer.kernels.tables import Segment

ADAPTERS = [f"{rank:064x}" for rank in (2, 5, 16)]


@pytest.fixture(scope="module")
def store(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store's folder with random adapters of the tiny Llama."""
    root = tmp_path_factory.mktemp("store")
    for digest in ADAPTERS:
        save_lora(root / "blobs" / digest, tiny_model("llama"), int(digest, 16))
    return str(root)


@pytest.fixture
def engines(
    tiny_model: Callable[[str], Path], store: str, make_engine: Callable[..., Any]
) -> Callable[..., Any]:
    """A function: config fields -> Driver on the tiny Llama and the store of adapters."""
    return lambda **fields: make_engine(tiny_model("llama"), **{"store": store, **fields})


def count_ahead(driver: Any) -> list[int]:
    """Each element of the list, which grows, is the rows of a step that was launched ahead."""
    launches: list[int] = []
    launch = driver.engine.runner.launch

    def counting(batch: Any, previous: Any = None) -> Any:
        if previous is not None:
            launches.append(len(batch.items))
        return launch(batch, previous)

    driver.engine.runner.launch = counting
    return launches


def requests(free: list[int]) -> list[tuple[list[int], str | None, dict[str, Any]]]:
    """Prompt, adapter and sampling of every kind of request. `free` is what the first one says unhindered."""
    stop, late = free[5], free[9]
    first = [9, 8, 7]
    return [
        (first, None, {"max_tokens": 20}),
        (first, None, {"max_tokens": 20, "stop_token_ids": [stop]}),
        (first, None, {"max_tokens": 20, "stop_token_ids": [stop, late], "min_tokens": 8}),
        (first, None, {"max_tokens": 1}),
        (first, None, {"max_tokens": 2, "logprobs": 3}),
        ([5] * 19, ADAPTERS[0], {"max_tokens": 17}),
        ([6, 7], ADAPTERS[1], {"max_tokens": 23, "temperature": 1.0, "seed": 5, "logprobs": 0}),
        ([6, 7], ADAPTERS[1], {"max_tokens": 9, "temperature": 0.8, "seed": 6, "top_p": 0.8, "top_k": 9}),
        ([8, 9, 3, 4], ADAPTERS[2], {"max_tokens": 20, "temperature": 1.2, "seed": 7, "min_p": 0.05}),
        (first, None, {"max_tokens": 20, "repetition_penalty": 1.4, "logprobs": 2}),
        (first, ADAPTERS[2], {"max_tokens": 20, "frequency_penalty": 1.1, "presence_penalty": 0.7}),
        ([6, 6], None, {"max_tokens": 15, "temperature": 1.0, "seed": 8, "frequency_penalty": 2.0}),
        ([4, 4], ADAPTERS[0], {"max_tokens": 12, "logit_bias": {3: 1.5, 11: -4.0}}),
    ]


def answers(driver: Any, asked: list[Any]) -> list[list[SequenceOutput]]:
    """Submit the requests over some steps and finish them; their outputs."""
    ids = []
    for number, (prompt, adapter, sampling) in enumerate(asked):
        ids.append(driver.submit(prompt, adapter, **sampling))
        if number % 3 == 2:
            driver.step()
            driver.step()
    driver.run(*ids)
    assert not driver.engine.scheduler.running
    while driver.engine.has_work:
        driver.step()
    assert driver.engine.pool.used == 0
    return [driver.outputs[i] for i in ids]


def assert_same(found: list[list[SequenceOutput]], expected: list[list[SequenceOutput]]) -> None:
    """Tokens and ends are equal; log probabilities as near as different batches allow."""
    for mine, others in zip(found, expected, strict=True):
        assert [item.tokens for item in mine] == [item.tokens for item in others]
        assert [(i.finish_reason, i.stop_token) for i in mine] == [
            (i.finish_reason, i.stop_token) for i in others
        ]
        for entry, other in zip(
            (e for i in mine for e in i.logprobs), (e for i in others for e in i.logprobs), strict=True
        ):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert entry.top_ids == other.top_ids
            assert entry.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_loras": 2, "slot_patience": 0.0},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 8},
        {"kv_cache_memory": 14 * PAGE},
        {"kv_cache_memory": 14 * PAGE, "prefix_caching": False, "max_num_batched_tokens": 8},
    ],
    ids=str,
)
def test_lookahead_changes_no_answer(engines: Callable[..., Any], fields: dict[str, Any]) -> None:
    plain = engines(lookahead=False)
    asked = requests(plain.generate([9, 8, 7], max_tokens=20))
    never = count_ahead(plain)
    expected = answers(plain, asked)
    assert {items[-1].finish_reason for items in expected} == {"stop", "length"}
    assert never == []
    driver = engines(lookahead=True, **fields)
    launches = count_ahead(driver)
    assert_same(answers(driver, asked), expected)
    assert len(launches) > 10
    assert max(launches) > 1
    if "kv_cache_memory" in fields:
        assert driver.engine.scheduler.preemptions > 0


def test_the_cpu_looks_ahead_only_when_told(engines: Callable[..., Any]) -> None:
    driver = engines()
    launches = count_ahead(driver)
    driver.generate([3, 4], max_tokens=5)
    assert launches == []


def test_lookahead_computes_nothing_after_a_certain_end(engines: Callable[..., Any]) -> None:
    driver = engines(lookahead=True)
    driver.generate([3, 4], max_tokens=6)
    assert not driver.engine.has_work
    assert (driver.engine.steps, driver.engine.decode_tokens) == (6, 5)


def test_one_cancelled_in_flight_is_heard_of_no_more(engines: Callable[..., Any]) -> None:
    expected = engines().generate([5, 6, 7], ADAPTERS[0], max_tokens=20)
    driver = engines(lookahead=True)
    gone = driver.submit([3, 4], ADAPTERS[1], max_tokens=40)
    kept = driver.submit([5, 6, 7], ADAPTERS[0], max_tokens=20)
    while (
        len(driver.tokens(gone)) < 3 or driver.engine._ahead is None
    ):  # a load that ends stops it for a step
        driver.step()
    driver.engine.handle(Cancel(gone))
    said = len(driver.outputs[gone])
    again = driver.submit([3, 4], ADAPTERS[1], max_tokens=4)
    assert driver.run(kept)[0] == expected
    assert driver.run(again)[0] == driver.tokens(gone)[:3] + driver.tokens(again)[3:]
    assert len(driver.outputs[gone]) == said


def test_what_is_in_flight_is_work(engines: Callable[..., Any]) -> None:
    driver = engines(lookahead=True)
    identifier = driver.submit([3, 4], max_tokens=40)
    driver.step()
    driver.engine.handle(Cancel(identifier))
    assert not driver.engine.scheduler.running
    assert driver.engine.has_work
    assert driver.engine.step() == ([], True)
    assert not driver.engine.has_work
    assert driver.engine.step() == ([], False)


def test_a_deadline_passes_in_flight(engines: Callable[..., Any]) -> None:
    driver = engines(lookahead=True)
    identifier = driver.submit([3, 4], max_tokens=40)
    driver.step()
    driver.engine.scheduler.running[0].deadline = time.monotonic() - 1
    driver.run(identifier)
    tokens, error = driver.outputs[identifier]
    assert len(tokens.tokens) == 1
    assert error.error.code == "deadline_exceeded"
    driver.step()
    assert not driver.engine.has_work


def test_an_adapter_dropped_in_flight_serves_its_user_first(engines: Callable[..., Any]) -> None:
    expected = engines().generate([3, 4], ADAPTERS[0], max_tokens=12)
    driver = engines(lookahead=True)
    identifier = driver.submit([3, 4], ADAPTERS[0], max_tokens=12)
    while not driver.tokens(identifier):
        driver.step()
    assert driver.engine.handle(DropAdapter("drop", ADAPTERS[0])) == []
    replies: list[Any] = []
    for _ in range(500):
        replies += [reply for reply in driver.step() if isinstance(reply, Done)]
        if replies:
            break
    assert [reply.error for reply in replies] == [None]
    assert driver.tokens(identifier) == expected


def test_an_engine_with_a_step_in_flight_can_be_closed(engines: Callable[..., Any]) -> None:
    driver = engines(lookahead=True)
    driver.submit([3, 4], max_tokens=40)
    driver.step()
    driver.engine.close()
    assert driver.engine._ahead is None


class Replay:
    """In place of a captured graph: the forward over the static tables, each time anew, on the CPU.

    The torch kernels go by host lists, which a graph has not; here they are read back from the tables.
    """

    def __init__(self, graphs: DecodeGraphs, bucket: int, adapted: bool, vocabulary: int) -> None:
        self.graphs, self.bucket, self.adapted = graphs, bucket, adapted
        self.replays = 0
        self.captured = _Captured(
            self,  # type: ignore[arg-type]
            torch.empty(bucket, vocabulary),
            torch.empty(bucket, dtype=torch.int64),
        )

    def replay(self) -> None:
        self.replays += 1
        graphs = self.graphs
        graphs._bind(self.bucket, Variant(self.adapted))
        step, tables = graphs._base.context, graphs._tables
        assert step.rows is not None
        assert step.batch is not None
        tiles = step.rows.tiles[: int(step.rows.used)].tolist()
        assert any(slot >= 0 for slot, _, _ in tiles) == self.adapted
        segments = tuple(Segment(slot, first, first + rows) for slot, first, rows in tiles)
        step.rows = step.head_rows = replace(step.rows, segments=segments)
        step.batch = replace(step.batch, kv_lens=tables.rows[LENGTHS, : self.bucket].tolist())
        logits, ids = graphs._forward(self.bucket)
        self.captured.logits.copy_(logits)
        self.captured.ids.copy_(ids)


def replay_on_cpu(driver: Any) -> list[Replay]:
    """Let an engine on the CPU run its decode steps as on a GPU, but for the capture."""
    engine = driver.engine
    runner = engine.runner
    graphs = DecodeGraphs(
        engine.base,
        runner._tokens,
        page_size=engine.config.page_size,
        scratch_page=engine.pool.num_pages,
        max_pages=-(-engine.max_model_len // engine.config.page_size),
        max_batch=7,
        slots=engine.config.max_loras,
    )
    graphs._tables.buffer.fill_(1 << 30)  # whatever a step does not set would be far out of range
    vocabulary = engine.base.config.vocab_size
    made = [Replay(graphs, b, adapted, vocabulary) for b in buckets_up_to(7) for adapted in (False, True)]
    graphs._captured = {(replay.bucket, Variant(replay.adapted)): replay.captured for replay in made}
    runner.graphs = graphs
    return made


@pytest.mark.parametrize("lookahead", [False, True])
def test_the_static_tables_say_what_the_lists_say(engines: Callable[..., Any], lookahead: bool) -> None:
    """Everything of a graphed step but the capture: tables, buckets, padding, tokens taken from the device."""
    plain = engines(lookahead=False)
    asked = requests(plain.generate([9, 8, 7], max_tokens=20))
    expected = answers(plain, asked)
    driver = engines(lookahead=lookahead, kv_cache_memory=20 * PAGE, max_num_seqs=9)
    replays = replay_on_cpu(driver)
    assert_same(answers(driver, asked), expected)
    assert driver.engine.scheduler.preemptions > 0
    used = [replay for replay in replays if replay.replays]
    assert len({replay.bucket for replay in used}) >= 3
    assert {replay.adapted for replay in used} == {False, True}
    assert_same(answers(driver, asked[:3]), expected[:3])  # over tables that others have used


def test_only_the_used_front_of_the_tables_is_copied(engines: Callable[..., Any]) -> None:
    driver = engines()
    (replay, *_) = replay_on_cpu(driver)
    tables = replay.graphs._tables
    fixed = tables.rows.numel() + tables.tiles.numel()
    assert tables.used(0) == fixed
    assert tables.used(3) == fixed + 3 * tables.block_table.shape[1]
    driver.generate([3] * 9, max_tokens=5)  # 13 tokens need 4 pages of 4
    copied = tables.buffer != 1 << 30
    assert copied[: tables.used(4)].all()
    assert not copied[tables.used(4) :].any()


@contextmanager
def forbid_synchronizing() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_gpu_answers_are_those_of_eager_steps(engines: Callable[..., Any], enforce_eager: bool) -> None:
    fields: dict[str, Any] = {"device": "cuda", "page_size": 16, "kv_cache_memory": 40 * 4 * PAGE}
    plain = engines(lookahead=False, enforce_eager=True, **fields)
    asked = requests(plain.generate([9, 8, 7], max_tokens=20))
    driver = engines(enforce_eager=enforce_eager, **fields)
    launches = count_ahead(driver)
    assert_same(answers(driver, asked), answers(plain, asked))
    assert len(launches) > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_decode_steps_never_synchronize(engines: Callable[..., Any]) -> None:
    """Every kind of sampling, in graphed steps with and without adapters; only results are waited for."""
    driver = engines(device="cuda", page_size=16, kv_cache_memory=40 * 4 * PAGE)
    asked = requests(driver.generate([9, 8, 7], max_tokens=20))
    ids = [driver.submit(prompt, adapter, **{**s, "max_tokens": 30}) for prompt, adapter, s in asked]
    engine = driver.engine
    steps = 0
    while not all(driver.finished(i) for i in ids):
        if engine._ahead is not None and not engine.scheduler.waiting:
            with forbid_synchronizing():
                driver.step()
            steps += 1
        else:
            driver.step()
    assert steps > 15
