"""DoRA, IA3, OFT, BOFT, RoAd, BEFT and LN tuning against PEFT itself, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BeftConfig, BOFTConfig, IA3Config, LNTuningConfig, LoraConfig, OFTConfig, RoadConfig
from safetensors.torch import load_file, save_file
from tests.adapters.files import refusal
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Phi3Config, Qwen2Config, Qwen3Config

from veneer.adapters.methods import beft, boft, ia3, ln_tuning, oft, road
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import Program, SiteProgram
from veneer.adapters.registry import lower
from veneer.engine.base import Base, load_base
from veneer.training.conformance.cases import CONTINUATION, PROMPT, Case, peft_case, tiny_base
from veneer.training.conformance.cases_d import ALL_LINEAR, CASES, _strongly

TOKENS = [*PROMPT, *CONTINUATION]
KEY = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
METHODS = {
    ia3: IA3Config,
    oft: OFTConfig,
    boft: BOFTConfig,
    road: RoadConfig,
    beft: BeftConfig,
    ln_tuning: LNTuningConfig,
}
NAMES = [method.__name__.rpartition(".")[2] for method in METHODS]
BY_NAME = {case.method: case for case in CASES}
FIRST = {case.kind: case.method for case in reversed(CASES)}
FIRST["LORA"] = "LORA DoRA"
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),
    "gemma3": Gemma3TextConfig(**_SIZES, head_dim=16, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**_SIZES),
}


@dataclasses.dataclass(frozen=True)
class Served:
    """A tiny base as a method sees it, and the same for PEFT."""

    base: Base
    model: Any


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """A function: architecture -> a random base with biases, where it has them, and norms that are not 1."""
    made: dict[str, Served] = {}

    def make(architecture: str) -> Served:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            if architecture == "llama":
                tiny_base(folder)
            else:
                torch.manual_seed(2)
                model = AutoModelForCausalLM.from_config(CONFIGS[architecture])
                for parameter in model.parameters():
                    parameter.data += 0.15 * torch.randn_like(parameter)
                model.save_pretrained(folder)
            base = load_base(folder, quantization="none", dtype=torch.float32, device=torch.device("cpu"))
            made[architecture] = Served(base, AutoModelForCausalLM.from_pretrained(folder).eval())
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def made(served: Callable[[str], Served], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case's adapter on the tiny Llama, made once by PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    folders: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in folders:
            folders[method] = root / f"adapter{len(folders)}"
            BY_NAME[method].write(served("llama").model, folders[method])
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


@pytest.fixture
def llama(served: Callable[[str], Served]) -> Base:
    return served("llama").base


def forward(linear: nn.Linear, site: SiteProgram) -> Callable[[torch.Tensor], torch.Tensor]:
    """y = OUT(W0 x' + b) + B^T (A x) + beta, as program.py defines it."""

    def run(x: torch.Tensor) -> torch.Tensor:
        turned = x if site.rotate_in is None else x @ torch.block_diag(*site.rotate_in)  # type: ignore[no-untyped-call]
        y = functional.linear(turned, linear.weight, linear.bias)
        if site.scale_out is not None:
            scaled = site.scale_out * y
            if site.cross_out is not None:
                places = torch.arange(y.shape[-1])
                half = site.pair // 2
                partner = torch.where(places % site.pair < half, places + half, places - half)
                scaled = scaled + site.cross_out * y[..., partner]
            y = scaled
        if site.a is not None and site.b is not None:
            y = y + x @ site.a.T @ site.b
        return y if site.bias is None else y + site.bias

    return run


def log_probabilities(model: Any, program: Program | None) -> torch.Tensor:
    model = copy.deepcopy(model)
    for name, site in (program.sites if program else {}).items():
        linear = model.get_submodule(name)
        linear.forward = forward(linear, site)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([TOKENS])).logits[0], -1)


