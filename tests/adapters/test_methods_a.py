"""AdaLoRA, LoHa, LoKr, DeLoRA, GraLoRA, HRA, MiSS and RandLoRA against PEFT itself, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    RandLoraConfig,
    get_peft_model,
)
from peft.tuners.lokr.layer import factorization as peft_factorization
from safetensors.torch import load_file, save_file
from tests.adapters.files import edit_tensors, refusal
from torch import nn
from transformers import AutoModelForCausalLM

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods import adalora, delora, gralora, hra, loha, lokr, miss, randlora
from veneer.adapters.methods.base import Limits
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import EMBEDDING, Program, Site, SiteProgram
from veneer.adapters.registry import lower
from veneer.training.conformance.cases import CONTINUATION, PROMPT, Case, tiny_base
from veneer.training.conformance.cases_a import CASES

TOKENS = [*PROMPT, *CONTINUATION]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
KEY = "base_model.model."
METHODS: dict[ModuleType, type] = {
    adalora: AdaLoraConfig,
    loha: LoHaConfig,
    lokr: LoKrConfig,
    delora: DeloraConfig,
    gralora: GraloraConfig,
    hra: HRAConfig,
    miss: MissConfig,
    randlora: RandLoraConfig,
}
NAMES = [method.__name__.rpartition(".")[2] for method in METHODS]
BY_NAME = {case.method: case for case in CASES}


@dataclasses.dataclass(frozen=True)
class TinyBase:
    """The conformance base as a method sees it."""

    model: Any
    limits: Limits = Limits()  # noqa: RUF009  (a tuple)
    dtype: torch.dtype = torch.float32
    norms: Any = dataclasses.field(default_factory=dict)
    tied: bool = False

    @property
    def sites(self) -> dict[str, Site]:
        linears = [(name, each) for name, each in self.model.named_modules() if isinstance(each, nn.Linear)]
        return {name: Site(name, each.in_features, each.out_features) for name, each in linears}

    @property
    def embedding(self) -> Site:
        config = self.model.config
        return Site(EMBEDDING, config.vocab_size, config.hidden_size)

    def weight(self, site: str) -> torch.Tensor:
        weight: torch.Tensor = self.model.get_submodule(site).weight
        return weight.detach().float().clone()

    def bias(self, site: str) -> torch.Tensor | None:
        return None

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"these methods do not ask for the base's {name}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    folder = tmp_path_factory.mktemp("base")
    tiny_base(folder)
    return TinyBase(AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.fixture(scope="module")
def made(tiny: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case's adapter, made once by PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    folders: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in folders:
            folders[method] = root / f"adapter{len(folders)}"
            BY_NAME[method].write(tiny.model, folders[method])
        return folders[method]

    return make


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case's adapter with other fields in its config."""

    def copy_case(method: str, **changes: Any) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(made(method), folder)
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | changes))
        return folder

    return copy_case


def log_probabilities(tiny: TinyBase, program: Program | None) -> torch.Tensor:
    """Of the base with the primitives of a program: y += B^T (A x) + D x."""

    def hook(site: SiteProgram) -> Callable[..., torch.Tensor]:
        a, b, dense = site.a, site.b, site.dense
        if dense is not None:
            return lambda module, inputs, y: y + inputs[0] @ dense.T
        assert a is not None
        assert b is not None
        return lambda module, inputs, y: y + inputs[0] @ a.T @ b

    sites = program.sites.items() if program else ()
    handles = [tiny.model.get_submodule(name).register_forward_hook(hook(site)) for name, site in sites]
    try:
        with torch.inference_mode():
            return torch.log_softmax(tiny.model(torch.tensor([TOKENS])).logits[0], -1)
    finally:
        for handle in handles:
            handle.remove()


