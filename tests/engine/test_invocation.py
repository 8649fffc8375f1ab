"""Activated LoRA through the engine: PEFT's log probabilities, and the base's keys before the invocation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets
from tests.engine.adapters import PAGE, Peft, check_against_peft, digest_of, load, save_random

from veneer.engine.batch import Scheduled
from veneer.engine.graphs import DecodeGraphs, MixedGraphs, StepGraphs
from veneer.engine.messages import CheckAdapter, SamplingParams
from veneer.engine.sequence import Change, Sequence
from veneer.engine.step_tables import head_segments_of, segments_of
from veneer.kernels.low_rank import make_tiles
from veneer.kernels.tables import BASE_SLOT, Segment

CONFIGS: dict[str, dict[str, Any]] = {
    "short": {"alora_invocation_tokens": [77], "target_modules": "all-linear"},
    "long": {"alora_invocation_tokens": [7, 8, 9, 7, 8], "target_modules": "all-linear", "lora_bias": True},
    "head": {"alora_invocation_tokens": [5, 6], "target_modules": ["q_proj", "down_proj", "lm_head"]},
    "plain": {"target_modules": "all-linear"},
}
TEXT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]


@pytest.fixture(scope="module")
def stores(make_stores: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """A function: architecture -> a store's folder with one adapter of each config, saved by PEFT."""

    def write(base: Path, blobs: Path) -> None:
        for name, fields in CONFIGS.items():
            config = LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **fields)
            folder, seed = blobs / digest_of(name), len(name)
            save_random(folder, load(base), config, seed=seed, strength=0.05, save_embedding_layers="auto")

    return make_stores(write)


class Invoked(Peft):
    """Invoked where PEFT finds the invocation in the prompt alone."""

    def inputs(self, name: str | None, prompt: list[int], output: list[int]) -> dict[str, Any]:
        if name not in ("short", "long", "head"):
            return {}
        configs = self.models[name].peft_config
        (offset,) = calculate_alora_offsets(configs, "default", torch.tensor([prompt]))
        return {"alora_offsets": [None if offset is None else offset + len(output)]}


def asks() -> list[tuple[list[int], str | None]]:
    prompts = [
        [*TEXT, 77, 30],
        [77, 31, 32],
        [*TEXT[:6], 77, *TEXT, 77],
        [*TEXT, 7, 8, 9, 7, 8, 33, 34],
        [7, 8, 9, 7, 8, 9, 7, 8],
        [*TEXT, 5, 6],
        [*TEXT[:8], 5, 6, 35, 36, 37, 38, 39, 40, 41],
        [*TEXT, 42],  # invokes none
        [5, 6, 77, *TEXT, 7, 8, 9, 7, 8],
    ]
    return [(prompt, name) for prompt in prompts for name in (None, *CONFIGS)]


def test_the_reference_is_what_it_should_be(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path]
) -> None:
    peft = Invoked(tiny_model("llama"), stores("llama"))
    prompt = [*TEXT, 77, 30]
    base, adapted = peft.logprobs(None, prompt, [1, 2]), peft.logprobs("short", prompt, [1, 2])
    assert torch.equal(base[:11], adapted[:11])
    assert all((base - adapted)[row].abs().max() > 0.05 for row in range(11, 15))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi3"])
