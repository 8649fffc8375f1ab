"""Adapters that share their factors, in one batch with each other and with others, through the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import C3AConfig, IA3Config, LoraConfig, PeftConfig, PveraConfig, VeraConfig
from tests.engine.adapters import assert_graphed_as_eager, assert_same, load, prompt_of, save_random

from veneer.engine.graphs import Variant
from veneer.kernels.tables import BASE_SLOT

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def vera(**fields: Any) -> PeftConfig:
    return VeraConfig(**{"r": 24, "target_modules": LINEAR, **fields})


KINDS: dict[str, Callable[[], PeftConfig]] = {
    "vera a": vera,
    "lora": lambda: LoraConfig(r=5, target_modules=LINEAR),
    "vera b": vera,
    "vera seed": lambda: vera(projection_prng_key=7),
    "vera few": lambda: vera(target_modules=["q_proj", "down_proj"]),
    "vera head": lambda: vera(target_modules=[*LINEAR, "lm_head"]),
    "vera c": lambda: vera(save_projection=False),
    "vera norms": lambda: vera(modules_to_save=["input_layernorm"]),
    "pvera": lambda: PveraConfig(r=9, target_modules=LINEAR),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=LINEAR),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "c3a": lambda: C3AConfig(block_size=16, target_modules=["q_proj", "v_proj", "down_proj"]),
}
KIN = ("vera a", "vera b", "vera c")


def digest_of(kind: str) -> str:
    return f"{list(KINDS).index(kind) + 1:064x}"


@pytest.fixture(scope="module")
def store_of(make_stores: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """A function: architecture -> a store with one random adapter of each kind."""

    def write(base: Path, blobs: Path) -> None:
        for seed, (kind, config) in enumerate(KINDS.items()):
            save_random(blobs / digest_of(kind), load(base), config(), seed=seed)

    return make_stores(write)


def submit(driver: Any, index: int, kind: str | None) -> str:
    name: str = driver.submit(prompt_of(index), kind and digest_of(kind), logprobs=5, max_tokens=7)
    return name


def fused(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The fields with which an engine on the CPU runs fused layers from here on."""
    monkeypatch.setattr("veneer.engine.base.packed_runs", lambda *_: True)
    return {"quantization": "nf4", "nf4_kernels": "packed"}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_mixed_batch_equals_each_alone(
    quantization: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"store": str(store_of("llama")), "prefix_caching": False}
    fields |= fused(monkeypatch) if quantization == "nf4" else {}
    for kinds in (KIN, [kind for kind in KINDS if kind != "c3a"], list(KINDS)):
        choices = [None, *kinds] * 2
        driver = make_engine(tiny_model("llama"), max_loras=len(KINDS), max_num_batched_tokens=64, **fields)
        assert ("fused decoder layers: 3 of 3" in driver.engine.base.notes) == (quantization == "nf4")
        together = [submit(driver, index, kind) for index, kind in enumerate(choices)]
        tokens = driver.run(*together)
        alone = make_engine(tiny_model("llama"), max_loras=2, **fields)  # adapters take turns in two slots
        for index, kind in enumerate(choices):
            assert_same(driver, [together[index]], alone, [submit(alone, index, kind)], 2e-5)
        assert len({tuple(each) for each in tokens[: 1 + len(kinds)]}) > len(kinds) // 2


def test_rows_of_kin_are_one_segment(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(store_of("llama")), max_loras=len(KINDS))
    kinds = ("vera a", "lora", "vera b", "vera seed", "vera few", "vera c", None)
    for kind in kinds:  # resident from here on, so that all run in one step
        driver.run(submit(driver, 0, kind))
    step, tables = driver.engine.base.context, driver.engine.residency.tables
    driver.run(*(submit(driver, 0, kind) for kind in kinds))
    sizes = {segment.slot: segment.stop - segment.start for segment in step.rows.segments}
    assert sorted(sizes.values()) == [1, 1, 1, 1, 3]
    assert sizes[BASE_SLOT] == 1
    assert step.rows.segments[0].slot == BASE_SLOT
    assert step.rows.row_slots.tolist()[:2] == [BASE_SLOT, 2]  # adapters have every second slot
    assert sorted(step.rows.row_slots.tolist()) == [BASE_SLOT, 0, 2, 4, 6, 8, 10]
    assert len(set(tables.kin.values())) == 3
    driver.run(submit(driver, 0, "lora"), submit(driver, 0, None))
    assert step.rows.row_slots is None


def test_what_is_shared_lies_once(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(store_of("llama")), max_loras=len(KINDS))
    residency = driver.engine.residency
    taken = [(0, 0)]
    for kind in (*KIN, "vera seed"):
        driver.run(submit(driver, 0, kind))
        taken.append((residency.device_bytes, residency.host_bytes))
    (first, first_host), *others, (seed, seed_host) = (
        (after[0] - before[0], after[1] - before[1]) for before, after in pairwise(taken)
    )
    assert (seed, seed_host) == (first, first_host)
    shared = 4 * 24 * ((64 + 128) + (32 + 64 + 128))  # float32, rank, widths of A and of B
    assert others == [(first - shared, first_host - shared)] * 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_decode_graphs_have_variants_for_it(
    quantization: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
    replay_graphs: Callable[[Any], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"store": str(store_of("llama")), "max_loras": len(KINDS), "prefix_caching": False}
    fields |= fused(monkeypatch) if quantization == "nf4" else {}
    plain, driver = (make_engine(tiny_model("llama"), **fields) for _ in range(2))
    made = replay_graphs(driver.engine)
    assert ("fused decoder layers: 3 of 3" in driver.engine.base.notes) == (quantization == "nf4")

    def used_by(*choices: str | None) -> set[Variant]:
        before = [each.replays for each in made]
        ids = [[submit(d, index, kind) for index, kind in enumerate(choices)] for d in (plain, driver)]
        assert_same(driver, ids[1], plain, ids[0], 2e-5)
        return {each.variant for each, count in zip(made, before, strict=True) if each.replays > count}

    for kind in KINDS:
        used_by(kind)  # loads it
    assert used_by("lora") == {Variant.ADAPTED}
    assert used_by("vera a") == {Variant.SHARED}
    assert used_by(*KIN, None, "lora", "vera few", "vera head") == {Variant.SHARED}
    assert used_by("vera b", "dora", "vera a", "vera norms", "ia3") == {Variant.SHARED_TURNED}
    assert used_by("vera b", "c3a", *KIN, "pvera") == {Variant.SHARED_HIDDEN}
    assert used_by("c3a") == {Variant.CHANGED}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_graphed_equals_eager_on_a_gpu(
    quantization: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    fields = {"store": str(store_of("llama")), "max_loras": len(KINDS)}
    assert_graphed_as_eager(
        partial(make_engine, tiny_model("llama"), **fields),
        lambda driver: [submit(driver, index, kind) for index, kind in enumerate([None, *KINDS] * 2)],
        quantization,
    )
