"""Fused decoder layers against transformers' own, over the same packed weights, adapters and caches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.adapters import save_lora
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from veneer.engine.base import Base, load_base
from veneer.engine.fused import FusedLayer, fuse_layers
from veneer.engine.layers import StepContext
from veneer.engine.packed import PackedLinear
from veneer.kernels.attention import PagedBatch
from veneer.kernels.low_rank import Workspace, make_tiles
from veneer.kernels.tables import (
    ABSENT,
    BASE_SLOT,
    IN_BLOCK,
    IN_OFFSET,
    OUT_OFFSET,
    OUT_PAIR,
    RANK,
    AdapterTables,
    Segment,
    absent_entries,
    find_transforms,
)

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "llama-gelu"]
RANKS = (3, 16, 0, 4, 0, 5)  # by slot; the third has biases only
SCALES = {3: 0, 4: 16, 5: 2}  # slot: features of a pair, 0 without pairs
TURNS = {4: 8, 5: 1}  # slot: features of a block
PAGE = 4
MIX = ((BASE_SLOT, 0, 13), (BASE_SLOT, 20, 1), (0, 5, 9), (0, 17, 1), (1, 30, 1), (1, 0, 2), (2, 3, 1))
SCALED = (*MIX, (3, 9, 2), (3, 0, 1))
TURNED = (*SCALED, (4, 0, 7), (4, 12, 1), (5, 30, 1), (5, 3, 2))
BASE_ONLY = ((BASE_SLOT, 0, 13), (BASE_SLOT, 20, 1))
"""Sequences as (slot, position of the first row, rows): chunks of prompts, and decode rows."""

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def _packed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed NF4 in float32 on the CPU, where the kernels are their torch references."""
    monkeypatch.setattr("veneer.engine.base.packed_runs", lambda *_: True)


