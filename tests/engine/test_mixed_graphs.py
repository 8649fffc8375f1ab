"""Steps with prompt chunks in static tables: the same logits, keys and tokens as eager steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language  # noqa: F401  before the patch: only our own kernels are to be interpreted
from peft import VeraConfig
from tests.engine.adapters import PAGE, load, save_lora, save_random

from veneer.engine.graphs import MixedGraphs, Variant, _Captured
from veneer.kernels.attention import PagedBatch, paged_attention_torch, paged_attention_triton
from veneer.kernels.tables import RowTiles, Segment

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.attention  # noqa: F401

ADAPTERS = [f"{rank:064x}" for rank in (2, 5, 16)]
KIN = [f"{seed:064x}" for seed in (100, 101, 102)]  # VeRAs that share their factors
POISON = 1 << 30  # far out of every range


@pytest.fixture(scope="module")
def stores(make_stores: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """A function: architecture -> folder of a store with random adapters of the tiny model."""

    def write(base: Path, blobs: Path) -> None:
        for digest in ADAPTERS:
            save_lora(blobs / digest, base, int(digest, 16))
        for digest in KIN:
            config = VeraConfig(r=9, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
            save_random(blobs / digest, load(base), config, seed=int(digest, 16))

    return make_stores(write)


Ask = tuple[list[int], str | None, dict[str, Any]]


def requests(distinct: list[str] = ADAPTERS) -> list[Ask]:
    """Prompts of many lengths for the base and three adapters, and each kind of sampling."""
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 3},
        {"temperature": 1.0, "seed": 5, "logprobs": 0},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
    ]
    adapters = [None, *distinct]
    return [
        (
            [3 + (i * 7 + j * (i + 1)) % 120 for j in range(1 + (i * 5) % 23)],
            adapters[(i + i // 4) % 4],
            {"max_tokens": 4 + i % 5, **kinds[i % 3 if i % 7 else 3]},
        )
        for i in range(18)
    ]


def answer(driver: Any, asked: list[Ask], every: int) -> list[list[Any]]:
    """Submit a request every so many steps, so that prompts join others' decoding; the outputs of each."""
    ids = []
    for prompt, adapter, sampling in asked:
        ids.append(driver.submit(prompt, adapter, **sampling))
        for _ in range(every):
            driver.step()
    driver.run(*ids)
    return [driver.outputs[identifier] for identifier in ids]


def tokens_of(answers: list[list[Any]]) -> list[list[int]]:
    return [[token for item in items for token in item.tokens] for items in answers]


class Replay:
    """In place of a captured graph: the forward over the static tables, each time anew, on the CPU.

    The torch kernels go by host lists, which a graph has not; here they are read back from the tables.
    """

    def __init__(self, graphs: MixedGraphs, bucket: int, variant: Variant, vocabulary: int) -> None:
        self.graphs, self.bucket, self.variant = graphs, bucket, variant
        self.batches: list[tuple[PagedBatch, PagedBatch]] = []  # as bound, and with what the lists would say
        width = graphs._sequences
        self.captured = _Captured(
            self,  # type: ignore[arg-type]
            torch.empty(width, vocabulary),
            torch.empty(width, dtype=torch.int64),
        )

    def replay(self) -> None:
        graphs, step = self.graphs, self.graphs._base.context
        graphs._bind(self.bucket, self.variant)
        assert step.batch is not None
        starts = step.batch.query_start.tolist()
        exact = replace(
            step.batch,
            query_lens=[after - before for before, after in pairwise(starts)],
            kv_lens=step.batch.kv_len.tolist(),
        )
        assert max(exact.kv_lens) <= max(step.batch.kv_lens)
        assert len(exact.query_lens) == len(step.batch.query_lens)
        # attention launches a kernel for one row each and a kernel for more
        assert {1, self.bucket} == set(step.batch.query_lens)
        assert all(n or keys == 1 for n, keys in zip(exact.query_lens, exact.kv_lens, strict=True))
        self.batches.append((step.batch, exact))
        step.batch = exact
        step.rows = listed(step.rows, starts[-1])
        step.head_rows = listed(step.head_rows, None)
        logits, ids = graphs._forward(self.bucket)
        self.captured.logits.copy_(logits)
        self.captured.ids.copy_(ids)