def assert_equals_peft(case: Case, folder: Path, on: Served, program: Program) -> None:
    expected = case.reference(on.model, folder, TOKENS)
    scale = expected.abs().max()
    assert (log_probabilities(on.model, None) - expected).abs().max() > 1e-2 * scale, (
        "the adapter must matter"
    )
    assert (log_probabilities(on.model, program) - expected).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_outputs_equal_pefts(
    case: Case, made: Callable[[str], Path], served: Callable[[str], Served]
) -> None:
    folder = made(case.method)
    program = lower(folder, served("llama").base, 64)
    assert_equals_peft(case, folder, served("llama"), program)
    for site in program.sites.values():
        for tensor in site.tensors:
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.float32
    assert program.portability == ("independent" if case.kind == "BEFT" else "proportional")
    assert program.kind == case.kind.lower()
    assert not program.is_identity


# A fourth of qwen2's linear layers have a bias, which some methods scale and some do not.
BIASED = [case for case in CASES if case.kind != "LN_TUNING"] + [
    peft_case(
        "LORA",
        "DoRA with its own biases",
        lambda model: LoraConfig(r=4, use_dora=True, bias="lora_only", target_modules=ALL_LINEAR),
    ),
    peft_case("BEFT", "all", lambda model: BeftConfig(target_modules=ALL_LINEAR), randomize=_strongly),
]


@pytest.mark.parametrize("case", BIASED, ids=lambda case: case.method)
def test_the_bases_bias_is_scaled_only_where_peft_scales_it(
    case: Case, served: Callable[[str], Served], tmp_path: Path
) -> None:
    qwen = served("qwen2")
    assert qwen.base.bias(Q) is not None
    case.write(qwen.model, tmp_path / "adapter")
    assert_equals_peft(case, tmp_path / "adapter", qwen, lower(tmp_path / "adapter", qwen.base, 64))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 9])
def test_every_length_of_the_neumann_series(
    rows: int, served: Callable[[str], Served], tmp_path: Path
) -> None:
    def config(model: Any) -> OFTConfig:
        return OFTConfig(oft_block_size=8, num_cayley_neumann_terms=rows, target_modules=["o_proj"])

    case = peft_case("OFT", f"{rows} terms", config)
    case.write(served("llama").model, tmp_path / "adapter")
    program = lower(tmp_path / "adapter", served("llama").base, 64)
    expected = case.reference(served("llama").model, tmp_path / "adapter", TOKENS)
    found = log_probabilities(served("llama").model, program)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert program.is_identity == (rows == 1)


@pytest.mark.parametrize("fields", [{"oft_block_size": 24}, {"oft_block_size": 0, "r": 5}])
def test_oft_moves_a_size_to_the_nearest_divisor(
    fields: dict[str, int], served: Callable[[str], Served], tmp_path: Path
) -> None:
    case = peft_case("OFT", f"{fields}", lambda model: OFTConfig(target_modules=ALL_LINEAR, **fields))
    case.write(served("llama").model, tmp_path / "adapter")
    program = lower(tmp_path / "adapter", served("llama").base, 64)
    assert_equals_peft(case, tmp_path / "adapter", served("llama"), program)


# ---- LN tuning --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "norms"),
    [
        ("qwen2", ["post_attention_layernorm"]),
        ("qwen3", ["input_layernorm", "post_attention_layernorm", "norm"]),
        ("gemma3", ["input_layernorm", "pre_feedforward_layernorm", "model.norm"]),
        ("phi3", ["input_layernorm", "post_attention_layernorm", "norm"]),
    ],
)
def test_norms_of_other_architectures(
    architecture: str, norms: list[str], served: Callable[[str], Served], tmp_path: Path
) -> None:
    on = served(architecture)
    case = peft_case(
        "LN_TUNING", architecture, lambda model: LNTuningConfig(target_modules=norms), randomize=_strongly
    )
    case.write(on.model, tmp_path / "adapter")
    assert_equals_peft(case, tmp_path / "adapter", on, lower(tmp_path / "adapter", on.base, 64))