@pytest.fixture
def folder_of(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def find(architecture: str) -> Path:
        if architecture != "llama-gelu":
            return tiny_model(architecture)
        config = {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True, "mlp_bias": True}
        return save(LlamaConfig(**{**COMMON, **config}), tmp_path / "model")

    return find


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def load(folder: Path) -> Base:
    return load_base(folder, quantization="nf4", dtype=torch.float32, device=CPU, own_kernels=True)


def random_tables(base: Base) -> AdapterTables:
    """Adapters of RANKS, SCALES and TURNS at every site but each fifth, some with a bias."""
    pieces: list[torch.Tensor] = []
    entries = absent_entries(len(RANKS), len(base.sites))

    def place(*shape: int) -> int:
        offset = sum(piece.numel() for piece in pieces)
        pieces.append(torch.randn(*shape).flatten() * 0.1)
        return offset

    for slot, rank in enumerate(RANKS):
        for index, site in enumerate(base.sites.values()):
            if (index + slot) % 5 == 0:
                continue
            bias = place(site.out_features) if rank == 0 or index % 3 == 0 else ABSENT
            factors = (place(rank, site.in_features), place(rank, site.out_features)) if rank else (0, 0)
            entries[slot, index, : RANK + 1] = torch.tensor([*factors, bias, rank])
            if slot in SCALES:
                pair = SCALES[slot]
                scale = place(2 if pair else 1, site.out_features)
                entries[slot, index, [OUT_OFFSET, OUT_PAIR]] = torch.tensor([scale, pair])
            if slot in TURNS:
                turn = place(site.in_features, TURNS[slot])
                entries[slot, index, [IN_OFFSET, IN_BLOCK]] = torch.tensor([turn, TURNS[slot]])
    transforms = {slot: find_transforms(entries[slot]) for slot in SCALES}
    return AdapterTables(torch.cat(pieces), entries, entries, transforms)


def fill_step(base: Base, tables: AdapterTables, sequences: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
    """Tables of a step with these sequences; each has pages of its own. Returns the positions [1, rows]."""
    step = base.context
    counts = [count for _, _, count in sequences]
    rows, stops = sum(counts), list(accumulate(counts))
    segments, start = [], 0
    for slot, group in groupby(zip(sequences, counts, strict=True), key=lambda pair: pair[0][0]):
        size = sum(count for _, count in group)
        segments.append(Segment(slot, start, start + size))
        start += size
    pages = torch.arange(len(sequences) * 8, dtype=torch.int32).view(len(sequences), 8)
    positions = [range(first, first + count) for _, first, count in sequences]
    slots = [int(pages[i, p // PAGE]) * PAGE + p % PAGE for i, each in enumerate(positions) for p in each]
    shape = (pages.numel(), PAGE, base.num_kv_heads, base.head_dim)
    step.tables, step.workspace = tables, Workspace(tables, rows, max(RANKS))
    transforms = tables.transforms_of(segment.slot for segment in segments)
    step.rows = make_tiles(segments, rows, len(RANKS), CPU, transforms)
    step.kv_cache = [(torch.randn(shape), torch.randn(shape)) for _ in range(base.num_layers)]
    kv_lens = [first + count for _, first, count in sequences]
    step.batch = PagedBatch(
        query_start=torch.tensor([0, *stops], dtype=torch.int32),
        kv_len=torch.tensor(kv_lens, dtype=torch.int32),
        block_table=pages,
        slot_mapping=torch.tensor(slots),
        query_lens=counts,
        kv_lens=kv_lens,
    )
    return torch.tensor([[p for each in positions for p in each]])


def run(layer: Any, step: StepContext, fused: bool, x: torch.Tensor, positions: Any) -> list[torch.Tensor]:
    """The layer's output and what is in its caches after it; the step's caches stay as they were."""
    before = step.kv_cache
    step.kv_cache = [(k.clone(), v.clone()) for k, v in before]
    step.fused = fused
    y = layer(x, position_embeddings=positions, attention_mask=None, past_key_values=None, use_cache=False)
    after, step.kv_cache = step.kv_cache, before
    return [y, *after[layer.index]]


@pytest.mark.parametrize(
    "sequences", [MIX, BASE_ONLY, SCALED, TURNED], ids=["mixed", "base", "scaled", "turned"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_fused_layer_equals_plain(
    architecture: str, sequences: Any, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(folder_of(architecture))
    torch.manual_seed(1)
    biases = [m.bias for m in base.model.modules() if isinstance(m, PackedLinear) and m.bias is not None]
    for bias in biases:
        bias.normal_()  # type: ignore[operator]
    assert bool(biases) == (architecture in ("qwen2", "llama-gelu"))
    positions = fill_step(base, random_tables(base), sequences)
    x = torch.randn(1, positions.shape[1], base.config.hidden_size)
    embeddings = base.model.model.rotary_emb(x, positions)
    for layer in base.model.model.layers:
        assert isinstance(layer, FusedLayer)
        expected = run(layer, base.context, False, x, embeddings)
        with monkeypatch.context() as patch:
            patch.setattr(layer.plain, "forward", None)
            found = run(layer, base.context, True, x, embeddings)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    if sequences is not BASE_ONLY:  # the adapters are felt
        rows = positions.shape[1]
        base.context.rows = make_tiles([Segment(BASE_SLOT, 0, rows)], rows, len(RANKS), CPU)
        changed = (run(layer, base.context, True, x, embeddings)[0] - found[0])[0].abs().amax(1)
        assert (changed > 1e-2).tolist() == [slot >= 0 for slot, _, count in sequences for _ in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_engine_gives_the_same_tokens_fused_and_plain(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    model, store = tiny_model(architecture), tmp_path / "adapters"
    for rank in (2, 33):
        save_lora(store / "blobs" / f"{rank:064x}", model, rank, lora_alpha=8)
    fields = {"quantization": "nf4", "nf4_kernels": "packed", "prefix_caching": False, "store": str(store)}
    driver = make_engine(model, max_num_batched_tokens=16, **fields)
    base = driver.engine.base
    assert "fused decoder layers: 3 of 3" in base.notes
    adapters = [None, f"{2:064x}", f"{33:064x}"]
    asks = [([3 + i, 7, 11, *range(5, 5 + 3 * i)], adapters[i % 3]) for i in range(7)]

    def answers() -> list[list[int]]:
        tokens: list[list[int]] = driver.run(*[driver.submit(prompt, adapter) for prompt, adapter in asks])
        return tokens

    base.context.fused = False
    expected = answers()
    base.context.fused = True
    assert answers() == expected
    assert [driver.generate(prompt, adapter) for prompt, adapter in asks] == expected
    assert len({tuple(tokens) for tokens in expected}) > len(adapters)


def test_layers_that_do_not_fit_stay_plain_and_say_why(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    folders = {
        "Gemma3DecoderLayer is not one of": tiny_model("gemma3"),
        "RoPE turns 8 of 16 columns": save(Phi3Config(**COMMON, rope_parameters=rotary), tmp_path / "phi3"),
        "its activation is 'relu'": save(LlamaConfig(**COMMON, hidden_act="relu"), tmp_path / "relu"),
        "down_proj are not packed": save(LlamaConfig(**{**COMMON, "intermediate_size": 96}), tmp_path / "96"),
    }
    for reason, folder in folders.items():
        base = load(folder)
        layers = base.num_layers
        assert not any(isinstance(module, FusedLayer) for module in base.model.modules())
        assert f"fused decoder layers: 0 of {layers}" in base.notes
        assert any(
            note.startswith(f"{layers} of {layers} layers are not fused: {reason}") for note in base.notes
        )


def test_one_unfit_layer_does_not_keep_the_others_plain(tiny_model: Callable[[str], Path]) -> None:
    base = load(tiny_model("llama"))
    layers = base.model.model.layers
    layers[0], layers[1], layers[2] = (layer.plain for layer in layers)
    layers[1].self_attn.k_proj.site += 1
    layers[2].mlp.extra = torch.nn.Linear(2, 2)
    notes: list[str] = []
    assert fuse_layers(base.model, base.context, notes) == 1
    assert isinstance(layers[0], FusedLayer)
    assert len(notes) == 2
    assert "the sites of q_proj, k_proj, v_proj are not neighbours" in notes[0]
    assert "weights in mlp.extra" in notes[1]
