"""Merges: PEFT's formulas on true changes, files that PEFT loads, and adapters that come back as what they were."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from safetensors import safe_open
from tests.adapters.blending import MAX_RANK, Kinds, cases, inputs, outputs
from transformers import AutoModelForCausalLM

from veneer.adapters.blend import blend, sites_of
from veneer.adapters.deltas import weight_change
from veneer.adapters.merge import Report, merge
from veneer.adapters.merging import combine, follow
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import Program, SiteProgram
from veneer.adapters.recipes import Part, Recipe, recipe
from veneer.adapters.registry import lower
from veneer.adapters.saving import TensorFile, save_program
from veneer.engine.base import load_base
from veneer.errors import AdapterRefused
from veneer.training.conformance.cases import PROMPT, tiny_base

ALL, BIAS, DORA = "LORA all-linear", "LORA lora_bias", "LORA DoRA"
WEIGHTS = [0.7, -0.5, 1.3]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    root = tmp_path_factory.mktemp("kinds")
    tiny_base(root / "base")
    cpu = torch.device("cpu")
    base = load_base(root / "base", quantization="none", dtype=torch.float32, device=cpu)
    return Kinds(base, root / "base", root)


def made(weights: list[float], method: str = "linear", **fields: Any) -> Recipe:
    return recipe([Part(f"{i:064x}", weight) for i, weight in enumerate(weights)], method, **fields)


def run(kinds: Kinds, of: Recipe, names: list[str], folder: Path, **fields: Any) -> tuple[Program, Report]:
    """Merge, and lower what came out."""
    folder.mkdir()
    programs = [kinds.program(name) for name in names]
    report = merge(of, programs, kinds.base, MAX_RANK, folder, **{"keep_rows": False} | fields)
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    return lower(folder, kinds.base, MAX_RANK), report


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    return found


def assert_same(kinds: Kinds, found: Program, expected: Program, tolerance: float = 3e-6) -> None:
    """Both do the same at every site."""
    for at in ("sites", "tail"):
        for name in getattr(expected, at).keys() | getattr(found, at).keys():
            site = sites_of(kinds.base)[name]
            x = inputs(site)
            want, got = (outputs(getattr(p, at).get(name), site, kinds.base, x) for p in (expected, found))
            assert (got - want).abs().max() <= tolerance * max(float(want.abs().max()), 1e-3), name
    assert (found.invocation, found.span) == (expected.invocation, expected.span)


# ---- formulas -------------------------------------------------------------------------------------


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(13, 17) for _ in WEIGHTS]


@pytest.mark.parametrize("density", [1.0, 0.3, 1e-9])
def test_magnitude_prune_is_pefts(density: float) -> None:
    expected = tensors()
    if density < 1:
        expected = [merge_utils.prune(each, density, "magnitude") for each in expected]
    wanted = merge_utils.task_arithmetic(expected, torch.tensor(WEIGHTS))
    of = Recipe(made(WEIGHTS).parts, "magnitude_prune", density)
    torch.testing.assert_close(combine(of, tensors(), WEIGHTS, [""] * 3), wanted)


@pytest.mark.parametrize("density", [0.9, 0.3, 0.01])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_is_pefts(density: float, sign: Any) -> None:
    wanted = merge_utils.ties(tensors(), torch.tensor(WEIGHTS), density, sign)
    of = made(WEIGHTS, "ties", density=density, sign=sign)
    torch.testing.assert_close(combine(of, tensors(), WEIGHTS, [""] * 3), wanted)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_with_entries_that_follow_from_the_seed(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT draws from the global generator; given our entries it gives our result."""
    of, seeds = made(WEIGHTS, method, density=0.4), ["one", "two", "three"]
    ones = torch.ones(13, 17)
    plain = Recipe(of.parts, "dare_linear", 0.4)
    masks = [(combine(plain, [ones], [1.0], [seed]) > 0).float() for seed in seeds]
    assert 0.25 < float(torch.stack(masks).mean()) < 0.55
    drawn = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(drawn))
    wanted = getattr(merge_utils, method)(tensors(), torch.tensor(WEIGHTS), 0.4)
    found = combine(of, tensors(), WEIGHTS, seeds)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(combine(of, tensors(), WEIGHTS, seeds), found, rtol=0, atol=0)
    assert not torch.equal(combine(of, tensors(), WEIGHTS, ["four", "five", "six"]), found)