def assert_equals_peft(case: Case, folder: Path, tiny: TinyBase, program: Program) -> None:
    expected = case.reference(tiny.model, folder, TOKENS)
    scale = expected.abs().max()
    assert (log_probabilities(tiny, None) - expected).abs().max() > 1e-2 * scale, "the adapter must matter"
    assert (log_probabilities(tiny, program) - expected).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_outputs_equal_pefts(case: Case, made: Callable[[str], Path], tiny: TinyBase) -> None:
    folder = made(case.method)
    program = lower(folder, tiny, 64)
    assert_equals_peft(case, folder, tiny, program)
    for site in program.sites.values():
        for tensor in site.tensors:
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.float32
    proportional = case.kind == "HRA" or case.method == "MISS bat"
    assert program.portability == ("proportional" if proportional else "independent")
    assert program.kind == case.kind.lower()


# ---- the sets of fields ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_every_field_of_peft_is_decided_once(method: Any) -> None:
    decided = [*method.Honoured.__struct_fields__, *method.TrainingOnly.__struct_fields__, *method.REFUSED]
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    assert fields <= set(decided)
    assert {name for name in decided if decided.count(name) > 1} <= {"exclude_modules"} - fields


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_defaults_are_pefts(method: Any) -> None:
    theirs = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(METHODS[method])
    }
    kind = method.__name__.rpartition(".")[2].upper()
    ours = method.Honoured(peft_type=kind)
    for name in method.Honoured.__struct_fields__:
        if name in theirs and name != "peft_type":
            assert getattr(ours, name) == theirs[name], name
    for name, (off, _) in method.REFUSED.items():
        assert theirs.get(name) in off, name


ON: dict[str, Any] = {
    "alora_invocation_tokens": [1],
    "arrow_config": {},
    "bias": "all",
    "ensure_weight_tying": True,
    "exclude_modules": ["v_proj"],
    "init_lora_weights": "pissa",
    "kasa_config": {},
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "megatron_config": {"a": 1},
    "modules_to_save": ["lm_head"],
    "monteclora_config": {},
    "target_parameters": ["x"],
    "task_type": "SEQ_CLS",
    "trainable_token_indices": [1],
    "use_bdlora": {},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {},
}
FIRST = {case.kind: case.method for case in reversed(CASES)}  # the first case of each kind


@pytest.mark.parametrize(
    ("kind", "field"),
    [(name.upper(), field) for name, method in zip(NAMES, METHODS, strict=True) for field in method.REFUSED],
)
def test_refused_fields_are_named(kind: str, field: str, copied: Callable[..., Path], tiny: TinyBase) -> None:
    assert f"{field} = {json.dumps(ON[field])}: " in refusal(copied(FIRST[kind], **{field: ON[field]}), tiny)


@pytest.mark.parametrize("kind", FIRST)
def test_unknown_fields_are_refused(kind: str, copied: Callable[..., Path], tiny: TinyBase) -> None:
    assert "use_something_new" in refusal(copied(FIRST[kind], use_something_new=False), tiny)


