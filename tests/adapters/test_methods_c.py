"""FOURIERFT, WAVEFT, C3A, SHIRA, SUPERTUNING, HIRA, GLORA and LORA's variants against PEFT itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file
from tests.adapters.files import Files, refusal
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods import c3a, common, fourierft, glora, hira, shira, supertuning, waveft
from veneer.adapters.methods.base import Limits
from veneer.adapters.methods.changes import change, is_product, sparse_change
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.program import EMBEDDING, Program, Site, SiteProgram, SparseMatrix
from veneer.adapters.registry import lower
from veneer.errors import AdapterRefused

KEY, Q0 = "base_model.model.", "model.layers.0.self_attn.q_proj"
K0 = "model.layers.0.self_attn.k_proj"
TARGETS = ["q_proj", "v_proj", "down_proj"]  # square, and wider on either side
LIMIT = 64  # every rank that a layer of the base can have
METHODS: dict[str, tuple[ModuleType, type[Any], dict[str, Any]]] = {
    "FOURIERFT": (fourierft, peft.FourierFTConfig, {"n_frequency": 100}),
    "WAVEFT": (waveft, peft.WaveFTConfig, {"n_frequency": 100}),
    "C3A": (c3a, peft.C3AConfig, {"block_size": 16}),
    "SHIRA": (shira, peft.ShiraConfig, {"r": 3}),
    "SUPERTUNING": (supertuning, peft.SupertuningConfig, {"sparsity": 0.9}),
    "HIRA": (hira, peft.HiraConfig, {"r": 4}),
    "GLORA": (glora, peft.GloraConfig, {"r": 4}),
}
BLOCKS = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj", "v_proj"]}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in METHODS),
    *((kind, {"target_modules": "all-linear"}) for kind in METHODS),
    *((kind, {"target_modules": ["lm_head", "k_proj"]}) for kind in METHODS),
    *((kind, {"target_modules": r".*layers\.1.*up_proj"}) for kind in METHODS),
    ("FOURIERFT", {"n_frequency": 64 * 32, "target_modules": ["v_proj"]}),
    ("FOURIERFT", {"scaling": 3.5, "random_loc_seed": -4, "layers_to_transform": [1]}),
    ("FOURIERFT", {"n_frequency_pattern": {Q0: 7, "v_proj": 30}}),
    ("FOURIERFT", {"n_frequency_pattern": {Q0: 7, "q_proj": 30}}),  # the full name does not count
    ("FOURIERFT", {"exclude_modules": ["q_proj"]}),
    *(("WAVEFT", {"wavelet_family": name}) for name in ("db1", "db2", "sym2")),
    ("WAVEFT", {"use_idwt": False, "wavelet_family": "coif3"}),
    ("WAVEFT", {"proportional_parameters": True}),
    ("WAVEFT", {"proportional_parameters": True, "n_frequency": 1, "wavelet_family": "db2"}),
    ("WAVEFT", {"n_frequency_pattern": {Q0: 7, "q_proj": 30}, "random_loc_seed": 3}),
    ("C3A", {"block_size": 1}),
    (
        "C3A",
        {"block_size": 32, "block_size_pattern": {"layers.0.self_attn.q_proj": 64, "1.mlp.down_proj": 2}},
    ),
    ("SHIRA", {"r": 21, "target_modules": ["v_proj"]}),
    ("SUPERTUNING", {"select_top": False}),
    ("SUPERTUNING", {"sparsity": 0.0}),
    ("SUPERTUNING", {"r": 3}),
    ("SUPERTUNING", {"r": 3, "lora_alpha": 1.5}),
    ("HIRA", {"rank_pattern": {"v_proj": 1, Q0: 9}}),
    ("GLORA", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    ("GLORA", {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    ("GLORA", {"config_A_B": "none"}),
    ("GLORA", {"config_A_B": "none", "config_C": "none", "config_D_E": "vector"}),
    ("LORA", {"bias": "all"}),
    ("LORA", {"bias": "lora_only", "lora_bias": True}),
    ("LORA", {"velora_config": VeloraConfig(num_groups=4), "use_rslora": True}),
    ("LORA", {"velora_config": VeloraConfig(num_groups=4, init_type="random"), "bias": "lora_only"}),
    ("LORA", {"monteclora_config": MontecloraConfig()}),
    ("LORA", {"use_bdlora": BdLoraConfig(nblocks=4, **BLOCKS), "lora_bias": True}),
    ("LORA", {"use_bdlora": BdLoraConfig(nblocks=2, target_modules_bd_a=["0.self"], match_strict=False)}),
]
BIASED = ("GLORA", "LORA")  # what these compute depends on the base's biases


def llama(biased: bool) -> Any:
    """A random Llama of two layers, float32, with biases or without."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attention_bias=biased,
        mlp_bias=biased,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