def test_dare_keeps_the_mean() -> None:
    of = Recipe(made([1.0]).parts, "dare_linear", 0.25)
    kept = combine(of, [torch.ones(400, 400)], [1.0], ["s"])
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)
    assert {*kept.flatten().tolist()} == {0, 4}


# ---- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("rank", [None, 7])
def test_methods_act_on_the_changes_of_the_weights(
    kinds: Kinds, tmp_path: Path, method: str, rank: int | None
) -> None:
    """Adapters of other ranks and kinds, which PEFT does not merge."""
    names = [ALL, "SHIRA", "LORA rsLoRA, patterns"]
    of = made(WEIGHTS, method, density=0.4, seed=3, rank=rank)
    found, report = run(kinds, of, names, tmp_path / "merged")
    lost = had = 0.0
    programs = [kinds.program(name) for name in names]
    for name, part in found.sites.items():
        site = sites_of(kinds.base)[name]
        having = [(p.sites[name], w) for p, w in zip(programs, WEIGHTS, strict=True) if name in p.sites]
        seeds = [
            f"3/{i}/{key}/{name}/False/weight"
            for i, key in enumerate(
                part.key for part, p in zip(of.parts, programs, strict=True) if name in p.sites
            )
        ]
        weights = [w for _, w in having]
        changes = [weight_change(each, site, kinds.base) for each, _ in having]
        wanted = combine(of, changes, weights, seeds)
        got = weight_change(part, site, kinds.base)
        if rank is not None:
            u, s, v = torch.linalg.svd(wanted.double())
            wanted = ((u[:, :rank] * s[:rank]) @ v[:rank]).float()
            assert part.rank <= rank
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
        exact = torch.stack([w * each for w, each in zip(weights, changes, strict=True)]).sum(0)
        lost, had = lost + float(((got - exact) ** 2).sum()), had + float((exact**2).sum())
    assert report.distance == pytest.approx((lost / had) ** 0.5, rel=1e-3)
    assert (lost / had) ** 0.5 > 0.1


def test_pruned_changes_are_stored_by_their_entries(kinds: Kinds, tmp_path: Path) -> None:
    found, _ = run(kinds, made([1.0, 1.0], "magnitude_prune", density=0.05), [ALL, BIAS], tmp_path / "m")
    assert found.primitives == ("bias", "sparse")
    full = sum(
        p.b.shape[1] * p.a.shape[1]
        for p in kinds.program(ALL).sites.values()
        if p.a is not None and p.b is not None
    )
    assert (tmp_path / "m" / WEIGHTS_FILE).stat().st_size < full  # a byte for each entry, not four