MASK = "model.layers.1.self_attn.q_proj.lora_E"


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("ADALORA", "init_r", 0),
        ("ADALORA", "init_r", 65),
        ("ADALORA", "rank_pattern", {MASK: [True] * 5}),
        ("ADALORA", "rank_pattern", {MASK: [1] * 6}),
        ("ADALORA", "rank_pattern", {MASK: 4}),
        ("ADALORA", "rank_pattern", {"model.layers.0.mlp.up_proj.lora_E": [True] * 6}),
        ("ADALORA", "rank_pattern", {MASK.replace("lora_E", "lora_A"): [True] * 6}),
        ("LOHA", "r", 0),
        ("LOHA", "r", 9),  # needs rank 81
        ("LOHA", "rank_pattern", {"q_proj": 9}),
        ("LOHA", "rank_pattern", {"(a+)+": 2}),
        ("LOHA", "alpha", "8"),
        ("LOKR w2 of low rank", "r", 0),
        ("LOKR w2 of low rank", "r", 10**400),
        ("LOKR w2 of low rank", "decompose_factor", "auto"),
        ("LOKR w2 of low rank", "init_weights", "other"),
        ("DELORA", "r", 65),
        ("DELORA", "rank_pattern", {"v_proj": 0}),
        ("GRALORA", "r", 64),  # needs rank 128
        ("GRALORA", "r", 7),
        ("GRALORA", "gralora_k", 0),
        ("GRALORA", "gralora_k", 3),
        ("GRALORA", "hybrid_r", -1),
        ("GRALORA", "hybrid_r", 10**9),
        ("HRA", "r", 65),
        ("HRA", "apply_GS", 1),
        ("MISS", "r", 0),
        ("MISS", "r", 65),
        ("MISS", "init_weights", "maxi"),
        ("MISS mini", "mini_r", 0),
        ("MISS mini", "mini_r", 5),
        ("MISS bat", "r", 7),
        ("RANDLORA", "r", 0),
        ("RANDLORA", "r", 10**9),
        ("RANDLORA", "projection_prng_key", 1 << 64),
        ("RANDLORA", "save_projection", 1),
    ],
)
def test_wrong_values_are_refused_before_a_tensor_is_read(
    method: str,
    field: str,
    value: object,
    copied: Callable[..., Path],
    tiny: TinyBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    message = refusal(copied(method, **{field: value}), tiny)
    assert re.search(rf"adapter_config.json: ({field}|r|gralora_k) = ", message)


def test_a_dense_change_over_the_limit_names_the_limit(made: Callable[[str], Path], tiny: TinyBase) -> None:
    small = dataclasses.replace(tiny, limits=Limits(module_bytes=8191))
    for method in ("MISS bat", "RANDLORA", "LOKR whole factors"):
        message = refusal(made(method), small)
        assert re.search(r"no product of rank \d+ or less, and takes \d+ bytes in full", message)
        assert "The limit is 8191 (--max-module-bytes)" in message


def test_randlora_says_what_16_bits_do_to_it(made: Callable[[str], Path], tiny: TinyBase) -> None:
    assert not lower(made("RANDLORA"), tiny, 64).warnings
    [warning] = lower(made("RANDLORA"), dataclasses.replace(tiny, dtype=torch.bfloat16), 64).warnings
    assert "--dtype float32" in warning


# ---- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [case.method for case in CASES if case.method != "ADALORA pruned"])
def test_files_must_hold_exactly_the_tensors(
    method: str, copied: Callable[..., Path], tiny: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    folder = copied(method)
    tensors = load_file(folder / WEIGHTS_FILE)
    names = [name for name in tensors if "self_attn" in name and "randlora_A" not in name]
    names = [name for name in names if "randlora_B" not in name]
    victim = names[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != victim}, folder / WEIGHTS_FILE)
    assert f"1 tensor missing: {victim!r}" in refusal(folder, tiny)
    wide = torch.cat((tensors[victim], tensors[victim]))
    save_file(tensors | {victim: wide}, folder / WEIGHTS_FILE)
    assert f"of a wrong shape: {victim!r}" in refusal(folder, tiny)
    save_file(tensors | {f"{KEY}model.norm.weight": torch.ones(64)}, folder / WEIGHTS_FILE)
    assert "1 tensor cannot be served: 'base_model.model.model.norm.weight'" in refusal(folder, tiny)


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("LOHA", "alpha"),
        ("LOKR whole factors", "alpha"),
        ("GRALORA", "alpha"),
        ("RANDLORA", "randlora_alpha"),
    ],
)
def test_changes_that_overflow_are_refused(
    method: str, field: str, copied: Callable[..., Path], tiny: TinyBase
) -> None:
    assert "overflows" in refusal(copied(method, **{field: 1e100}), tiny)


# ---- single methods -------------------------------------------------------------------------------


def test_adalora_without_alpha_has_the_rank_for_it(copied: Callable[..., Path], tiny: TinyBase) -> None:
    folder = copied("ADALORA pruned", lora_alpha=0)
    program = lower(folder, tiny, 64)
    assert_equals_peft(BY_NAME["ADALORA pruned"], folder, tiny, program)