@dataclass(frozen=True)
class ModelBase:
    """A transformers model as a base, as far as these methods ask."""

    model: Any
    limits: Limits = Limits()  # noqa: RUF009  (a tuple)
    dtype: torch.dtype = torch.float32
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


BASE: Any = ModelBase(None)  # its limits are all that is asked


@dataclass(frozen=True)
class Saved(Files):
    """An adapter that PEFT saved."""

    biased: bool  # whether the base has biases

    @property
    def base(self) -> Any:
        return ModelBase(llama(self.biased))

    def refusal(self, max_rank: int = LIMIT) -> str:
        return refusal(self.folder, self.base, max_rank)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Saved]:
    def make(kind: str, *, biased: bool = False, **fields: Any) -> Saved:
        """Let PEFT make an adapter, fill it with random values and save it."""
        if kind == "LORA":
            config = peft.LoraConfig(**{"r": 8, "target_modules": TARGETS} | fields)
        else:
            _, config_class, defaults = METHODS[kind]
            config = config_class(**{"target_modules": TARGETS} | defaults | fields)
        model = get_peft_model(llama(biased), config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        return Saved(tmp_path / "adapter", biased)

    return make


def dense(matrix: SparseMatrix, columns: int) -> torch.Tensor:
    counts = matrix.starts.diff()
    found = torch.zeros(len(counts), columns)
    found[torch.repeat_interleave(torch.arange(len(counts)), counts), matrix.columns] = matrix.values
    return found


def apply(model: nn.Module, program: Program) -> None:
    """y = scale y + B^T (A x) + beta + D x at each site."""

    def hook(site: SiteProgram) -> Callable[..., torch.Tensor]:
        def adapted(module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            if site.scale_out is not None:
                y = y * site.scale_out
            if site.a is not None and site.b is not None:
                y = y + inputs[0] @ site.a.T @ site.b
            if site.dense is not None:
                y = y + inputs[0] @ site.dense.T
            if site.sparse is not None:
                y = y + inputs[0] @ dense(site.sparse, inputs[0].shape[-1]).T
            return y if site.bias is None else y + site.bias

        return adapted

    for name, site in program.sites.items():
        model.get_submodule(name).register_forward_hook(hook(site))


@torch.no_grad()
def compare(saved: Saved, tokens: torch.Tensor) -> Program:
    """Assert that the lowered adapter gives PEFT's logits."""
    expected = PeftModel.from_pretrained(llama(saved.biased), saved.folder).eval()(tokens).logits
    model = llama(saved.biased)
    plain = model(tokens).logits
    program = lower(saved.folder, saved.base, LIMIT)
    apply(model, program)
    scale = expected.abs().max()
    assert (plain - expected).abs().max() > 1e-3 * scale, "the adapter must matter"
    assert (model(tokens).logits - expected).abs().max() < 1e-5 * scale
    for site in program.sites.values():
        assert all(t.is_contiguous() and t.dtype in (torch.float32, torch.int32) for t in site.tensors)
    return program


@pytest.mark.parametrize(("kind", "fields"), VARIANTS, ids=lambda value: str(value)[:60])
def test_logits_equal_pefts(
    kind: str, fields: dict[str, Any], save: Callable[..., Saved], tokens: torch.Tensor
) -> None:
    program = compare(save(kind, biased=kind in BIASED, **fields), tokens)
    assert program.kind == kind.lower()


@pytest.mark.parametrize("form", ["lora", "vector", "constant"])
def test_glora_without_biases(form: str, save: Callable[..., Saved], tokens: torch.Tensor) -> None:
    program = compare(save("GLORA", config_A_B=form), tokens)
    assert program.primitives == (("dense",) if form == "lora" else ("low_rank", "output_scale"))


def test_portability(tmp_path: Path, save: Callable[..., Saved]) -> None:
    for kind in METHODS:
        saved = save(kind)
        told = lower(saved.folder, saved.base, LIMIT).portability
        assert told == ("proportional" if kind in ("HIRA", "GLORA") else "independent"), kind


# ---- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_every_field_of_peft_is_decided_on(kind: str) -> None:
    module, config, _ = METHODS[kind]
    decided = {*module.Honoured.__struct_fields__, *module.TrainingOnly.__struct_fields__, *module.REFUSED}
    assert {field.name for field in dataclasses.fields(config)} - decided == set()


@pytest.mark.parametrize("kind", METHODS)
def test_defaults_are_pefts(kind: str) -> None:
    """A field that the file leaves out means what it means to PEFT."""
    module, config, _ = METHODS[kind]
    theirs = json.loads(json.dumps(config().to_dict(), default=list))
    ours = common.read_fields({"peft_type": kind}, module.Honoured, module.TrainingOnly, module.REFUSED, "")
    for name in set(module.Honoured.__struct_fields__) & set(theirs):
        assert (getattr(ours, name) or None) == (theirs[name] or None), name


@pytest.mark.parametrize(
    ("kind", "field", "value", "named"),
    [
        *((kind, "modules_to_save", ["lm_head"], "modules_to_save = ") for kind in METHODS),
        *((kind, "task_type", "SEQ_CLS", "task_type = ") for kind in METHODS),
        *((kind, "something_new", 1, "'something_new'") for kind in METHODS),
        *((kind, "target_modules", None, "target_modules = null") for kind in METHODS),
        *((kind, "bias", "all", 'bias = "all"') for kind in ("FOURIERFT", "WAVEFT", "GLORA", "C3A")),
        ("SHIRA", "exclude_modules", ["q_proj"], "exclude_modules = "),
        ("FOURIERFT", "random_loc_seed", None, "random_loc_seed = null"),
        ("FOURIERFT", "random_loc_seed", 2**70, "random_loc_seed = "),
        ("FOURIERFT", "n_frequency", 0, "n_frequency = 0"),
        ("FOURIERFT", "n_frequency", 10**12, "room for 1 to 4096"),
        ("FOURIERFT", "n_frequency_pattern", {"^model": 4}, "n_frequency_pattern = "),
        ("FOURIERFT", "n_frequency_pattern", {"(a+)+": 4}, "n_frequency_pattern = "),
        ("WAVEFT", "wavelet_family", "db7", 'wavelet_family = "db7"'),
        ("WAVEFT", "n_frequency", -1, "n_frequency = -1"),
        ("C3A", "block_size", 48, "it must divide the 64 inputs and 64 outputs"),
        ("C3A", "block_size", 0, "block_size = 0"),
        ("SHIRA", "r", 0, "r = 0"),
        ("SHIRA", "r", 10**9, "room for 1 to 4096"),
        ("SUPERTUNING", "sparsity", 1.0, "sparsity = 1.0"),
        ("SUPERTUNING", "sparsity", 0.9999, "it leaves no entry"),
        ("SUPERTUNING", "lora_alpha", 4, "it needs r"),
        ("SUPERTUNING", "r", 0, "r = 0"),
        ("SUPERTUNING", "save_precomputed_indices", False, "base-fragile"),
        ("HIRA", "r", 0, "r = 0"),
        ("GLORA", "config_A_B", "full", 'config_A_B = "full"'),
        ("GLORA", "r", 0, "r = 0"),
    ],
)
def test_wrong_configs_are_refused_by_field(
    kind: str, field: str, value: Any, named: str, save: Callable[..., Saved]
) -> None:
    saved = save(kind)
    saved.edit_config(**{field: value})
    assert named in saved.refusal()


# ---- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_tensors_must_be_exactly_those_of_the_config(
    kind: str, save: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "_load", lambda *_: pytest.fail("a tensor was read"))
    saved = save(kind)
    tensors = load_file(saved.folder / WEIGHTS_FILE)
    key = next(name for name in tensors if Q0 in name)
    saved.edit_tensors(lambda new: new.update({key: torch.zeros(3, 5)}))
    assert f"{key!r} has [3, 5]" in saved.refusal()
    saved.edit_tensors(lambda new: new.pop(key))
    assert f"1 tensor missing: {key!r}" in saved.refusal()
    extra = key.replace(Q0, K0)
    saved.edit_tensors(lambda new: new.update({key: tensors[key], extra: torch.zeros(1)}))
    assert f"1 tensor cannot be served: {extra!r}" in saved.refusal()
    saved.edit_tensors(lambda new: (new.pop(extra), new.update({f"{KEY}model.norm.weight": torch.ones(64)})))
    assert "cannot replace the base's own" in saved.refusal()


@pytest.mark.parametrize("kind", ["FOURIERFT", "C3A", "HIRA", "GLORA"])
def test_full_changes_over_the_limit_are_refused_with_their_size(
    kind: str, save: Callable[..., Saved]
) -> None:
    saved = save(kind)
    small = dataclasses.replace(saved.base, limits=Limits(module_bytes=1000))
    with pytest.raises(AdapterRefused) as error:
        lower(saved.folder, small, LIMIT)
    assert "takes 16384 bytes in full, [64, 64] numbers of 4 bytes" in error.value.message
    assert "The limit is 1000 (--max-module-bytes)" in error.value.message


def test_a_few_frequencies_are_of_low_rank(save: Callable[..., Saved], tokens: torch.Tensor) -> None:
    saved = save("FOURIERFT", n_frequency=3)
    assert compare(saved, tokens).rank == 6
    primitives = lower(saved.folder, saved.base, 5).primitives
    assert "dense" in primitives  # the change in full, as exact


def test_few_entries_are_stored_by_themselves(save: Callable[..., Saved], tokens: torch.Tensor) -> None:
    program = compare(save("WAVEFT", n_frequency=3, use_idwt=False), tokens)
    assert program.primitives == ("sparse",)
    assert all(site.sparse and len(site.sparse.values) == 3 for site in program.sites.values())


@pytest.mark.parametrize(
    ("kind", "key"), [("SHIRA", "shira_indices"), ("SUPERTUNING", "supertuning_indices")]
)
@pytest.mark.parametrize("value", [-1, 10_000])
def test_positions_outside_the_weight_are_refused(
    kind: str, key: str, value: int, save: Callable[..., Saved]
) -> None:
    saved = save(kind)
    saved.edit_tensors(lambda tensors: tensors[f"{KEY}{Q0}.{key}"].view(-1)[5].fill_(value))
    assert f"{key}' must hold whole numbers from 0" in saved.refusal()


def test_shira_serves_what_windows_writes_and_adds_up_repeated_positions(
    save: Callable[..., Saved], tokens: torch.Tensor
) -> None:
    saved = save("SHIRA")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("indices"):
                tensors[name] = tensor.float()
                tensors[name][:, 1] = tensors[name][:, 0]

    saved.edit_tensors(edit)
    compare(saved, tokens)


def test_values_that_overflow_are_refused(save: Callable[..., Saved]) -> None:
    saved = save("GLORA", config_A_B="vector", biased=True)
    saved.edit_tensors(lambda tensors: [tensors[f"{KEY}{Q0}.glora_C.{x}"].mul_(1e30) for x in ("Xd", "Xu")])
    assert "q_proj overflows" in saved.refusal()


def test_gloras_empty_paths_must_be_empty(save: Callable[..., Saved]) -> None:
    saved = save("GLORA")
    key = f"{KEY}{Q0}.glora_E.zeros"
    saved.edit_tensors(lambda tensors: tensors[key].fill_(1))
    assert f"{key!r} stands for a path that is off" in saved.refusal()


# ---- LORA's variants ------------------------------------------------------------------------------


def test_bias_does_nothing_on_a_base_without_biases(save: Callable[..., Saved]) -> None:
    saved = save("LORA")
    saved.edit_config(bias="all")
    assert lower(saved.folder, saved.base, LIMIT).primitives == ("low_rank",)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("none", f"{KEY}{Q0}.base_layer.bias"),
        ("lora_only", f"{KEY}{K0}.bias"),
        ("all", f"{KEY}model.norm.bias"),
        ("all", f"{KEY}{Q0}.bias"),
    ],
)
def test_other_biases_are_refused(value: str, key: str, save: Callable[..., Saved]) -> None:
    saved = save("LORA", biased=True)
    saved.edit_config(bias=value)
    saved.edit_tensors(lambda tensors: tensors.update({key: torch.zeros(64)}))
    assert f"1 tensor cannot be served: {key!r}" in saved.refusal()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"nblocks": 3, "target_modules_bd_b": ["proj"]}, "nblocks must divide"),
        ({"nblocks": 0, "target_modules_bd_b": ["proj"]}, "nblocks must divide"),
        ({"nblocks": 2, "target_modules_bd_b": ["q_proj"]}, "match_strict"),
        ({"nblocks": 2, "target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_"]}, "in both"),
        ({"nblocks": "2"}, "use_bdlora = "),
        ({"blocks": 2}, "use_bdlora = "),
    ],
)
def test_wrong_blocks_are_refused(value: dict[str, Any], named: str, save: Callable[..., Saved]) -> None:
    saved = save("LORA")
    saved.edit_config(use_bdlora=value)
    assert named in saved.refusal()