def listed(rows: RowTiles | None, count: int | None) -> RowTiles:
    """The tiles with host lists; they cover `count` rows in order, however many when it is None."""
    assert rows is not None
    assert rows.adapted
    tiles = rows.tiles[: int(rows.used)].tolist()
    segments = tuple(Segment(slot, first, first + height) for slot, first, height in tiles)
    stops = [0, *(segment.stop for segment in segments)]
    assert [segment.start for segment in segments] == stops[:-1]
    assert all(height <= rows.tile_rows for _, _, height in tiles)
    assert count in (None, stops[-1])
    return replace(rows, segments=segments)


def replay_on_cpu(
    driver: Any, max_batch: int = 7, variants: tuple[Variant, ...] = (Variant.ADAPTED,)
) -> list[Replay]:
    """Let an engine on the CPU run all its steps as mixed ones run on a GPU, but for the capture."""
    engine = driver.engine
    graphs = MixedGraphs(
        engine.base,
        engine.runner._tokens,
        page_size=engine.config.page_size,
        scratch_page=engine.pool.num_pages,
        max_pages=-(-engine.max_model_len // engine.config.page_size),
        max_batch=max_batch,
        max_rows=512,
        slots=engine.config.max_loras,
    )
    graphs._tables.buffer.fill_(POISON)  # what a step does not set would be noticed
    for cache in (cache for layer in engine.base.context.kv_cache for cache in layer):
        cache[-1] = float("nan")  # the page of rows that pad
    vocabulary = engine.base.config.vocab_size
    made = [Replay(graphs, bucket, each, vocabulary) for each in variants for bucket in graphs._buckets]
    graphs._captured = {(replay.bucket, replay.variant): replay.captured for replay in made}
    engine.runner.mixed_graphs = graphs
    return made


def check_each_step(driver: Any) -> Counter[str]:
    """Compare each step with the eager one on the same caches; counts what the steps had."""
    runner, seen = driver.engine.runner, Counter[str]()
    caches = [cache for layer in driver.engine.base.context.kv_cache for cache in layer]
    run = runner.mixed_graphs.run

    def checked(planned: Any, previous: Any) -> Any:
        before = [cache.clone() for cache in caches]
        logits, last, _ = runner.forward(planned, previous)
        expected = [cache.clone() for cache in caches]
        for cache, old in zip(caches, before, strict=True):
            cache.copy_(old)
        found, ids = run(planned, previous)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        assert ids.tolist() == last.tolist()
        assert runner._tokens[: len(found)].tolist() == found.argmax(-1).tolist()
        for cache, other in zip(caches, expected, strict=True):
            torch.testing.assert_close(cache[:-1], other[:-1], rtol=1e-4, atol=1e-4)
        chunks = [item for item in planned if item.count > 1]
        seen["steps"] += 1
        seen["chunks beside decode rows"] += 0 < len(chunks) < len(planned)
        seen["several chunks"] += len(chunks) > 1
        seen["chunk goes on"] += any(item.start > 0 for item in chunks)
        seen["chunk that does not sample"] += any(not item.samples for item in planned)
        seen["one row that does not sample"] += any(i.count == 1 and not i.samples for i in planned)
        seen["base and adapters"] += len({item.sequence.slot for item in planned}) > 2
        seen["tokens from the device"] += previous is not None
        seen["drafts"] += any(item.draft for item in planned)
        return found, ids

    runner.mixed_graphs.run = checked
    return seen


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"lookahead": True}, ["chunks beside decode rows", "base and adapters", "tokens from the device"]),
        ({"max_num_batched_tokens": 9}, ["chunk that does not sample", "chunk goes on"]),
        (
            {"max_num_batched_tokens": 7, "kv_cache_memory": 16 * PAGE},
            ["one row that does not sample", "several chunks"],
        ),
    ],
    ids=str,
)
def test_every_step_is_the_eager_one(
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], str],
    make_engine: Callable[..., Any],
    fields: dict[str, Any],
    wanted: list[str],
) -> None:
    model, store = tiny_model("llama"), str(stores("llama"))
    asked = requests()
    expected = answer(make_engine(model, store=store, lookahead=False), asked, every=1)
    fields = {"kv_cache_memory": 60 * PAGE, "max_num_seqs": 7, **fields}
    driver = make_engine(model, store=store, **fields)
    for adapter in ADAPTERS:  # resident from here on, so that the steps are the same each time
        driver.generate([3], adapter, max_tokens=1)
    replay_on_cpu(driver)
    seen = check_each_step(driver)
    assert tokens_of(answer(driver, asked, every=1)) == tokens_of(expected)
    assert all(seen[what] for what in wanted), seen
    assert seen["steps"] == driver.engine.runner.mixed_graphs.replays