@pytest.mark.parametrize(
    ("architecture", "norm"),
    [("qwen3", "q_norm"), ("gemma3", "post_attention_layernorm"), ("gemma3", "post_feedforward_layernorm")],
)
def test_norms_that_something_else_reads_are_refused(
    architecture: str, norm: str, served: Callable[[str], Served], tmp_path: Path
) -> None:
    on = served(architecture)
    case = peft_case("LN_TUNING", norm, lambda model: LNTuningConfig(target_modules=[norm]))
    case.write(on.model, tmp_path / "adapter")
    message = refusal(tmp_path / "adapter", on.base)
    assert f'{norm}": its output is not only read by linear layers; leave it out.' in message


def test_a_norm_of_zero_cannot_become_another(
    served: Callable[[str], Served], made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = served("llama").base
    norms = base.norms
    norms["model.norm"].weight[3] = 0
    monkeypatch.setattr(Base, "norms", property(lambda self: norms))
    assert "The base's model.norm has a weight of 0" in refusal(made("LN_TUNING"), base)


def test_a_regular_expression_leaves_the_norms_to_the_file(copied: Callable[..., Path], llama: Base) -> None:
    program = lower(copied("LN_TUNING", target_modules=".*norm"), llama, 64)
    assert set(program.sites) == {name for name in llama.sites if not name.endswith(("o_proj", "down_proj"))}


def test_excluded_norms_have_no_tensors(copied: Callable[..., Path], llama: Base) -> None:
    assert "model.norm.ln_tuning_layers.weight" in refusal(
        copied("LN_TUNING", exclude_modules=["norm"]), llama
    )


# ---- the sets of fields -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_every_field_of_peft_is_decided_once(method: Any) -> None:
    decided = [*method.Honoured.__struct_fields__, *method.TrainingOnly.__struct_fields__, *method.REFUSED]
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    assert fields <= set(decided)
    twice = {name for name in decided if decided.count(name) > 1}
    assert twice <= {"exclude_modules", "layers_to_transform", "layers_pattern"} - fields


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
    "bias": "all",
    "boft_n_butterfly_factor": 2,
    "exclude_modules": ["v_proj"],
    "layers_pattern": "layers",
    "layers_to_transform": [1],
    "modules_to_save": ["lm_head"],
    "task_type": "SEQ_CLS",
}


@pytest.mark.parametrize(
    ("kind", "field"),
    [(name.upper(), field) for name, method in zip(NAMES, METHODS, strict=True) for field in method.REFUSED],
)
def test_refused_fields_are_named(kind: str, field: str, copied: Callable[..., Path], llama: Base) -> None:
    assert f"{field} = {json.dumps(ON[field])}: " in refusal(copied(FIRST[kind], **{field: ON[field]}), llama)


@pytest.mark.parametrize("kind", FIRST)
def test_unknown_fields_are_refused(kind: str, copied: Callable[..., Path], llama: Base) -> None:
    assert "use_something_new" in refusal(copied(FIRST[kind], use_something_new=False), llama)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("LORA DoRA", {"lora_bias": True}, "use_dora = true: PEFT does not combine it with lora_bias"),
        ("LORA DoRA", {"velora_config": {}}, "PEFT does not combine it with"),
        ("LORA DoRA", {"use_dora": False}, "use_dora is false, or leaves this layer out"),
        ("IA3", {"feedforward_modules": None}, "feedforward_modules = null: it must list"),
        ("IA3", {"feedforward_modules": []}, "ia3_l' has [1, 128], the config and the base need [64, 1]"),
        ("OFT", {"r": 4}, "oft_block_size = 8: exactly one of it and r = 4 must be 0"),
        ("OFT", {"oft_block_size": 0}, "oft_block_size = 0: exactly one of it and r = 0 must be 0"),
        ("OFT", {"oft_block_size": 16}, "a wrong shape"),
        ("OFT", {"block_share": True}, "a wrong shape"),
        ("OFT", {"num_cayley_neumann_terms": 65}, "num_cayley_neumann_terms = 65: "),
        ("OFT", {"eps": -1.0}, "eps = -1.0: "),
        (
            "BOFT",
            {"boft_block_num": 4},
            "boft_block_size = 4: exactly one of it and boft_block_num = 4 must be 0",
        ),
        (
            "BOFT",
            {"boft_block_size": 12},
            "boft_block_size = 12: it must divide the 64 inputs of model.layers.0",
        ),
        ("ROAD road_1", {"group_size": 7}, "group_size = 7: "),
        (
            "ROAD road_1",
            {"group_size": 48},
            "group_size = 48: it must divide the 64 outputs of model.layers.0",
        ),
        ("ROAD road_1", {"variant": "road_3"}, 'variant = "road_3": '),
        ("ROAD road_1", {"variant": "road_2"}, "a wrong shape"),
        (
            "LN_TUNING",
            {"target_modules": ["q_proj"]},
            'target_modules = ["q_proj"]: no norm of the base matches',
        ),
        ("LN_TUNING", {"target_modules": None}, "target_modules = null: no norm of the base matches"),
    ],
)
def test_configs_that_cannot_be_served(
    method: str, changes: dict[str, Any], message: str, copied: Callable[..., Path], llama: Base
) -> None:
    assert message in refusal(copied(method, **changes), llama)