def test_variants_do_not_combine(save: Callable[..., Saved]) -> None:
    saved = save("LORA")
    saved.edit_config(velora_config={}, use_bdlora={"match_strict": False})
    assert "PEFT does not combine it with velora_config" in saved.refusal()


def test_what_velora_trains_with_is_refused_elsewhere(save: Callable[..., Saved]) -> None:
    saved = save("LORA", velora_config=VeloraConfig(num_groups=4))
    saved.edit_config(velora_config=None)
    assert "lora_velora_embed" in saved.refusal()


# ---- the form of a change ---------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "inside", "rank"), [(64, 128, 9), (300, 40, 35), (5, 7, 2), (700, 900, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_change_of_low_rank_is_a_product(out: int, inside: int, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    delta = torch.randn(out, rank, dtype=dtype) @ torch.randn(rank, inside, dtype=dtype)
    site = Site("here", inside, out)
    found = change(site, delta, rank, BASE)
    assert found.primitives == {"low_rank"}
    assert found.a is not None
    assert found.b is not None
    assert (found.a.shape, found.b.shape) == ((rank, inside), (rank, out))
    assert all(tensor.is_contiguous() for tensor in found.tensors)
    assert (found.b.double().T @ found.a.double() - delta).abs().max() < 1e-6 * delta.abs().max()
    whole = change(site, delta, rank - 1, BASE)
    assert whole.dense is not None
    assert whole.dense.equal(delta.float())