def test_steps_of_kin_are_the_eager_ones(
    tiny_model: Callable[[str], Path], stores: Callable[[str], str], make_engine: Callable[..., Any]
) -> None:
    """Rows and sampled rows of several adapters in one tile, chunks and tokens from the device among them."""
    model, store = tiny_model("llama"), str(stores("llama"))
    asked = requests([*KIN[:2], ADAPTERS[0]])
    expected = answer(make_engine(model, store=store, lookahead=False), asked, every=1)
    driver = make_engine(model, store=store, lookahead=True, max_num_seqs=7)
    for adapter in (*KIN, ADAPTERS[0]):
        driver.generate([3], adapter, max_tokens=1)
    replays = replay_on_cpu(driver, variants=(Variant.ADAPTED, Variant.SHARED))
    seen = check_each_step(driver)
    assert tokens_of(answer(driver, asked, every=1)) == tokens_of(expected)
    assert {replay.variant for replay in replays if replay.batches} == {Variant.ADAPTED, Variant.SHARED}
    assert min(seen["chunks beside decode rows"], seen["tokens from the device"]) > 0
    step = driver.engine.base.context
    driver.run(*(driver.submit([5, 6, 7], adapter, max_tokens=1) for adapter in KIN))
    for rows, each in ((step.rows, 3), (step.head_rows, 1)):
        assert len(rows.segments) == 1
        assert rows.row_slots[: 3 * each].reshape(3, -1).unique(dim=1).shape == (3, 1)
        assert len(rows.row_slots[: 3 * each].unique()) == 3


@pytest.mark.parametrize("lookahead", [False, True])
def test_steps_with_drafts_are_the_eager_ones(
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], str],
    make_engine: Callable[..., Any],
    lookahead: bool,
) -> None:
    model, store = tiny_model("llama"), str(stores("llama"))
    asked = requests()
    expected = answer(make_engine(model, store=store, lookahead=False), asked, every=1)
    driver = make_engine(model, store=store, lookahead=lookahead, max_num_seqs=7)
    for adapter in ADAPTERS:
        driver.generate([3], adapter, max_tokens=1)
    replay_on_cpu(driver)
    seen = check_each_step(driver)
    drafted = [
        (prompt, adapter, {**sampling, "draft_tokens": 4, "prediction": [*tokens[:3], 5, *tokens[3:]]})
        for (prompt, adapter, sampling), tokens in zip(asked, tokens_of(expected), strict=True)
    ]
    assert tokens_of(answer(driver, drafted, every=1)) == tokens_of(expected)
    assert seen["drafts"] > 0
    assert seen["steps"] == driver.engine.runner.mixed_graphs.replays
    assert driver.engine.accepted_draft_tokens > 0


def test_the_smallest_bucket_is_taken_and_larger_steps_are_eager(
    tiny_model: Callable[[str], Path], stores: Callable[[str], str], make_engine: Callable[..., Any]
) -> None:
    fields = {"max_num_batched_tokens": 800, "prefix_caching": False}
    driver = make_engine(tiny_model("llama"), store=str(stores("llama")), **fields)
    replays = replay_on_cpu(driver, max_batch=4)
    assert [replay.bucket for replay in replays] == [16, 64, 128, 256, 512]
    seen = check_each_step(driver)

    def rows(*counts: int) -> list[int]:
        """Replays of each bucket in one step of prompts of these lengths."""
        before = [len(replay.batches) for replay in replays]
        asked = [
            driver.submit([3 + (7 * i + j * (i + 2)) % 120 for j in range(count)], adapter, max_tokens=1)
            for i, (count, adapter) in enumerate(zip(counts, [*ADAPTERS, None] * 2, strict=False))
        ]
        driver.run(*asked)
        return [len(replay.batches) - start for replay, start in zip(replays, before, strict=True)]

    for adapter in ADAPTERS:  # so that they are resident, and prompts come in one step
        driver.generate([5], adapter, max_tokens=1)
    assert rows(3, 9) == [1, 0, 0, 0, 0]
    assert rows(4, 10, 3) == [0, 1, 0, 0, 0]
    assert rows(100, 28) == [0, 0, 1, 0, 0]
    assert rows(101, 29) == [0, 0, 0, 1, 0]
    assert rows(102, 153, 2) == [0, 0, 0, 0, 1]
    assert rows(200, 103, 104, 105) == [0, 0, 0, 0, 1]
    assert rows(200, 201, 106, 107) == [0] * 5  # more rows
    assert rows(4, 5, 6, 7, 8) == [0] * 5  # more sequences
    assert [rows(5), rows(6)] == [[1, 0, 0, 0, 0]] * 2  # over tables of larger steps, on both hosts
    assert seen["several chunks"] == 6