def test_adalora_leaves_out_layers_that_lost_their_rank(made: Callable[[str], Path], tiny: TinyBase) -> None:
    sites = lower(made("ADALORA pruned"), tiny, 64).sites
    assert {name: site.rank for name, site in sites.items()} == {
        Q: 6,
        Q.replace("q_proj", "v_proj"): 6,
        Q.replace("0", "1", 1): 3,
    }


def test_factorization_is_pefts() -> None:
    for dimension in (1, 2, 7, 12, 32, 64, 97, 100, 128, 3584, 14336):
        for factor in (-3, -1, 0, 1, 2, 3, 4, 8, 10, 127, 20_000):
            assert lokr.factorization(dimension, factor) == peft_factorization(dimension, factor)


def test_lokr_needs_the_product_of_the_ranks(made: Callable[[str], Path], tiny: TinyBase) -> None:
    programs = [lower(made("LOKR patterns"), tiny, limit) for limit in (64, 23)]
    assert [program.primitives for program in programs] == [("low_rank", "dense")] * 2
    assert [program.rank for program in programs] == [24, 8]
    assert lower(made("LOKR both of low rank"), tiny, 4).rank == 4


@pytest.mark.parametrize("method", ["HRA", "HRA apply_GS"])
def test_a_zero_reflection_is_refused(method: str, copied: Callable[..., Path], tiny: TinyBase) -> None:
    folder = copied(method)
    edit_tensors(folder, lambda tensors: tensors[f"{KEY}{Q}.hra_u"][:, 1].zero_())
    assert "no direction" in refusal(folder, tiny)


def test_dependent_columns_are_refused_only_where_peft_orthonormalizes(
    made: Callable[[str], Path], tmp_path: Path, tiny: TinyBase
) -> None:
    """An untrained HRA has its columns in equal pairs, which undo each other."""
    for method in ("HRA", "HRA apply_GS"):
        folder = tmp_path / method
        shutil.copytree(made(method), folder)
        edit_tensors(folder, lambda tensors: [each[:, 1].copy_(each[:, 0]) for each in tensors.values()])
    assert "linearly independent, column 1 is not" in refusal(tmp_path / "HRA apply_GS", tiny)
    assert_equals_peft(BY_NAME["HRA"], tmp_path / "HRA", tiny, lower(tmp_path / "HRA", tiny, 64))


def test_randlora_without_a_copy_for_each_layer(copied: Callable[..., Path], tiny: TinyBase) -> None:
    folder = copied("RANDLORA")
    before = lower(folder, tiny, 64).sites[V]

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if re.search(r"proj\.randlora_[AB]$", name)]:
            del tensors[name]

    edit_tensors(folder, drop)
    after = lower(folder, tiny, 64).sites[V]
    assert before.dense is not None
    assert after.dense is not None
    assert torch.equal(before.dense, after.dense)


def test_randlora_bases_must_agree(copied: Callable[..., Path], tiny: TinyBase) -> None:
    folder = copied("RANDLORA")
    key = f"{KEY}{V}.randlora_B"
    edit_tensors(folder, lambda tensors: tensors[key][0].add_(1))
    message = refusal(folder, tiny)
    assert key in message
    assert "in common" in message


@pytest.mark.parametrize(
    "form", [{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}]
)
def test_randlora_bases_are_drawn_as_peft_draws_them(form: dict[str, bool], tiny: TinyBase) -> None:
    fields: dict[str, Any] = {"r": 9, "projection_prng_key": 3, "save_projection": False, **form}
    config = RandLoraConfig(target_modules=["k_proj", "down_proj"], **fields)
    theirs = get_peft_model(copy.deepcopy(tiny.model), config).base_model
    ours = randlora.Honoured(peft_type="RANDLORA", **fields)
    sizes = randlora.shared_sizes(ours, [Site("k", 64, 32), Site("down", 128, 64)])
    a, b = randlora.draw_bases(ours, sizes)
    assert torch.equal(a, theirs.randlora_A["default"].float())
    assert torch.equal(b, theirs.randlora_B["default"].float())