def test_mixed_batches_are_pefts(
    architecture: str,
    tiny_model: Callable[[str], Path],
    stores: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    folder, store = tiny_model(architecture), stores(architecture)
    peft = Invoked(folder, store)
    driver = make_engine(folder, store=str(store))
    check_against_peft(driver, peft, asks(), max_tokens=8)
    check_against_peft(driver, peft, asks(), max_tokens=8)  # with what is cached now
    assert driver.engine.pool.hit_tokens > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix_caching": False},
        {"max_num_batched_tokens": 5},  # chunks end before, at and behind the invocation
        {"max_loras": 2, "slot_patience": 0.0},
        {"kv_cache_memory": 16 * PAGE, "max_num_batched_tokens": 12},
        {"lookahead": True, "kv_cache_memory": 16 * PAGE},
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
    peft = Invoked(folder, store)
    driver = make_engine(folder, store=str(store), **fields)
    check_against_peft(driver, peft, asks(), max_tokens=8)
    check_against_peft(driver, peft, asks()[::-1], max_tokens=8)
    stats = driver.engine.stats()
    if "kv_cache_memory" in fields:
        assert stats.preemptions > 0
    if "max_loras" in fields:
        assert sum(entry.evictions for entry in stats.adapters.values()) > 0


def test_keys_before_the_invocation_are_the_bases(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    folder, store = tiny_model("llama"), stores("llama")
    driver = make_engine(folder, store=str(store))
    driver.generate([*TEXT, 9], None, max_tokens=1)
    for name, prompt in (("short", [*TEXT, 77, 30]), ("head", [*TEXT, 5, 6]), ("plain", [*TEXT, 77, 30])):
        identifier = driver.submit(prompt, digest_of(name), max_tokens=2)
        driver.run(identifier)
        assert driver.outputs[identifier][-1].cached_tokens == (0 if name == "plain" else 8)
    asked = [([*TEXT, 77, 30], "short"), ([*TEXT, 77, 30], None)]
    check_against_peft(driver, Invoked(folder, store), asked, max_tokens=8)


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


def test_an_upload_is_probed_with_its_invocation(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"))
    folder = stores("llama") / "blobs" / digest_of("long")
    info = driver.call(CheckAdapter("c", str(folder), digest_of("long"))).info
    assert info is not None
    assert info.effect is not None
    assert info.effect > 0.05
    assert "acts from the last [7, 8, 9, 7, 8] of a prompt on" in info.warnings[0]


# ---- rows and tiles ---------------------------------------------------------------------------------


def item(slot: int, start: int, count: int, active_from: int | None = 0) -> Scheduled:
    sequence = Sequence(
        id="s",
        tokens=[1] * (start + count),
        sampling=SamplingParams(max_tokens=1),
        adapter="a" if slot >= 0 else None,
    )
    sequence.slot = slot
    sequence.changes = () if active_from is None else (Change(active_from, 0),)
    return Scheduled(sequence, start, count, True)


def test_rows_before_the_invocation_are_base_rows() -> None:
    items = [
        item(BASE_SLOT, 0, 2),
        item(2, 0, 3, None),
        item(2, 4, 1, 9),  # all of it comes before
        item(0, 2, 5, 4),  # two of five do
        item(0, 0, 4, 1),
        item(0, 8, 1, 8),
        item(1, 9, 1),
    ]
    planned = sorted(items, key=lambda each: each.slot)
    assert [each.slot for each in planned] == [-1, -1, -1, 0, 0, 0, 1]
    rows = [(BASE_SLOT, 8), (0, 3), (BASE_SLOT, 1), (0, 4), (1, 1)]
    stops = [8, 11, 12, 16, 17]
    expected = [Segment(slot, stop - count, stop) for (slot, count), stop in zip(rows, stops, strict=True)]
    assert segments_of(planned) == expected
    assert head_segments_of(planned) == [Segment(-1, 0, 3), Segment(0, 3, 6), Segment(1, 6, 7)]


def test_there_can_be_more_segments_than_slots() -> None:
    segments = segments_of([item(0, 0, 2, 1) for _ in range(40)])
    assert len(segments) == 80
    tiles = make_tiles(segments, 80, 1, torch.device("cpu"))
    assert int(tiles.used) == len(tiles.tiles) == 80


def pretend_captured(graphs: StepGraphs) -> None:
    """Every graph is there, as far as `fits` asks."""
    made: Any = {(bucket, variant): object() for bucket in graphs._buckets for variant in graphs._variants}
    graphs._captured = made


def test_a_mixed_graph_takes_beginnings_as_far_as_its_tables_reach(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_model("llama")).engine
    graphs = MixedGraphs(
        engine.base,
        engine.runner._tokens,
        page_size=4,
        scratch_page=engine.pool.num_pages,
        max_pages=8,
        max_batch=32,
        max_rows=256,
        slots=2,
    )
    pretend_captured(graphs)
    reaches = [graphs._tile_entries(bucket) - 1 for bucket in (64, 128, 256)]
    for beginnings in (4, *(reach // 2 + more for reach in reaches for more in (0, 1))):
        planned = [item(0, 0, 4, 2) for _ in range(beginnings)]
        rows = 4 * beginnings
        assert graphs._bucket(planned) == next(
            (b for b in graphs._buckets if b >= rows and 2 * beginnings < graphs._tile_entries(b)), None
        )
        if graphs.fits(planned):
            make = next(graphs._hosts)
            for each in planned:
                each.sequence.pages = [0]
            make.fill(planned, 256, 32, 8, None)
            used = make._tiles[: 1 + 2 * beginnings].tolist()
            expected = [[slot, start, stop - start] for slot, start, stop in segments_of(planned)]
            assert used == [[2 * beginnings, 0, 0], *expected]


def test_a_mixed_graph_takes_tails_as_far_as_its_head_table_reaches(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_model("llama")).engine
    sizes: dict[str, int] = {
        "page_size": 4,
        "scratch_page": engine.pool.num_pages,
        "max_pages": 8,
        "max_batch": 32,
    }
    mixed = MixedGraphs(engine.base, engine.runner._tokens, max_rows=256, slots=2, **sizes)
    decode = DecodeGraphs(engine.base, engine.runner._tokens, slots=2, every_variant=True, **sizes)
    pretend_captured(mixed)
    pretend_captured(decode)
    room = len(mixed._tables.head_tiles) - 1

    def ends(slot: int, start: int) -> Scheduled:
        """A prompt's last token, on which an adapter's tail acts."""
        found = item(slot, start, 1)
        found.sequence.changes = (Change(0, 0), Change(start, 1))
        return found

    for slots in (1, room // 2, room // 2 + 1):
        planned = sorted(
            (each for slot in range(slots) for each in (item(2 * slot, 3, 1), ends(2 * slot, 3))),
            key=lambda each: each.slot,
        )
        assert [each.slot for each in planned] == list(range(2 * slots))
        assert mixed.fits(planned) == (2 * slots <= room)
        rows = 2 * slots
        assert decode.fits(planned) == any(
            rows <= bucket and rows < decode._tile_entries(bucket) for bucket in decode._buckets
        )
        if mixed.fits(planned):
            host = next(mixed._hosts)
            for each in planned:
                each.sequence.pages = [0]
            host.fill_chunks(planned, 32, mixed._head_tile_rows)
            host.fill(planned, 128, 32, 8, None)
            assert host._head_tiles[0, 0] == host._tiles[0, 0] == 2 * slots


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphed_equals_eager(
    tiny_model: Callable[[str], Path], stores: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    folder, store = tiny_model("llama"), stores("llama")
    fields: dict[str, Any] = {"store": str(store), "device": "cuda", "page_size": 16}
    eager = make_engine(folder, enforce_eager=True, **fields)
    expected = [eager.generate(p, name and digest_of(name)) for p, name in asks()]
    graphed = make_engine(folder, cuda_graphs="all", **fields)
    for driver in (eager, graphed):
        ids = [driver.submit(p, name and digest_of(name)) for p, name in asks()]
        assert driver.run(*ids) == expected
    assert graphed.engine.runner.graphs.replays > 0
    assert graphed.engine.runner.mixed_graphs.replays > 0