@pytest.mark.parametrize("keep_rows", [True, False])
def test_loras_give_a_lora_that_peft_loads(kinds: Kinds, tmp_path: Path, keep_rows: bool) -> None:
    """`cat` keeps all rows; without it equal directions are one. rsLoRA, patterns and biases are in the numbers."""
    names = [ALL, "LORA rsLoRA, patterns", ALL, BIAS]
    of = Recipe(tuple(Part(f"{i:064x}", w) for i, w in enumerate([0.5, 0.7, 0.25, -1.0])))
    folder = tmp_path / "merged"
    found, report = run(kinds, of, names, folder, keep_rows=keep_rows)
    assert config_of(folder)["peft_type"] == "LORA"
    assert found.rank == (24 if keep_rows else 20)
    assert report.distance is not None
    assert report.distance < 1e-6
    programs = [kinds.program(name) for name in names]
    exact = blend(programs, [part.weight for part in of.parts], kinds.base, MAX_RANK)
    assert_same(kinds, found, exact)
    base = AutoModelForCausalLM.from_pretrained(kinds.folder(ALL).parent / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(base, folder).eval()
    name = "model.layers.1.mlp.down_proj"
    x = inputs(sites_of(kinds.base)[name]).float()
    with torch.inference_mode():
        got = model.get_submodule(f"base_model.model.{name}")(x)
        assert model(torch.tensor([PROMPT])).logits.isfinite().all()
    want = outputs(exact.sites[name], sites_of(kinds.base)[name], kinds.base, x.double())
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_pefts_own_merge_is_the_same_where_it_is_right(kinds: Kinds, tmp_path: Path, kind: str) -> None:
    """Plain LoRAs, by those of its methods that act on ΔW."""
    names, weights = [ALL, "LORA"], [0.7, -0.5]
    method, rank = kind.removesuffix("svd").rstrip("_") or "linear", None if kind == "cat" else 5
    density = 0.4 if method in ("ties", "magnitude_prune") else 1.0
    of = made(weights, "linear" if kind == "cat" else method, density=density, rank=rank)
    found, _ = run(kinds, of, names, tmp_path / "m", keep_rows=kind == "cat")
    base = AutoModelForCausalLM.from_pretrained(kinds.folder(ALL).parent / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, kinds.folder(ALL), adapter_name="0")
    model.load_adapter(kinds.folder("LORA"), adapter_name="1")
    model.add_weighted_adapter(["0", "1"], weights, "both", kind, svd_rank=5, density=density)
    for name, part in found.sites.items():
        expected = model.get_submodule(f"base_model.model.{name}").get_delta_weight("both")
        got = weight_change(part, sites_of(kinds.base)[name], kinds.base)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max(), name


def test_activated_loras_stay_activated(kinds: Kinds, tmp_path: Path) -> None:
    found, _ = run(kinds, made([0.5, 0.75]), ["LORA aLoRA"] * 2, tmp_path / "m")
    assert config_of(tmp_path / "m")["alora_invocation_tokens"] == [14, 1]
    assert found.invocation == (14, 1)


SERVED = [
    name
    for name, case in cases().items()
    if "PREFIX" not in name and "PROMPT" not in name.removeprefix("ADAPTION_PROMPT")
    and case.kind not in ("CARTRIDGE", "CPT", "P_TUNING")
]  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_every_kind_comes_back_as_it_was(kinds: Kinds, tmp_path: Path, name: str) -> None:
    """PEFT 0.21 loses the scale of rsLoRA, DoRA's magnitude and biases here."""
    of = Recipe((Part("0" * 64, 1.0),))
    found, report = run(kinds, of, [name], tmp_path / "merged")
    assert_same(kinds, found, kinds.program(name))
    assert report.distance is None or report.distance < 1e-6
    proportional = kinds.program(name).portability == "proportional"
    assert bool(report.warnings) == proportional
    if config_of(tmp_path / "merged")["peft_type"] == "PROGRAM":
        assert (found.portability == "proportional") == proportional
    assert found.rank <= kinds.program(name).rank


@pytest.mark.parametrize(
    "names", [[DORA, BIAS], ["OFT", "IA3"], ["LORA modules_to_save lm_head, embed_tokens", ALL]]
)
def test_kinds_that_are_no_lora_are_merged_into_our_own(
    kinds: Kinds, tmp_path: Path, names: list[str]
) -> None:
    found, report = run(kinds, made([0.4, 1.5]), names, tmp_path / "merged")
    assert config_of(tmp_path / "merged")["peft_type"] == "PROGRAM"
    assert_same(
        kinds, found, blend([kinds.program(name) for name in names], [0.4, 1.5], kinds.base, MAX_RANK)
    )
    assert report.distance is not None
    assert report.distance < 1e-6


def test_a_merge_of_a_merge(kinds: Kinds, tmp_path: Path) -> None:
    first, _ = run(kinds, made([1.0, 0.5]), [DORA, "SHIRA"], tmp_path / "first")
    again = blend([first, kinds.program(ALL)], [0.5, 1.0], kinds.base, MAX_RANK)
    names = [DORA, "SHIRA", ALL]
    at_once = blend([kinds.program(name) for name in names], [0.5, 0.25, 1.0], kinds.base, MAX_RANK)
    assert_same(kinds, again, at_once)


def test_the_same_recipe_gives_the_same_bytes(kinds: Kinds, tmp_path: Path) -> None:
    of = made([0.5, 0.5], "dare_ties", density=0.5, seed=1)
    for number in (1, 2):
        run(kinds, of, [ALL, BIAS], tmp_path / str(number))
    run(kinds, of._replace(seed=2), [ALL, BIAS], tmp_path / "3")
    files = [(tmp_path / str(number) / WEIGHTS_FILE).read_bytes() for number in (1, 2, 3)]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_methods_on_entries_refuse_what_has_none(kinds: Kinds, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"an activation \(softmax\)"):
        run(kinds, made([1.0, 1.0], "ties", density=0.5), ["ADAPTION_PROMPT", ALL], tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == []


def test_a_rank_over_the_limit_is_refused(kinds: Kinds, tmp_path: Path) -> None:
    programs = [kinds.program(ALL), kinds.program(BIAS)]
    with pytest.raises(AdapterRefused, match="rank 12, and --max-lora-rank is 8"):
        merge(made([1.0, 1.0]), programs, kinds.base, 8, tmp_path, keep_rows=True)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_site(kinds: Kinds, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(kinds, made([1.0, 0.5]), [ALL, "LORA"], tmp_path / "m", progress=lambda *each: seen.append(each))
    total = len(kinds.program(ALL).sites)
    assert seen == [(done, total) for done in range(total + 1)]


# ---- files ----------------------------------------------------------------------------------------


def broken(kinds: Kinds, folder: Path, change: Any) -> None:
    """A PROGRAM with something wrong."""
    site = sites_of(kinds.base)["model.layers.0.mlp.up_proj"]
    dense = torch.randn(site.out_features, site.in_features)
    part = SiteProgram(dense=dense, scale_out=torch.zeros(site.out_features))
    folder.mkdir()
    save_program(Program("x", {site.name: part}), sites_of(kinds.base), folder)
    found = {}
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            found[key.removeprefix(f"base_model.model.{site.name}.")] = file.get_tensor(key)
    config = config_of(folder)
    change(config, found)
    (folder / WEIGHTS_FILE).unlink()
    with TensorFile(folder / WEIGHTS_FILE) as target:
        for name, tensor in found.items():
            place = "base_model.model." if name.startswith("model.") else f"base_model.model.{site.name}."
            target.add(place + name, tensor)
        target.finish()
    (folder / CONFIG_FILE).write_text(json.dumps(config))


BROKEN: dict[str, tuple[Any, str]] = {
    "shape": (lambda c, t: t.update(dense=t["dense"][:5].clone()), "dense at model.layers.0"),
    "axes": (lambda c, t: t.update(dense=t["dense"][0].clone()), "must have 2 axes"),
    "half a product": (lambda c, t: t.update({"lora_A.weight": t["dense"][:2].clone()}), "belong together"),
    "name": (lambda c, t: t.update(extra=t["dense"]), "is no tensor of a PROGRAM"),
    "layer": (
        lambda c, t: t.update({"model.layers.9.mlp.up_proj.dense": t["dense"]}),
        "the base has no layer",
    ),
    "field": (lambda c, t: c.update(extra=1), "unknown fields 'extra'"),
    "activation": (
        lambda c, t: c["activations"].update({"model.layers.0.mlp.up_proj": {"kind": "exec"}}),
        "does not fit rank 0",
    ),
    "idle pair": (
        lambda c, t: c["pairs"].update({"model.layers.1.mlp.up_proj": 2}),
        "no tensor at this place",
    ),
    "pair": (lambda c, t: c["pairs"].update({"model.layers.0.mlp.up_proj": 2}), "no cross_out and no pair"),
    "tail": (
        lambda c, t: t.update({"tail.model.layers.0.mlp.up_proj.dense": t["dense"]}) or None,
        "is no tensor of a PROGRAM|the base has no layer",
    ),
    "span": (lambda c, t: c.update(span={"first": 0, "last": 0}), "there must be first or last"),
    "invocation": (lambda c, t: c.update(invocation=[5000]), "tokens of the base"),
    "tokens": (
        lambda c, t: t.update(
            {"tokens.ids": torch.tensor([1], dtype=torch.int32), "tokens.rows": t["dense"][:1].clone()}
        ),
        "rows of tokens are at",
    ),
    "sparse": (
        lambda c, t: t.update(
            {
                "sparse.starts": torch.tensor([0, 5], dtype=torch.int32),
                "sparse.columns": torch.tensor([0], dtype=torch.int32),
                "sparse.values": torch.ones(1),
            }
        ),
        "whole numbers from 0 to 1",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_program_with_a_fault_is_refused(kinds: Kinds, tmp_path: Path, fault: str) -> None:
    change, why = BROKEN[fault]
    broken(kinds, tmp_path / "broken", change)
    with pytest.raises(AdapterRefused, match=why):
        lower(tmp_path / "broken", kinds.base, MAX_RANK)
    broken(kinds, tmp_path / "whole", lambda config, found: None)
    assert lower(tmp_path / "whole", kinds.base, MAX_RANK).primitives == ("output_scale", "dense")


def test_a_file_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with TensorFile(tmp_path / "x") as file:
            file.add("a", torch.ones(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_blend_of_another_method_is_what_its_merge_is(kinds: Kinds, tmp_path: Path) -> None:
    of = made([1.0, 0.5], "ties", density=0.5)
    at_once = follow(of, [kinds.program(ALL), kinds.program(DORA)], kinds.base, MAX_RANK, 1 << 30)
    found, _ = run(kinds, of, [ALL, DORA], tmp_path / "m")
    assert_same(kinds, found, at_once)
