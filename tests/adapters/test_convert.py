"""Conversion of PiSSA, OLoRA and KaSA: on the untouched base the result has the logits of PEFT's changed base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import IA3Config, KasaConfig, LoraConfig, PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.adapters.files import edit_config

from veneer.adapters import convert as converter
from veneer.adapters.convert import Converted, convert
from veneer.adapters.model_weights import Weights
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.registry import lower
from veneer.adapters.taken import DOUBT_LIMIT, TAKES
from veneer.errors import VeneerError
from veneer.server.cli import main

QV = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANDOM = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 5},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 20},
}


class Trained(NamedTuple):
    """An unconverted adapter, the folder of the weights that it was trained on, and what PEFT computes with it."""

    folder: Path
    weights: Path
    logits: torch.Tensor


@pytest.fixture
def train(make_llama: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path) -> Callable[..., Trained]:
    """Let PEFT start an adapter, which changes the model's weights, move its parameters, and save it."""

    def make(dtype: torch.dtype = torch.float32, *, tied: bool = False, **fields: Any) -> Trained:
        model = make_llama(tied=tied).to(dtype)
        model.save_pretrained(tmp_path / "weights", max_shard_size="100KB")
        (tmp_path / "weights" / "tokenizer.json").write_text("{}")
        fields = {"r": 4, "lora_alpha": 12, "target_modules": QV} | fields
        peft = get_peft_model(model, LoraConfig(**fields)).eval()
        torch.manual_seed(1)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:  # KaSA starts from B = 0
                std = 0.3 if "kasa_config" in fields else parameter.std()
                parameter.data += torch.randn_like(parameter) * std
        peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        with torch.no_grad():
            return Trained(tmp_path / "adapter", tmp_path / "weights", peft(tokens).logits)

    return make


