"""Blends against sums in float64, for adapters of every kind that their own libraries save."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from tests.adapters.blending import MAX_RANK, Kinds, cases, inputs, outputs

from veneer.adapters.blend import blend, sites_of
from veneer.adapters.cutting import cut, product
from veneer.adapters.deltas import bias_change, weight_change
from veneer.adapters.merging import follow
from veneer.adapters.program import Program, SiteProgram
from veneer.adapters.recipes import Part, recipe
from veneer.engine.base import load_base
from veneer.errors import AdapterRefused
from veneer.training.conformance.cases import tiny_base

ALL, BIAS = "LORA all-linear", "LORA lora_bias"
# A rotation of the input, a scale of the output, both at a site, whole modules, few entries, all entries, a pair,
# rows of tokens, a LoRA on the embedding and the head, hidden states.
VARIED = [
    "OFT",
    "IA3",
    "BOFT",
    "LORA DoRA",
    "LORA modules_to_save linear layers and norms",
    "LORA modules_to_save lm_head, embed_tokens",
    "SHIRA",
    "C3A",
    "ROAD road_2",
    "TRAINABLE_TOKENS embedding and head",
    "LORA embed_tokens, lm_head",
    "ADAPTERHUB_BOTTLENECK Pfeiffer",
    "PARTIAL the last layer",
    "WAVEFT db2",
    "LN_TUNING",
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    root = tmp_path_factory.mktemp("kinds")
    tiny_base(root / "base")
    cpu = torch.device("cpu")
    base = load_base(root / "base", quantization="none", dtype=torch.float32, device=cpu)
    return Kinds(base, root / "base", root)


def assert_sum(kinds: Kinds, found: Program, programs: list[Program], weights: list[float]) -> None:
    """The blend's sites give the base's output and the weighted differences from it."""
    known = sites_of(kinds.base)
    for at in ("sites", "tail"):
        names = {name for program in programs for name in getattr(program, at)}
        assert getattr(found, at).keys() <= names
        for name in names:
            x = inputs(known[name])
            own = outputs(None, known[name], kinds.base, x)
            alone = [outputs(getattr(each, at).get(name), known[name], kinds.base, x) for each in programs]
            expected = own + sum(w * (y - own) for w, y in zip(weights, alone, strict=True))
            got = outputs(getattr(found, at).get(name), known[name], kinds.base, x)
            assert (got - expected).abs().max() <= 2e-6 * expected.abs().max(), name


def summed(kinds: Kinds, names: list[str], weights: list[float]) -> Program:
    programs = [kinds.program(name) for name in names]
    found = blend(programs, weights, kinds.base, MAX_RANK)
    assert_sum(kinds, found, programs, weights)
    return found


SCALED = [
    name for name, case in cases().items()
    if "PREFIX" not in name and case.kind not in ("CARTRIDGE", "CPT", "PROMPT_TUNING", "P_TUNING")
    and "PROMPT_TUNING" not in name
]  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_every_kind_is_scaled(kinds: Kinds, name: str) -> None:
    """All but virtual tokens. A weight of 1 leaves the very program."""
    assert summed(kinds, [name], [1.0]) is kinds.program(name)
    summed(kinds, [name], [-0.7])


@pytest.mark.parametrize(("one", "other"), pairwise([*VARIED, VARIED[0]]))
def test_different_kinds_add_up(kinds: Kinds, one: str, other: str) -> None:
    if one != other:
        summed(kinds, [one, other], [0.4, 1.7])
        summed(kinds, [one, ALL, other], [1.0, -2.0, 1.0])


def test_the_rank_of_a_blend_is_the_sum_of_the_ranks(kinds: Kinds) -> None:
    found = summed(kinds, [ALL, BIAS, "LORA rsLoRA, patterns"], [0.5, -1.0, 3.0])
    assert (found.rank, found.primitives, found.portability) == (20, ("low_rank", "bias"), "independent")
    assert summed(kinds, [ALL, "LORA DoRA"], [0.5, 0.5]).portability == "proportional"


def test_one_rotation_and_one_scale_are_added_in_full(kinds: Kinds) -> None:
    found = summed(kinds, ["OFT", "IA3"], [1.0, 0.5])
    scaled = {name for name, part in kinds.program("IA3").sites.items() if part.scale_out is not None}
    assert (both := kinds.program("OFT").sites.keys() & scaled)
    assert all(found.sites[name].rotate_in is None and found.sites[name].scale_out is None for name in both)


def test_a_change_in_full_is_bounded(kinds: Kinds) -> None:
    limits = kinds.base.limits
    kinds.base.limits = limits._replace(module_bytes=100)
    try:
        with pytest.raises(AdapterRefused, match="--max-module-bytes"):
            summed(kinds, ["OFT", "IA3"], [1.0, 0.5])
    finally:
        kinds.base.limits = limits


def test_rotations_of_other_block_sizes_stay_rotations(kinds: Kinds) -> None:
    found = summed(kinds, ["OFT", "LN_TUNING", "OFT block_share"], [0.5, 0.5, -0.25])
    assert "rotation" in found.primitives
    assert "dense" not in found.primitives


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["PREFIX_TUNING", ALL], "virtual tokens"),
        (["PROMPT_TUNING"], "virtual tokens"),
        (["LORA aLoRA", ALL], "different tokens"),
        (["BOTTLENECK pyreft's LoReFT, both ends", ALL], "different tokens"),
        (["LORA Arrow", ALL], "arrow, none"),
    ],
)
def test_what_has_no_sum_is_refused_by_name(kinds: Kinds, names: list[str], why: str) -> None:
    with pytest.raises(AdapterRefused, match=why):
        blend([kinds.program(name) for name in names], [0.5] * len(names), kinds.base, MAX_RANK)


def test_adapters_that_act_on_the_same_tokens_add_up(kinds: Kinds) -> None:
    found = summed(kinds, ["LORA aLoRA", "LORA aLoRA"], [0.5, 2.0])
    assert found.invocation == kinds.program("LORA aLoRA").invocation
    name = "BOTTLENECK pyreft's LoReFT, both ends"
    found = summed(kinds, [name, name], [0.5, 2.0])
    assert found.span == kinds.program(name).span
    assert found.tail


def test_equal_activations_are_joined_and_others_refused(kinds: Kinds) -> None:
    name = "ADAPTION_PROMPT"
    found = summed(kinds, [name, name], [0.5, -2.0])
    assert found.rank == 2 * kinds.program(name).rank


def test_added_tokens_are_refused(kinds: Kinds) -> None:
    vocabulary = kinds.base.embedding.in_features
    program = kinds.program("TRAINABLE_TOKENS")
    (site,) = program.sites.values()
    assert site.tokens is not None
    ids = torch.tensor([vocabulary], dtype=torch.int32)
    tokens = dataclasses.replace(site.tokens, ids=ids, rows=site.tokens.rows[:1])
    adding = dataclasses.replace(
        program, sites={"model.embed_tokens": dataclasses.replace(site, tokens=tokens)}
    )
    with pytest.raises(AdapterRefused, match="adds tokens to the vocabulary"):
        blend([adding], [0.5], kinds.base, MAX_RANK)
    assert blend([adding], [1.0], kinds.base, MAX_RANK) is adding


def test_no_primitive_is_forgotten() -> None:
    """A new field of a site needs a place in blends and in changes in full."""
    known = {
        *("a", "b", "bias", "inner_bias", "activation", "rotate_in", "scale_out", "cross_out", "pair"),
        *("dense", "sparse", "tokens", "rank_scale", "update_scale"),
    }
    assert {field.name for field in dataclasses.fields(SiteProgram)} == known


@pytest.mark.parametrize("name", [*VARIED[:9], BIAS])
def test_changes_in_full_are_what_the_site_does(kinds: Kinds, name: str) -> None:
    for site_name, part in kinds.program(name).sites.items():
        site = sites_of(kinds.base)[site_name]
        x = inputs(site)
        own = outputs(None, site, kinds.base, x)
        bias = bias_change(part, site, kinds.base)
        changed = own + x @ weight_change(part, site, kinds.base).double().T
        changed += 0 if bias is None else bias.double()
        expected = outputs(part, site, kinds.base, x)
        assert (changed - expected).abs().max() <= 3e-6 * expected.abs().max(), site_name


# ---- cuts -----------------------------------------------------------------------------------------


def test_a_cut_is_the_best_of_its_rank_and_its_error_is_true(kinds: Kinds) -> None:
    programs = [kinds.program(name) for name in (ALL, BIAS, "LORA")]
    parts = [Part(f"{i:064x}", weight) for i, weight in enumerate((0.7, -0.5, 1.3))]
    found = follow(recipe(parts, rank=6), programs, kinds.base, MAX_RANK, 1 << 30)
    exact = blend(programs, [part.weight for part in parts], kinds.base, MAX_RANK)
    lost = had = 0.0
    for name, part in exact.sites.items():
        assert part.a is not None and part.b is not None  # noqa: PT018
        whole = part.b.double().T @ part.a.double()
        kept = found.sites[name]
        assert kept.a is not None and kept.b is not None  # noqa: PT018
        assert kept.rank == min(6, part.rank)
        tail = torch.linalg.svdvals(whole)[6:]
        missing = float(((whole - kept.b.double().T @ kept.a.double()) ** 2).sum())
        assert missing == pytest.approx(float((tail**2).sum()), rel=1e-4, abs=1e-10)
        lost, had = lost + missing, had + float((whole**2).sum())
    assert found.error == pytest.approx((lost / had) ** 0.5, rel=1e-4)
    assert found.error is not None
    assert 0.01 < found.error < 1


def test_a_cut_that_cuts_nothing_has_no_error(kinds: Kinds) -> None:
    program = kinds.program(ALL)
    made = recipe([Part("0" * 64, 1.0)], rank=MAX_RANK)
    found = follow(made, [program], kinds.base, MAX_RANK, 1 << 30)
    assert found.error == pytest.approx(0, abs=1e-7)
    assert_sum(kinds, found, [program], [1.0])


def test_directions_that_are_noise_go() -> None:
    a, b = torch.randn(3, 20), torch.randn(3, 12)
    twice = SiteProgram(a=torch.cat([a, a]), b=torch.cat([b, -0.5 * b]))
    assert cut(twice, 6, "x").part.rank == 3
    nothing = cut(SiteProgram(a=torch.cat([a, a]), b=torch.cat([b, -b])), 6, "x")
    assert nothing.part.b is not None
    assert nothing.part.b.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (12, 12)])
def test_a_product_of_a_change_in_full_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    torch.manual_seed(sum(shape))
    change = torch.randn(shape)
    part, lost, had = product(change, 4)
    assert part.a is not None and part.b is not None  # noqa: PT018
    assert (part.b.shape, part.a.shape) == ((4, shape[0]), (4, shape[1]))
    tail = float((torch.linalg.svdvals(change.double())[4:] ** 2).sum())
    assert float(((change - part.b.T @ part.a) ** 2).sum()) == pytest.approx(tail, rel=1e-5)
    assert lost == pytest.approx(tail, rel=1e-6)
    assert had == pytest.approx(float((change**2).sum()), rel=1e-6)


def test_a_rank_over_the_limit_says_what_to_do(kinds: Kinds) -> None:
    programs = [kinds.program(ALL), kinds.program(BIAS)]
    made = recipe([Part("0" * 64, 1.0), Part("1" * 64, 1.0)])
    with pytest.raises(AdapterRefused, match=r"add up to 12, and --max-lora-rank is 8; send max_rank"):
        follow(made, programs, kinds.base, 8, 1 << 30)
    assert follow(made._replace(rank=8), programs, kinds.base, 8, 1 << 30).rank == 8


def test_what_does_not_fit_is_refused_before_all_of_it_is_made(kinds: Kinds) -> None:
    made = recipe([Part("0" * 64, 1.0), Part("1" * 64, 1.0)], "ties", density=0.5)
    with pytest.raises(AdapterRefused, match=r"ties of these 2 adapters takes more .* model\.layers\.0"):
        follow(made, [kinds.program(ALL), kinds.program(BIAS)], kinds.base, MAX_RANK, 5000)