def test_oft_of_old_peft_is_refused_and_of_unknown_age_told(copied: Callable[..., Path], llama: Base) -> None:
    folder = copied("OFT", peft_version="0.17.1")
    [warning] = lower(folder, llama, 64).warnings
    assert "PEFT 0.18 changed the series" in warning
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["oft_block_size"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert "oft_block_size = null: PEFT before 0.14" in refusal(folder, llama)


def test_rotations_larger_than_the_kernels_are_refused(
    served: Callable[[str], Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oft, "MAX_BLOCK", 4)
    for kind, config in (
        ("OFT", lambda model: OFTConfig(oft_block_size=8, target_modules=["q_proj"])),
        ("BOFT", lambda model: BOFTConfig(boft_block_size=8, target_modules=["q_proj"])),
    ):
        peft_case(kind, "large", config).write(served("llama").model, tmp_path / kind)
        message = refusal(tmp_path / kind, served("llama").base)
        assert f"oft_block_size = 8: {Q} has blocks of 8 features; blocks of up to 4 are served" in message


@pytest.mark.parametrize("kind", FIRST)
def test_tensors_must_be_exactly_the_configs(kind: str, copied: Callable[..., Path], llama: Base) -> None:
    folder = copied(FIRST[kind])
    tensors = load_file(folder / WEIGHTS_FILE)
    key, *_ = tensors
    wider = torch.cat([tensors[key], tensors[key][:1]]) if tensors[key].ndim else tensors[key]
    for change, message in (
        ({key: wider}, "a wrong shape"),
        ({key.replace("layers.0", "layers.7"): tensors[key].clone()}, "layers.7"),
        ({f"{KEY}{Q}.base_layer.weight": torch.zeros(64, 64)}, "base_layer.weight"),
        ({key: torch.full_like(tensors[key], float("nan"))}, "holds NaN"),
    ):
        save_file(tensors | change, folder / WEIGHTS_FILE)
        assert message in refusal(folder, llama)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, folder / WEIGHTS_FILE)
    assert f"missing: '{key}'" in refusal(folder, llama)


def test_dora_of_a_zero_row_is_refused(made: Callable[[str], Path], llama: Base, monkeypatch: Any) -> None:
    folder = made("LORA DoRA")
    tensors = load_file(folder / WEIGHTS_FILE)
    monkeypatch.setattr(Base, "weight", lambda self, site: torch.zeros(self.sites[site].out_features, 64))
    assert lower(folder, llama, 64).sites  # the change alone has a norm
    silent = {key: 0 * tensor if "lora_B" in key else tensor for key, tensor in tensors.items()}
    monkeypatch.setattr("veneer.adapters.checkpoint.Checkpoint.read", lambda self, key: silent[key].float())
    assert f"At {Q} a row of the weight that DoRA normalizes is zero" in refusal(folder, llama)
