"""VERA, PVERA, VBLORA, UNILORA, TINYLORA, POLY, PEANUT and DEFT against PEFT: its logits, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.adapters.files import Files, refusal
from torch import nn
from transformers.activations import ACT2FN

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods import deft, peanut, poly, pvera, tinylora, unilora, vblora, vera
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.program import EMBEDDING, Program, Site, SiteProgram
from veneer.adapters.registry import lower

KEY = "base_model.model."
Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
TARGETS = ["q_proj", "up_proj"]  # two widths on the outside
METHODS: dict[str, tuple[ModuleType, type[Any], dict[str, Any]]] = {
    "VERA": (vera, peft.VeraConfig, {"r": 6}),
    "PVERA": (pvera, peft.PveraConfig, {"r": 6}),
    "VBLORA": (vblora, peft.VBLoRAConfig, {"num_vectors": 20, "vector_length": 16}),
    "UNILORA": (unilora, peft.UniLoraConfig, {"theta_d_length": 300}),
    "TINYLORA": (tinylora, peft.TinyLoraConfig, {"r": 4, "u": 5}),
    "POLY": (poly, peft.PolyConfig, {"r": 4, "task_type": "CAUSAL_LM"}),
    "PEANUT": (peanut, peft.PeanutConfig, {"r": 4}),
    "DEFT": (deft, peft.DeftConfig, {"r": 4}),
}
SHARED_TARGETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "every width and the head": {"target_modules": ["k_proj", "down_proj", "lm_head"]},
    "rank 1": {"r": 1},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("VERA", {"save_projection": False}),
    ("VERA", {"save_projection": False, "projection_prng_key": 12345, "target_modules": "all-linear"}),
    ("VERA", {"projection_prng_key": -7}),
    ("VERA", {"layers_to_transform": [1]}),
    ("VERA", {"target_modules": r".*\.1\..*(up|v)_proj", "save_projection": False}),
    ("PVERA", {"save_projection": False, "generator_seed": 3}),
    ("VBLORA", {"topk": 1}),
    ("VBLORA", {"topk": 20}),
    ("VBLORA", {"save_only_topk_weights": True}),
    ("VBLORA", {"save_only_topk_weights": True, "topk": 1}),
    ("VBLORA", {"save_only_topk_weights": True, "topk": 5, "num_vectors": 300}),
    ("VBLORA", {"exclude_modules": ["up_proj"]}),
    ("UNILORA", {"proj_seed": 7, "theta_d_length": 40, "r": 3}),
    ("UNILORA", {"theta_d_length": 100_000}),  # more than are used
    ("UNILORA", {"save_indices": True, "target_modules": r".*(q|up)_proj"}),
    ("UNILORA", {"layers_to_transform": [1]}),
    ("TINYLORA", {"save_projection": False}),
    ("TINYLORA", {"save_projection": False, "projection_seed": -3, "target_modules": "all-linear"}),
    ("TINYLORA", {"weight_tying": 1.0}),
    ("TINYLORA", {"weight_tying": 0.4, "target_modules": "all-linear"}),
    ("TINYLORA", {"r": 60, "target_modules": ["k_proj"]}),  # more than the layer has: 32
    ("POLY", {"n_splits": 4, "n_skills": 3}),
    ("POLY", {"n_skills": 1}),
    ("PEANUT", {"depth": 1, "scaling": -2.5}),
    ("PEANUT", {"depth": 3, "act_fn": "silu"}),
    *(("PEANUT", {"act_fn": name, "depth": 1}) for name in ("gelu", "tanh", "prelu", "linear", "quick_gelu")),
    ("DEFT", {"decomposition_method": "qr"}),
    ("DEFT", {"decomposition_method": "qr", "alpha": 12}),
    ("DEFT", {"alpha": 2}),
    ("DEFT", {"alpha": 0}),  # which peft takes for None
    ("DEFT", {"para": True}),
    ("DEFT", {"para": True, "decomposition_method": "qr"}),
    ("DEFT", {"r": 60, "target_modules": ["k_proj"], "decomposition_method": "qr", "alpha": 12}),
]


@dataclass(frozen=True)
class ModelBase:
    """A transformers model as a base, as far as these methods ask."""

    model: Any
    norms: Any = dataclasses.field(default_factory=dict)
    tied: bool = False

    @property
    def sites(self) -> Mapping[str, Site]:
        linears = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        return {name: Site(name, m.in_features, m.out_features) for name, m in linears.items()}

    @property
    def embedding(self) -> Site:
        config = self.model.config
        return Site(EMBEDDING, config.vocab_size, config.hidden_size)

    def weight(self, site: str) -> torch.Tensor:
        weight: torch.Tensor = self.model.get_submodule(site).weight
        return weight.detach().clone()

    def bias(self, site: str) -> torch.Tensor | None:
        bias = self.model.get_submodule(site).bias
        return None if bias is None else bias.detach().clone()


@dataclass(frozen=True)
class Saved(Files):
    """An adapter that PEFT saved."""

    loaded: Any  # what PEFT loads from there


Make = Callable[..., Saved]


@pytest.fixture
def make_base(make_llama: Callable[..., Any]) -> Callable[[], ModelBase]:
    """A base whose attention has biases, and weights so large that its logits are not flat."""

    def make() -> ModelBase:
        model = make_llama()
        torch.manual_seed(3)
        for name, parameter in list(model.named_parameters()):
            parameter.data += 0.1 * torch.randn_like(parameter)
            if name.endswith("q_proj.weight"):
                linear = model.get_submodule(name.removesuffix(".weight"))
                linear.bias = nn.Parameter(torch.randn(linear.out_features))
        return ModelBase(model)

    return make


@pytest.fixture
def base(make_base: Callable[[], ModelBase]) -> Any:
    return make_base()


@pytest.fixture
def make(tmp_path: Path, make_base: Callable[[], ModelBase]) -> Make:
    """Let PEFT make an adapter of a kind, train it by chance, save and load it."""

    def save(kind: str, **fields: Any) -> Saved:
        _, config, defaults = METHODS[kind]
        model = get_peft_model(make_base().model, config(**{"target_modules": TARGETS} | defaults | fields))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(make_base().model, tmp_path / "adapter").eval()
        return Saved(tmp_path / "adapter", loaded)

    return save


def apply(model: nn.Module, program: Program) -> None:
    """Add the primitives to a plain model: y += B^T (A x). These methods have no other."""

    def hook(site: SiteProgram) -> Callable[..., torch.Tensor]:
        assert site.primitives - {"shared_factors"} == {"low_rank"}
        a, b = site.folded().a, site.folded().b
        assert a is not None
        assert b is not None
        return lambda module, inputs, y: y + inputs[0] @ a.T @ b

    for name, site in program.sites.items():
        model.get_submodule(name).register_forward_hook(hook(site))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *((kind, fields) for kind in METHODS for fields in SHARED_TARGETS.values()),
        *VARIANTS,
    ],
    ids=str,
)
def test_logits_equal_pefts(
    kind: str, fields: dict[str, Any], make: Make, base: Any, tokens: torch.Tensor
) -> None:
    saved = make(kind, **fields)
    asked = {"task_ids": torch.tensor([0])} if kind == "POLY" else {}
    with torch.no_grad():
        reference = saved.loaded(tokens, **asked).logits
        plain = base.model(tokens).logits
        program = lower(saved.folder, base, 64)
        apply(base.model, program)
        logits = base.model(tokens).logits
    scale = reference.abs().max()
    assert (plain - reference).abs().max() > 1e-2 * scale, "the adapter must matter"
    assert (logits - reference).abs().max() < 1e-5 * scale
    assert program.kind == kind.lower()
    for site in program.sites.values():
        for tensor in site.tensors:
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.float32
            assert not tensor.requires_grad


@pytest.mark.parametrize("kind", METHODS)
def test_portability_is_told(kind: str, make: Make, base: Any) -> None:
    saved = make(kind)
    saved.edit_config(base_model_name_or_path="org/base")
    program = lower(saved.folder, base, 64)
    assert program.portability == ("proportional" if kind in ("PEANUT", "DEFT") else "independent")
    assert program.base_model == "org/base"


@pytest.mark.parametrize("kind", ["VERA", "PVERA"])
def test_projections_are_rebuilt_bit_by_bit(kind: str, make: Make) -> None:
    saved = make(kind, projection_prng_key=99, target_modules="all-linear")
    tensors = load_file(saved.folder / WEIGHTS_FILE)
    a, b = (tensors[f"base_model.{kind.lower()}_{letter}"] for letter in "AB")
    rebuilt = vera.rebuild(99, (a.shape[0], a.shape[1]), (b.shape[0], b.shape[1]))
    assert torch.equal(rebuilt[0], a)
    assert torch.equal(rebuilt[1], b)


def test_saved_projections_count_and_not_the_key(make: Make, base: Any) -> None:
    saved = make("VERA")
    before = lower(saved.folder, base, 64)
    saved.edit_config(projection_prng_key=1)
    after = lower(saved.folder, base, 64)
    assert all(torch.equal(before.sites[name].a, site.a) for name, site in after.sites.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["VERA", "PVERA"])
def test_layers_of_one_width_share_their_projection(kind: str, make: Make, base: Any) -> None:
    program = lower(make(kind, target_modules=["q_proj", "up_proj", "down_proj"]).folder, base, 64)
    places = {(a.data_ptr(), a.shape) for site in program.sites.values() if (a := site.a) is not None}
    assert {shape[1] for _, shape in places} == {64, 128}
    assert len(places) == 2


@pytest.mark.parametrize("kind", ["VERA", "TINYLORA"])
def test_rebuilding_is_warned_about(kind: str, make: Make, base: Any) -> None:
    warnings = " ".join(lower(make(kind, save_projection=False).folder, base, 64).warnings)
    assert "save_projection: false" in warnings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", METHODS)
def test_half_precision_files_are_served(kind: str, dtype: torch.dtype, make: Make, base: Any) -> None:
    saved = make(kind)
    saved.edit_tensors(lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    assert all(site.a is not None and site.a.any() for site in lower(saved.folder, base, 64).sites.values())


# ---- the sets of fields ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_every_field_of_peft_is_in_exactly_one_set(kind: str) -> None:
    method, config, _ = METHODS[kind]
    theirs = {field.name for field in dataclasses.fields(config)}
    honoured, training = set(method.Honoured.__struct_fields__), set(method.TrainingOnly.__struct_fields__)
    refused = set(method.REFUSED)
    assert theirs - honoured - training - refused == set()
    assert (honoured - refused) | training | (refused & theirs) == theirs, "a field that PEFT does not know"
    assert not honoured & training
    assert not refused & training
    assert not refused & honoured & theirs


@pytest.mark.parametrize("kind", METHODS)
def test_defaults_are_pefts(kind: str) -> None:
    method, config, _ = METHODS[kind]
    theirs = config(target_modules=["q_proj"]).to_dict()
    for struct in (method.Honoured, method.TrainingOnly):
        fields = msgspec.structs.asdict(msgspec.convert({"peft_type": kind}, struct))
        for name in fields.keys() & theirs.keys() - {"target_modules", "peft_version", "auto_mapping"}:
            assert fields[name] == theirs[name], name
    for name, (off, _) in method.REFUSED.items():
        assert theirs.get(name, off[0]) in off, name


@pytest.mark.parametrize("kind", METHODS)
def test_refused_fields_are_named(kind: str, make: Make, base: Any) -> None:
    saved = make(kind)
    for field, refused in METHODS[kind][0].REFUSED.items():
        if field == "modules_to_save":
            continue  # read before the method's own fields
        value = {"sample_at_inference": True, "bias": "all", "task_type": "SEQ_CLS"}.get(field, [1])
        saved.edit_config(**{field: value})
        message = refusal(saved.folder, base)
        assert f"{field} = {json.dumps(value)}: {refused.reason}" in message
        saved.edit_config(**{field: refused.off[0]})
    lower(saved.folder, base, 64)


@pytest.mark.parametrize("kind", METHODS)
def test_unknown_fields_are_refused_by_name(kind: str, make: Make, base: Any) -> None:
    saved = make(kind)
    saved.edit_config(use_something_new=False)
    assert "unknown fields 'use_something_new'" in refusal(saved.folder, base)


@pytest.mark.parametrize(
    ("kind", "changes", "rule"),
    [
        *((kind, {"r": value}, "from 1 to 64") for kind in METHODS for value in (0, -1, 65, 10**9)),
        *((kind, {"r": value}, "Expected `int`") for kind in METHODS for value in ("4", True, None)),
        ("VERA", {"projection_prng_key": 2**64}, "Expected `int`"),
        ("VERA", {"save_projection": "no"}, "Expected `bool`"),
        ("VBLORA", {"vector_length": 24}, "must divide the 64 in_features of model.layers"),
        ("VBLORA", {"vector_length": 0}, "Expected `int` >= 1"),
        ("VBLORA", {"topk": 0}, "Expected `int` >= 1"),
        ("VBLORA", {"topk": 21}, "num_vectors is only 20"),
        ("UNILORA", {"theta_d_length": 0}, "Expected `int` >= 1"),
        ("UNILORA", {"proj_seed": -1}, "Expected `int` >= 0"),
        ("UNILORA", {"target_modules": ".*q_proj"}, "must be listed by name"),
        ("TINYLORA", {"u": 0}, "Expected `int` >= 1"),
        ("TINYLORA", {"u": 2**40, "save_projection": False}, "may be at most"),
        ("TINYLORA", {"weight_tying": 1.5}, "Expected `float` <= 1"),
        ("TINYLORA", {"weight_tying": -0.1}, "Expected `float` >= 0"),
        ("POLY", {"poly_type": "mhr"}, "Invalid enum value"),
        ("POLY", {"n_splits": 3}, "must divide the widths 64 and 64"),
        ("POLY", {"n_splits": 0}, "Expected `int` >= 1"),
        ("POLY", {"n_skills": 0}, "Expected `int` >= 1"),
        ("POLY", {"n_tasks": 0}, "from 1 to 256"),
        ("POLY", {"n_tasks": 257}, "from 1 to 256"),
        ("PEANUT", {"depth": -1}, "Expected `int` >= 0"),
        ("PEANUT", {"depth": 10**9}, "Expected `int` <= 64"),
        ("PEANUT", {"act_fn": "softmax"}, "must be one of gelu"),
        ("DEFT", {"decomposition_method": "svd"}, "Invalid enum value"),
        ("DEFT", {"alpha": "8"}, "Expected `float | null`"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_before_a_tensor_is_read(
    kind: str,
    changes: dict[str, Any],
    rule: str,
    make: Make,
    base: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = make(kind)
    saved.edit_config(**changes)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    message = refusal(saved.folder, base)
    assert f"{next(iter(changes))} = " in message
    assert rule in message


# ---- the tensors ----------------------------------------------------------------------------------

ONE_KEY = {
    "VERA": f"{KEY}{UP1}.vera_lambda_b",
    "PVERA": f"{KEY}{UP1}.pvera_lambda_d",
    "VBLORA": f"{KEY}{UP1}.vblora_logits_B",
    "UNILORA": "base_model.unilora_theta_d",
    "TINYLORA": "base_model.tinylora_v.3",
    "POLY": f"{KEY}{UP1}.poly_router.module_logits",
    "PEANUT": f"{KEY}{UP1}.peanut_A.weight",
    "DEFT": f"{KEY}{UP1}.deft_R",
}


@pytest.mark.parametrize("kind", METHODS)
def test_wrong_tensors_are_refused(kind: str, make: Make, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, key = make(kind), ONE_KEY[kind]
    whole = load_file(saved.folder / WEIGHTS_FILE)[key]
    saved.edit_tensors(lambda tensors: tensors[key].flatten()[:1].fill_(float("nan")))
    assert f"{key!r} holds NaN" in refusal(saved.folder, base)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    saved.edit_tensors(lambda tensors: tensors.update({key: torch.zeros(3, *whole.shape)}))
    assert f"config and the base need {list(whole.shape)}" in refusal(saved.folder, base)
    saved.edit_tensors(lambda tensors: tensors.pop(key))
    assert f"1 tensor missing: {key!r}" in refusal(saved.folder, base)
    for extra, reason in {
        f"{KEY}{Q0}.base_layer.weight": "cannot replace the base's own",
        f"{KEY}model.norm.weight": "cannot replace the base's own",
        f"{KEY}model.layers.7.self_attn.q_proj.{kind.lower()}_A": "no linear layer 'model.layers.7",
        f"{KEY}{Q0}.{kind.lower()}_new": "does not ask for",
        f"{Q0}.{kind.lower()}_A": "keys begin with 'base_model.'",
    }.items():
        saved.edit_tensors(lambda tensors, extra=extra: tensors.update({extra: torch.zeros(1)}))  # type: ignore[misc]
        message = refusal(saved.folder, base)
        assert extra in message
        assert reason in message
        saved.edit_tensors(lambda tensors, extra=extra: tensors.pop(extra))  # type: ignore[misc]


def test_a_projection_that_the_config_disowns_is_refused(make: Make, base: Any) -> None:
    saved = make("VERA")
    saved.edit_config(save_projection=False)
    assert "'base_model.vera_A', 'base_model.vera_B'" in refusal(saved.folder, base)


@pytest.mark.parametrize("kind", ["VERA", "PEANUT", "DEFT"])
def test_values_that_overflow_are_refused(kind: str, make: Make, base: Any) -> None:
    saved = make(kind)
    saved.edit_tensors(lambda tensors: tensors[ONE_KEY[kind]].fill_(3e38))
    if kind == "VERA":
        saved.edit_tensors(lambda tensors: tensors[f"{KEY}{UP1}.vera_lambda_d"].fill_(1e9))
    elif kind == "DEFT":
        saved.edit_config(alpha=1e9)
    assert f"The change of {UP1} overflows" in refusal(saved.folder, base)


TOP = f"{KEY}{UP1}.vblora_logits_B_topk_"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("indices", 20, f"{TOP}indices"),
        ("indices", 3, "names a vector twice"),
        ("weights", -0.5, "at least 0"),
        ("weights", 1.5, "a sum of at most 1"),
    ],
)
def test_wrong_mixtures_are_refused(name: str, value: float, reason: str, make: Make, base: Any) -> None:
    saved = make("VBLORA", save_only_topk_weights=True)
    saved.edit_tensors(lambda tensors: tensors[TOP + name][0, 0].fill_(value))
    assert reason in refusal(saved.folder, base)


def test_indices_beyond_theta_are_refused(make: Make, base: Any) -> None:
    saved, key = make("UNILORA", save_indices=True), f"{KEY}{UP1}.unilora_indices_A"
    for value in (300, -1):
        saved.edit_tensors(lambda tensors, value=value: tensors[key][0, 0].fill_(value))  # type: ignore[misc]
        assert key in refusal(saved.folder, base)


def test_more_entries_than_the_limit_are_refused(
    make: Make, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = make("UNILORA")
    monkeypatch.setattr(unilora, "_ENTRIES_LIMIT", 2559)
    assert "2560 entries, the limit is 2559" in refusal(saved.folder, base)


def test_every_activation_of_transformers_is_served(make: Make, base: Any) -> None:
    saved = make("PEANUT", depth=1)
    for name in ACT2FN:
        saved.edit_config(act_fn=name)
        lower(saved.folder, base, 64)
