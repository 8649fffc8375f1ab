"""Adapters that change inputs, outputs and weights of the base, in one batch with others, through the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    C3AConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    RoadConfig,
    ShiraConfig,
)
from tests.engine.adapters import (
    assert_graphed_as_eager,
    assert_same,
    likeliest,
    load,
    prompt_of,
    save_random,
    told,
)
from transformers import AutoModelForCausalLM

from veneer.engine.graphs import Variant
from veneer.engine.packed import FusedGroup, FusedPart, PackedLinear, dequantizing, pack_linears, packed
from veneer.kernels.nf4_layout import Nf4Codes, pack_nf4

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=5, target_modules=LINEAR),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=[*LINEAR, "lm_head"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=LINEAR),
    "oft on values": lambda: OFTConfig(oft_block_size=16, target_modules=["v_proj", "gate_proj"]),
    "road": lambda: RoadConfig(variant="road_2", group_size=16, target_modules=LINEAR),
    "norms": lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "c3a": lambda: C3AConfig(block_size=16, target_modules=["q_proj", "v_proj", "down_proj"]),
    "shira": lambda: ShiraConfig(r=2, target_modules=LINEAR),
}
CHANGING = ("c3a", "shira")  # weights: their steps run the plain layers


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
    """A request with one of several prompts, which differ in length and share beginnings."""
    name: str = driver.submit(prompt_of(index), kind and digest_of(kind), logprobs=5, max_tokens=7)
    return name


@pytest.mark.parametrize(
    ("architecture", "quantization"), [("llama", "none"), ("qwen3", "none"), ("qwen2", "nf4")]
)
def test_a_mixed_batch_equals_each_alone(
    architecture: str,
    quantization: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    fields = {"store": str(store_of(architecture)), "quantization": quantization, "prefix_caching": False}
    choices = [None, *KINDS] * 2
    driver = make_engine(tiny_model(architecture), max_loras=len(KINDS), max_num_batched_tokens=64, **fields)
    together = [submit(driver, index, kind) for index, kind in enumerate(choices)]
    tokens = driver.run(*together)
    alone = make_engine(tiny_model(architecture), max_loras=2, **fields)  # adapters take turns in two slots
    for index, kind in enumerate(choices):
        assert_same(driver, [together[index]], alone, [submit(alone, index, kind)], 2e-5)
    assert len({tuple(each) for each in tokens[: 1 + len(KINDS)]}) > len(KINDS) // 2


def test_every_kind_gives_the_log_probabilities_of_peft(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    store = store_of("llama")
    driver = make_engine(tiny_model("llama"), store=str(store), max_loras=len(KINDS))
    ids = [submit(driver, index, kind) for index, kind in enumerate(KINDS)]
    for index, (kind, identifier, tokens) in enumerate(zip(KINDS, ids, driver.run(*ids), strict=True)):
        model = PeftModel.from_pretrained(load(tiny_model("llama")), store / "blobs" / digest_of(kind)).eval()
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_of(index) + tokens])).logits[
                0, len(prompt_of(index)) - 1 : -1
            ]
        expected = torch.log_softmax(logits, -1)
        torch.testing.assert_close(
            told(driver, identifier),
            likeliest(expected, tokens),
            rtol=0,
            atol=1e-5 * float(logits.abs().max()),
        )


def test_only_steps_with_such_an_adapter_are_transformed(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(store_of("llama")), max_loras=1)
    step = driver.engine.base.context
    for kind, expected in ((None, False), ("ia3", True), ("lora", False), ("norms", True), (None, False)):
        driver.run(submit(driver, 0, kind))  # in the one slot after each other
        for rows in (step.rows, step.head_rows):
            assert any(rows.transforms) == expected
    sites = list(driver.engine.base.sites)
    [transforms] = step.tables.transforms.values()
    readers = ("q_proj", "k_proj", "v_proj", "lm_head")
    assert transforms.inputs == {index for index, name in enumerate(sites) if name.endswith(readers)}
    assert not transforms.outputs
    driver.run(submit(driver, 0, "lora"))
    assert not step.tables.transforms


def test_only_steps_with_such_an_adapter_change_weights(
    tiny_model: Callable[[str], Path], store_of: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(store_of("llama")), max_loras=1)
    step = driver.engine.base.context
    sites = list(driver.engine.base.sites)
    for kind in (None, "c3a", "lora", "shira", None, "ia3"):
        driver.run(submit(driver, 0, kind))  # in the one slot after each other
        assert step.rows.deltas == step.head_rows.deltas == (kind in ("c3a", "shira"))
        if kind == "c3a":
            [deltas] = step.tables.deltas.values()
            names = ("q_proj", "v_proj", "down_proj")
            assert deltas == ({sites.index(name) for name in sites if name.endswith(names)}, set())
    assert not step.tables.deltas


# ---- the base's product for an input of its own -----------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_fused_layers_answer_as_plain_ones(
    architecture: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("veneer.engine.base.packed_runs", lambda *_: True)
    fields = {"store": str(store_of(architecture)), "max_loras": len(KINDS), "prefix_caching": False}
    driver = make_engine(tiny_model(architecture), quantization="nf4", nf4_kernels="packed", **fields)
    base = driver.engine.base
    assert "fused decoder layers: 3 of 3" in base.notes
    answers, transforming = [], [kind for kind in KINDS if kind not in CHANGING]
    for fused in (False, True):
        base.context.fused = fused
        with pytest.MonkeyPatch.context() as patch:
            for layer in base.model.model.layers if fused else []:
                patch.setattr(layer.plain, "forward", None)
            ids = [submit(driver, index, kind) for index, kind in enumerate([None, *transforming] * 2)]
            answers.append((driver.run(*ids), [told(driver, identifier) for identifier in ids]))
    (tokens, expected), (ours, found) = answers
    assert ours == tokens
    for row, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(row, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [packed, dequantizing])
@torch.inference_mode()
def test_a_part_alone_equals_its_columns(make: Any, tiny_model: Callable[[str], Path]) -> None:
    replaced = pack_linears(load_nf4(tiny_model("qwen2")), make)
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    for names in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        parts: list[Any] = [replaced[f"model.layers.1.{name}"] for name in names]
        if (bias := parts[0].group.whole.bias) is not None:
            bias.normal_()
        expected = parts[0].group.whole(x).split([part.out_features for part in parts], -1)
        for part, columns in zip(parts, expected, strict=True):
            parts[0](other)  # whoever shares an input is not disturbed
            torch.testing.assert_close(part.alone(x), columns)
        assert parts[0].group._x is None  # after the last part nothing is kept


def load_nf4(folder: Path) -> Any:
    from veneer.engine.base import forbid_repacking, quantization_config

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization_config("nf4", torch.float32)
    )
    forbid_repacking(model)
    return model.eval()


@pytest.mark.parametrize(
    ("sizes", "own"),
    [((128, 256, 128), [True] * 3), ((256, 72), [True] * 2), ((192, 64, 128), [False, False, True])],
)
@torch.inference_mode()
def test_packed_parts_are_read_alone_where_tiles_end(sizes: tuple[int, ...], own: list[bool]) -> None:
    codes = torch.randint(16, (sum(sizes), 192), dtype=torch.uint8)
    whole = PackedLinear(pack_nf4(Nf4Codes(codes, torch.rand(sum(sizes), 3))), torch.randn(sum(sizes)))
    group = FusedGroup(whole, sizes)
    x = torch.randn(5, 192)
    for index, columns in enumerate(whole(x).split(sizes, -1)):
        part: Any = FusedPart(group, index)
        torch.testing.assert_close(part.alone(x), columns)
        narrow: Any = group._narrowed[index]
        assert (narrow is not None) == own[index]
        if narrow is not None:
            mine, all_of_it = narrow.packed, whole.get_buffer("packed")
            assert mine.untyped_storage().data_ptr() == all_of_it.untyped_storage().data_ptr()


# ---- graphs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "ia3"])
def test_warming_up_runs_what_the_variant_does_and_leaves_the_tables_alone(
    kind: str | None,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    driver = make_engine(tiny_model("llama"), store=str(store_of("llama")), max_loras=1)
    if kind is not None:
        driver.run(submit(driver, 0, kind))  # in the first slot
    step, runner = driver.engine.base.context, driver.engine.runner
    tables = step.tables
    before = [set(tables.acting), *map(dict, (tables.transforms, tables.deltas, tables.hidden, tables.kin))]
    for variant in Variant:
        runner._warm_up(16, variant, 64)
        found = (
            step.rows.adapted,
            *map(bool, step.rows.transforms[::-1]),
            step.rows.deltas,
            step.rows.hidden,
        )
        assert found == tuple(variant.does >= each for each in tuple(Variant)[1 : Variant.HIDDEN + 1])
        assert (step.rows.row_slots is not None) == variant.is_shared
    assert before == [tables.acting, tables.transforms, tables.deltas, tables.hidden, tables.kin]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_decode_graphs_have_a_variant_for_it(
    quantization: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
    replay_graphs: Callable[[Any], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("veneer.engine.base.packed_runs", lambda *_: True)  # in fused layers
    fields = {"store": str(store_of("llama")), "max_loras": len(KINDS), "prefix_caching": False}
    fields |= {"quantization": quantization, "nf4_kernels": "packed"}
    plain, driver = (make_engine(tiny_model("llama"), **fields) for _ in range(2))
    made = replay_graphs(driver.engine)
    transforming = [None, *(kind for kind in KINDS if kind not in CHANGING)]
    scaling = [None, "dora", "lora", "road"]
    for choices in ([None, None], [None, "lora"], scaling, transforming, [None, *KINDS]):
        ids = [[submit(d, index, kind) for index, kind in enumerate(choices)] for d in (plain, driver)]
        assert_same(driver, ids[1], plain, ids[0], 2e-5)
    used = Counter(each.variant for each in made if each.replays)
    assert used.keys() == {each for each in Variant if each < Variant.HIDDEN}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_graphed_equals_eager_on_a_gpu(
    quantization: str,
    tiny_model: Callable[[str], Path],
    store_of: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> None:
    """Captured variants, Triton's transforms and, with NF4, parts of packed weights."""
    fields = {"store": str(store_of("llama")), "max_loras": len(KINDS)}
    assert_graphed_as_eager(
        partial(make_engine, tiny_model("llama"), **fields),
        lambda driver: [submit(driver, index, kind) for index, kind in enumerate([None, *KINDS] * 2)],
        quantization,
    )