def test_a_product_is_smaller_than_the_change() -> None:
    """30 + 20 numbers for each rank: eleven ranks take 550, twelve as many as the change itself, 600."""
    site = Site("here", 30, 20)
    torch.manual_seed(0)
    for rank, primitive in ((11, "low_rank"), (12, "dense")):
        delta = torch.randn(20, rank).double() @ torch.randn(rank, 30).double()
        assert change(site, delta, 64, BASE).primitives == {primitive}
        assert is_product(site, rank, 64) == (primitive == "low_rank")
    assert not is_product(site, 11, 10)


def test_no_change_is_the_identity() -> None:
    assert change(Site("here", 6, 8), torch.zeros(8, 6), 4, BASE).is_identity
    nothing = sparse_change(Site("here", 60, 80), torch.zeros(2, 3).long(), torch.zeros(3), 4, BASE)
    assert nothing.is_identity


def test_small_directions_are_kept() -> None:
    """What the probes leave out is measured: a full rank is never cut to the limit."""
    delta = torch.diag(torch.logspace(0, -5, 200, dtype=torch.double))
    assert change(Site("here", 200, 200), delta, 64, BASE).primitives == {"dense"}


def test_entries_are_added_up_where_they_coincide() -> None:
    site = Site("here", 50, 40)
    places = torch.tensor([[3, 0, 3, 39], [7, 49, 7, 0]])
    found = sparse_change(site, places, torch.tensor([1.0, 2.0, 0.5, 3.0]), 8, BASE)
    assert found.sparse is not None
    expected = torch.zeros(40, 50)
    expected[3, 7], expected[0, 49], expected[39, 0] = 1.5, 2, 3
    assert dense(found.sparse, 50).equal(expected)


def test_many_entries_are_a_change_in_full() -> None:
    places = torch.ones(40, 50).nonzero().T
    values = torch.arange(2000).sin()
    found = sparse_change(Site("here", 50, 40), places, values, 1, BASE)
    assert found.dense is not None
    assert found.dense.equal(values.view(40, 50))


def test_what_overflows_is_refused() -> None:
    site = Site("here", 30, 30)
    with pytest.raises(AdapterRefused, match="here overflows"):
        change(site, torch.full((30, 30), 1e300, dtype=torch.double), 3, BASE)
    with pytest.raises(AdapterRefused, match="here overflows"):
        sparse_change(site, torch.tensor([[1], [1]]), torch.tensor([1e300]).double(), 3, BASE)