def test_decode_steps_keep_their_own_graphs(
    tiny_model: Callable[[str], Path], stores: Callable[[str], str], make_engine: Callable[..., Any]
) -> None:
    class Decode:
        """Takes what `DecodeGraphs.fits` would, and runs it eagerly."""

        taken = 0

        def fits(self, planned: Any) -> bool:
            return all(item.count == 1 and item.samples for item in planned)

        def run(self, planned: Any, previous: Any) -> Any:
            self.taken += 1
            logits, last, _ = driver.engine.runner.forward(planned, previous)
            torch.argmax(logits, -1, out=driver.engine.runner._tokens[: len(logits)])
            return logits, last

    driver = make_engine(tiny_model("llama"), store=str(stores("llama")))
    replay_on_cpu(driver)
    driver.engine.runner.graphs = decode = Decode()
    driver.generate([3, 4, 5], ADAPTERS[0], max_tokens=6)
    assert (decode.taken, driver.engine.runner.mixed_graphs.replays) == (5, 1)


def test_steps_that_score_a_prompt_are_eager(
    tiny_model: Callable[[str], Path], stores: Callable[[str], str], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(stores("llama")), max_num_batched_tokens=8)
    replays = replay_on_cpu(driver)
    before = driver.engine.runner.eager_steps
    driver.generate([3 + index for index in range(20)], max_tokens=4, prompt_logprobs=1)
    assert driver.engine.runner.eager_steps - before == 3  # chunks
    assert sum(len(replay.batches) for replay in replays) == 3  # of decoding


@pytest.mark.skipif(CUDA, reason="the kernels are compiled where there is a CUDA device")
@pytest.mark.parametrize("max_batch", [1, 5])
def test_the_triton_kernels_take_the_bounds_of_a_capture(
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], str],
    make_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    max_batch: int,
) -> None:
    """Attention launched for bounds, over the tables of real steps, writes what exact lists would, and no more."""
    fields = {"max_num_batched_tokens": 9, "max_num_seqs": max_batch}
    driver = make_engine(tiny_model("llama"), store=str(stores("llama")), **fields)
    replays = replay_on_cpu(driver, max_batch)
    compared = Counter[str]()

    def compare(bound: PagedBatch, exact: PagedBatch) -> None:
        rows, used = len(bound.slot_mapping), int(bound.query_start[-1])
        k, v = torch.randn(2, driver.engine.pool.num_pages + 1, 4, 2, 16)
        q = torch.randn(rows, 4, 16)
        expected = paged_attention_torch(q, k, v, exact, 0.25)
        with monkeypatch.context() as context:
            context.setattr(torch, "empty", lambda *shape, **kwargs: torch.full(shape, torch.nan, **kwargs))
            found = paged_attention_triton(q, k, v, bound, 0.25)
        torch.testing.assert_close(found[:used], expected[:used])
        assert found[used:].isnan().all()  # rows that pad
        for length in exact.query_lens:
            compared["no rows" if not length else "one row" if length == 1 else "more rows"] += 1

    def step() -> None:
        driver.step()
        while replays[0].batches:
            compare(*replays[0].batches.pop())

    asked = []
    for prompt, adapter in (([5] * 21, None), ([6] * 4, ADAPTERS[0]), ([7] * 11, ADAPTERS[1])):
        asked.append(driver.submit(prompt, adapter, max_tokens=3))
        step()
    while not all(map(driver.finished, asked)):
        step()
    assert min(compared["no rows"], compared["one row"], compared["more rows"]) > 3