def served(model: Any, site_table: Callable[..., Any], folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of a plain model to which the lowered adapter is added."""
    for name, site in lower(folder, site_table(model), 64).sites.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, y, site=site: y + inputs[0] @ site.a.T @ site.b
        )
    logits: torch.Tensor = model(tokens).logits
    return logits


CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa everywhere": {"init_lora_weights": "pissa", "target_modules": [*ALL_LINEAR, "lm_head"]},
    "pissa, rslora and patterns": {"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS},
    "pissa of the whole rank": {"init_lora_weights": "pissa", "r": 32, "target_modules": ["v_proj"]},
    "olora": {"init_lora_weights": "olora"},
    "olora everywhere": {"init_lora_weights": "OLoRA", "target_modules": ALL_LINEAR},
    "olora, rslora and patterns": {"init_lora_weights": "olora", "use_rslora": True, **PATTERNS},
    "kasa": {"kasa_config": KasaConfig()},
    "kasa everywhere": {"kasa_config": KasaConfig(), "target_modules": ALL_LINEAR},
    "kasa, rslora and patterns": {"kasa_config": KasaConfig(), "use_rslora": True, **PATTERNS},
    "kasa of nearly the whole rank": {"kasa_config": KasaConfig(), "r": 31, "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_the_result_gives_pefts_logits_on_the_untouched_base(
    fields: dict[str, Any],
    train: Callable[..., Trained],
    make_llama: Callable[..., Any],
    site_table: Callable[..., Any],
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    trained = train(**fields)
    result = convert(trained.folder, trained.weights, tmp_path / "out")
    assert not [text for text in result.warnings if "copy of the base's output head" not in text]
    plain = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert (plain["r"], plain["init_lora_weights"], plain["kasa_config"]) == (
        2 * fields.get("r", 4),
        True,
        None,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out", "weights"]

    scale = trained.logits.abs().max()
    untouched = make_llama()
    assert (untouched(tokens).logits - trained.logits).abs().max() > 1e-2 * scale, "the adapter must matter"
    by_us = served(make_llama(), site_table, tmp_path / "out", tokens)
    by_peft = PeftModel.from_pretrained(untouched, tmp_path / "out")(tokens).logits
    assert (by_us - trained.logits).abs().max() < 1e-5 * scale
    assert (by_peft - trained.logits).abs().max() < 1e-5 * scale


@torch.no_grad()
def test_unconverted_it_would_be_wrong_on_the_untouched_base(
    train: Callable[..., Trained],
    make_llama: Callable[..., Any],
    site_table: Callable[..., Any],
    tokens: torch.Tensor,
) -> None:
    trained = train(init_lora_weights="pissa")
    with pytest.raises(VeneerError, match="veneer adapters convert FOLDER --weights MODEL --output OUT"):
        lower(trained.folder, site_table(make_llama()), 64)
    edit_config(trained.folder, init_lora_weights=True)
    logits = served(make_llama(), site_table, trained.folder, tokens)
    assert (logits - trained.logits).abs().max() > 1e-2 * trained.logits.abs().max()


@pytest.mark.parametrize("start", ["pissa", "olora"])
@torch.no_grad()
def test_dora_goes_along(
    start: str,
    train: Callable[..., Trained],
    make_llama: Callable[..., Any],
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    trained = train(init_lora_weights=start, use_dora=True)
    convert(trained.folder, trained.weights, tmp_path / "out")
    logits = PeftModel.from_pretrained(make_llama(), tmp_path / "out")(tokens).logits
    assert (logits - trained.logits).abs().max() < 1e-5 * trained.logits.abs().max()


@torch.no_grad()
def test_a_kasa_with_biases_keeps_them(
    train: Callable[..., Trained],
    make_llama: Callable[..., Any],
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    trained = train(kasa_config=KasaConfig(), lora_bias=True)
    convert(trained.folder, trained.weights, tmp_path / "out")
    logits = PeftModel.from_pretrained(make_llama(), tmp_path / "out")(tokens).logits
    assert (logits - trained.logits).abs().max() < 1e-5 * trained.logits.abs().max()


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"kasa_config": KasaConfig()}])
def test_bfloat16_weights_are_split_in_float32_as_peft_does(
    fields: dict[str, Any], train: Callable[..., Trained], tmp_path: Path, make_llama: Callable[..., Any]
) -> None:
    trained = train(torch.bfloat16, **fields)
    result = convert(trained.folder, trained.weights, tmp_path / "out")
    assert any("BF16" in text for text in result.warnings)
    rounded = make_llama().to(torch.bfloat16)
    exact = rounded.float().model.layers[0].self_attn.q_proj.weight.detach().clone()
    changed = get_peft_model(
        make_llama().to(torch.bfloat16), LoraConfig(r=4, lora_alpha=12, target_modules=QV, **fields)
    )
    left = changed.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    taken = -3.0 * tensors[f"{key}.lora_B.weight"][:, 4:] @ tensors[f"{key}.lora_A.weight"][4:]
    error = (exact - taken - left.float()).abs()
    assert (error <= 2**-8 * left.float().abs() + 1e-6).all(), (
        "they differ by PEFT's rounding of the rest alone"
    )


# ---- refusals and warnings ------------------------------------------------------------------------


def refusal(trained: Trained, output: Path) -> str:
    with pytest.raises(VeneerError) as error:
        convert(trained.folder, trained.weights, output)
    assert [path.name for path in output.parent.iterdir() if path.name.startswith((output.name, "."))] == []
    return error.value.message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "random numbers, which no file holds"),
        ({"init_lora_weights": "corda"}, "calibration data"),
        ({"init_lora_weights": "lora_ga"}, "gradients of the training data"),
        ({"init_lora_weights": "loftq"}, "not of low rank"),
        ({"init_lora_weights": "x"}, "PEFT 0.21 has no such initialisation"),
        ({"init_lora_weights": True}, "needs no conversion"),
        ({"init_lora_weights": "gaussian"}, "needs no conversion"),
        ({"kasa_config": {}}, "each changes the base"),
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, "together with PiSSA it is not converted"),
        (
            {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
            "together with PiSSA it is not converted",
        ),
        ({"r": 5}, "of a wrong shape"),
        ({"r": 0}, "PiSSA needs a rank from 1 to"),
        ({"r": 100_000}, "PiSSA needs a rank from 1 to"),
        ({"lora_alpha": 0}, "it must be above 0"),
        ({"lora_alpha": -4}, "it must be above 0"),
        ({"novelty": 1}, "unknown fields 'novelty'"),
        ({"peft_type": "IA3"}, "'IA3' needs no conversion"),
        ({"peft_type": "ADAMSS"}, "'ADAMSS' cannot be converted: it is base-fragile"),
        ({"peft_type": "FROD"}, "'FROD' cannot be converted: it is base-fragile"),
        ({"peft_type": "BONE"}, 'peft_type = "BONE"'),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(
    changes: dict[str, Any], text: str, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(init_lora_weights="pissa")
    edit_config(trained.folder, **changes)
    assert text in refusal(trained, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            PsoftConfig(r=4, psoft_alpha=4, target_modules=QV),
            "'PSOFT' cannot be converted: it is base-fragile",
        ),
        (IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "'IA3' needs no conversion"),
        (LoraConfig(target_modules=QV), "This LoRA needs no conversion"),
    ],
)
def test_files_of_other_kinds_are_refused(
    config: Any, text: str, train: Callable[..., Trained], make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    trained = train(init_lora_weights="pissa")
    get_peft_model(make_llama(), config).save_pretrained(tmp_path / "other")
    assert text in refusal(trained._replace(folder=tmp_path / "other"), tmp_path / "out")


def test_a_head_that_is_the_embedding_is_refused(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train(tied=True, init_lora_weights="pissa", target_modules=["lm_head", "q_proj"])
    assert "lm_head is also the embedding" in refusal(trained, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", "1 tensor missing"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "cannot be served"),
    ],
)
def test_a_missing_tensor_is_refused(
    key: str, text: str, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(init_lora_weights="olora")
    tensors = load_file(trained.folder / WEIGHTS_FILE)
    del tensors[key]
    save_file(tensors, trained.folder / WEIGHTS_FILE)
    assert text in refusal(trained, tmp_path / "out")


def test_another_architecture_is_refused_before_any_weight_is_split(
    train: Callable[..., Trained],
    make_llama: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = train(init_lora_weights="pissa")
    make_llama(hidden=32).save_pretrained(tmp_path / "smaller")
    monkeypatch.setattr(Weights, "read", lambda *arguments: pytest.fail("a weight was read"))
    assert "of a wrong shape" in refusal(trained._replace(weights=tmp_path / "smaller"), tmp_path / "out")


def test_quantized_weights_are_refused(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train(init_lora_weights="pissa")
    path = trained.weights / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert "are quantized" in refusal(trained, tmp_path / "out")
    path.write_text(json.dumps(config))
    for shard in trained.weights.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({key: tensor.to(torch.uint8) for key, tensor in tensors.items()}, shard)
    assert "has dtype U8" in refusal(trained, tmp_path / "out")


def test_other_weights_of_the_same_shape_are_told(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train(init_lora_weights="pissa")
    torch.manual_seed(7)
    for shard in trained.weights.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({key: torch.randn_like(tensor) * 0.02 for key, tensor in tensors.items()}, shard)
    warnings = convert(trained.folder, trained.weights, tmp_path / "out").warnings
    assert any("is not like what PiSSA starts from" in text for text in warnings)


@pytest.mark.parametrize(
    ("kind", "weight", "is_doubtful"),
    [
        ("PiSSA", torch.eye(8), True),
        ("KaSA", torch.eye(8), True),
        ("OLoRA", RANDOM[:, [0, 0, 1, 2, 3, 4, 5, 6]], True),
        ("OLoRA", RANDOM, False),
        ("PiSSA", torch.diag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])), False),
        ("KaSA", torch.diag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])), False),
        ("KaSA", torch.diag(torch.tensor([8.0, 7, 6, 5, 0, 0, 0, 0])), False),  # nothing is taken out
        ("PiSSA", torch.zeros(8, 8), False),
    ],
)
def test_a_part_that_float32_does_not_determine_is_told(
    kind: str, weight: torch.Tensor, is_doubtful: bool
) -> None:
    assert (TAKES[kind](weight, 3, 2.0).doubt > DOUBT_LIMIT) == is_doubtful


# ---- the command ----------------------------------------------------------------------------------


def test_the_command(
    train: Callable[..., Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(init_lora_weights="pissa")
    output = tmp_path / "new" / "out"
    (trained.folder / "chat_template.jinja").write_text("goes along")
    (trained.folder / "README.md").write_text("does not")
    arguments = ["adapters", "convert", str(trained.folder), "--weights", str(trained.weights)]
    assert main([*arguments, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: a plain LoRA of rank 8 at 4 layers\n"
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert set(before) == {CONFIG_FILE, WEIGHTS_FILE, "chat_template.jinja"}
    assert before["chat_template.jinja"] == b"goes along"

    assert main([*arguments, "--output", str(output)]) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert main([*arguments[:-1], "base.gguf", "--output", str(tmp_path / "b")]) == 1
    assert "a GGUF file does not hold the weights" in capsys.readouterr().err
    assert main([*arguments[:-1], "./nothing", "--output", str(tmp_path / "b")]) == 1
    assert "'./nothing' does not exist" in capsys.readouterr().err


def test_nothing_is_left_of_a_conversion_that_fails_while_it_writes(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(init_lora_weights="olora")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converter, "sync", full)
    assert "No space left on device" in refusal(trained, tmp_path / "out")


def test_an_output_that_appears_meanwhile_stays(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(init_lora_weights="olora")
    judge = converter._judge

    def appear(*arguments: Any) -> list[str]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
        return judge(*arguments)

    monkeypatch.setattr(converter, "_judge", appear)
    with pytest.raises(VeneerError, match="exists and is not overwritten"):
        convert(trained.folder, trained.weights, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_result_names_its_ranks(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train(init_lora_weights="pissa", rank_pattern={"v_proj": 3})
    result = convert(trained.folder, trained.weights, tmp_path / "out")
    assert isinstance(result, Converted)
    assert sorted(result.ranks) == [6, 6, 8, 8]
