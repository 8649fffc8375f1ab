"""LLaMA-adapter and Arrow, made by PEFT, through the engine; and what is refused of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    ArrowConfig,
    LoraConfig,
    PeftModel,
    create_arrow_model,
)
from safetensors.torch import load_file, save_file
from tests.adapters.files import edit_config
from tests.engine.adapters import load, save_random, told
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapters.methods.arrow import pack, prototype
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.registry import lower
from veneer.errors import AdapterRefused
from veneer.server.cli import main

PROMPT = [5, 9, 33, 2, 91, 40, 7, 12]
DIGEST = f"{1:064x}"


def biased_llama(folder: Path) -> Path:
    """A Llama whose attention has biases, in o_proj too."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attention_bias=True,
        max_position_embeddings=128,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def save_prompt(base: Path, folder: Path, **fields: Any) -> Path:
    config = AdaptionPromptConfig(**fields, task_type="CAUSAL_LM")
    save_random(folder, load(base), config, seed=1, strength=0.8)
    return folder


@pytest.mark.parametrize("architecture", ["biased llama", "mistral"])
@pytest.mark.parametrize(("length", "layers"), [(1, 1), (7, 2)])
def test_a_llama_adapter_gives_pefts_log_probabilities(
    architecture: str,
    length: int,
    layers: int,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    make_engine: Callable[..., Any],
) -> None:
    base = biased_llama(tmp_path / "base") if architecture == "biased llama" else tiny_model(architecture)
    store = tmp_path / "store"
    folder = save_prompt(base, store / "blobs" / DIGEST, adapter_len=length, adapter_layers=layers)
    driver = make_engine(base, store=str(store))
    found = driver.submit(PROMPT, DIGEST, logprobs=5, max_tokens=6)
    [tokens] = driver.run(found)
    model = PeftModel.from_pretrained(load(base), folder).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
        plain = load(base)(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    assert (logits - plain).abs().max() > 1e-2 * plain.abs().max(), "the adapter must matter"
    expected = torch.log_softmax(logits, -1).topk(5).values
    torch.testing.assert_close(
        told(driver, found)[:, 1:], expected, rtol=0, atol=1e-5 * float(logits.abs().max())
    )


def test_llama_adapters_that_do_not_fit_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    base = make_engine(tiny_model("llama")).engine.base
    folder = save_prompt(tiny_model("llama"), tmp_path / "adapter", adapter_len=5, adapter_layers=2)
    assert lower(folder, base, 20).rank == 20
    with pytest.raises(
        AdapterRefused, match=r"adapter_len = 5: with 4 heads it needs rank 20, the limit is 19"
    ):
        lower(folder, base, 19)
    for changes, message in (
        ({"adapter_len": 0}, "adapter_len = 0: the prompt must have at least one vector"),
        ({"adapter_len": 4}, r"of a wrong shape.*\[1, 5, 64\], the config and the base need \[1, 4, 64\]"),
        ({"adapter_layers": 0}, "adapter_layers = 0: it must be from 1 to the base's 3 layers"),
        ({"adapter_layers": 4}, "adapter_layers = 4: it must be from 1 to the base's 3 layers"),
        ({"adapter_layers": 3}, "2 tensors missing"),
        ({"adapter_layers": 1}, "2 tensors cannot be served"),
        ({"target_modules": "mlp"}, 'target_modules = "mlp": Invalid enum value'),
        ({"modules_to_save": ["lm_head"]}, "the file has no 'base_model.model.lm_head.weight'"),
        ({"r": 8}, "unknown fields 'r'"),
    ):
        before = (folder / CONFIG_FILE).read_text()
        edit_config(folder, **changes)
        with pytest.raises(AdapterRefused, match=message):
            lower(folder, base, 512)
        (folder / CONFIG_FILE).write_text(before)
    for architecture in ("qwen2", "gemma3"):
        other = make_engine(tiny_model(architecture)).engine.base
        with pytest.raises(
            AdapterRefused, match=r"on a base of type 'q|gemma3_text'.*PEFT has it for llama, mistral"
        ):
            lower(folder, other, 512)


# ---- Arrow ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def router(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router over three experts and a general one, in folders as PEFT saves them."""
    folder = tmp_path_factory.mktemp("router")
    paths = [folder / "experts" / str(index) for index in range(4)]
    for index, path in enumerate(paths):
        config = LoraConfig(r=4, lora_alpha=4 + index, target_modules=["q_proj", "down_proj"])
        save_random(path, load(tiny_model("llama")), config, seed=index, strength=0.3)
    arrow = ArrowConfig(top_k=2, use_gks=True, rng_seed=7)
    *tasks, general = map(str, paths)
    create_arrow_model(load(tiny_model("llama")), tasks, arrow, [general]).save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.fixture
def packed(router: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "packed"
    assert main(["adapters", "convert", str(router), "--output", str(folder)]) == 0
    return folder


def test_the_command_packs_a_router_that_gives_pefts_log_probabilities(
    router: Path,
    packed: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    make_engine: Callable[..., Any],
) -> None:
    base = tiny_model("llama")
    (tmp_path / "store" / "blobs").mkdir(parents=True)
    packed.rename(tmp_path / "store" / "blobs" / DIGEST)
    driver = make_engine(base, store=str(tmp_path / "store"))
    found = driver.submit(PROMPT, DIGEST, logprobs=5, max_tokens=6)
    [tokens] = driver.run(found)
    paths = [str(router / name) for name in ("task_0", "task_1", "task_2")]
    arrow = ArrowConfig(top_k=2, use_gks=True, rng_seed=7)
    model = create_arrow_model(load(base), paths, arrow, [str(router / "gks_0")]).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    expected = torch.log_softmax(logits, -1).topk(5).values
    torch.testing.assert_close(
        told(driver, found)[:, 1:], expected, rtol=0, atol=1e-5 * float(logits.abs().max())
    )


def test_the_command_says_what_it_needs(
    router: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "convert", str(router), "--output", str(tmp_path / "another")]) == 0
    assert "another: a router over task_0, task_1, task_2, gks_0" in capsys.readouterr().out
    for arguments, message in (
        ([str(router), "--output", str(packed)], "exists and is not overwritten"),
        ([str(router), "--output", str(tmp_path / "new"), "--weights", "some/model"], "packed without any"),
        ([str(router / "task_0"), "--output", str(tmp_path / "new")], "--weights is missing"),
    ):
        assert main(["adapters", "convert", *arguments]) != 0
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../task_1", "task_1/..", "", 3])
def test_names_of_experts_are_no_paths(router: Path, tmp_path: Path, name: object) -> None:
    folder = tmp_path / "arrow_router"
    folder.mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / file).write_bytes((router / "arrow_router" / file).read_bytes())
    edit_config(folder, arrow_config={"task_adapter_names": [name], "gks_adapter_names": []})
    with pytest.raises(AdapterRefused, match="is no name of a folder that PEFT writes"):
        pack(tmp_path)


def test_routers_that_do_not_fit_are_refused(
    router: Path, packed: Path, tiny_model: Callable[[str], Path], make_engine: Callable[..., Any]
) -> None:
    base = make_engine(tiny_model("llama")).engine.base
    program = lower(packed, base, 15)
    assert program.rank == 15
    assert program.primitives == ("low_rank", "activation")
    assert any("saved before it" in warning for warning in program.warnings)
    with pytest.raises(AdapterRefused, match=r"3 experts of rank 4 at .* need rank 15, the limit is 14"):
        lower(packed, base, 14)
    with pytest.raises(
        AdapterRefused, match=r"this is the router alone.*adapters convert FOLDER --output OUT"
    ):
        lower(router / "arrow_router", base, 512)

    original = json.loads((packed / CONFIG_FILE).read_text())

    def arrow(**changes: Any) -> dict[str, Any]:
        return {"arrow_config": original["arrow_config"] | changes}

    def expert(**changes: Any) -> dict[str, Any]:
        experts = copy.deepcopy(original["arrow_experts"])
        experts["task_1"] |= changes
        return {"arrow_experts": experts}

    for changes, message in (
        (arrow(top_k=0), "Expected `int` >= 1"),
        (arrow(top_k=4), "top_k must be at most the 3 experts"),
        (arrow(router_temperature=0), "Expected `float` > 0"),
        (arrow(new_field=1), "unknown field `new_field`"),
        (arrow(gks_adapter_names=[]), "use_gks needs gks_adapter_names"),
        (arrow(gks_adapter_names=[f"gks_{n}" for n in range(33)]), "`array` of length <= 32"),
        (arrow(use_gks=False), "must have the config of each of task_0, task_1, task_2, once, and no other"),
        (arrow(task_adapter_names=["task_0", "task_0"]), "once, and no other"),
        (arrow(task_adapter_names=["task_0", "gks_1"]), "'gks_1': PEFT takes gks_N for general experts"),
        (arrow(task_adapter_names=[]), "length >= 1"),
        ({"arrow_config": None}, "without arrow_config nothing routes them"),
        ({"use_dora": True}, "PEFT does not combine it with"),
        ({"bias": "all"}, 'bias = "all": PEFT\'s Arrow takes A, B and the scale of each expert alone'),
        (expert(use_dora=True), "task_1: .*use_dora = true: PEFT's Arrow takes A, B"),
        (expert(bias="lora_only"), 'task_1: .*bias = "lora_only": PEFT\'s Arrow'),
        (
            expert(trainable_token_indices=[3]),
            r"task_1: .*trainable_token_indices = \[3\]: PEFT's Arrow takes",
        ),
        ({"ensure_weight_tying": True}, "ensure_weight_tying = true: PEFT's Arrow takes"),
        (expert(target_modules=["embed_tokens"]), "task_1: .*embed_tokens"),
        (expert(arrow_config={}), "task_1: .*an expert cannot be a router"),
        (expert(peft_type="VERA"), "task_1: .*peft_type"),
        (expert(target_modules=["q_proj"]), "task_1: it must be at exactly the 6 layers .*, and is at 3"),
        (expert(r=3), "task_1: at .* its rank 3 is not that of task_0, 4"),
        (expert(r=0), "task_1: .*must be from 1 to 512"),
        (expert(wrong=1), "task_1: .*unknown fields 'wrong'"),
    ):
        (packed / CONFIG_FILE).write_text(json.dumps(original | changes))
        with pytest.raises(AdapterRefused, match=message):
            lower(packed, base, 512)
    (packed / CONFIG_FILE).write_text(json.dumps(original))
    tensors = load_file(packed / WEIGHTS_FILE)
    tensors["extra"] = tensors.pop(next(key for key in tensors if key.startswith("task_2.")))
    save_file(tensors, packed / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match=r"cannot be served.*under the expert's name"):
        lower(packed, base, 512)


def test_without_a_seed_prototypes_are_the_exact_singular_vectors() -> None:
    torch.manual_seed(2)
    a, b = torch.randn(4, 30), torch.randn(20, 4)
    exact = torch.linalg.svd(b @ a).Vh[0]
    assert abs(float(exact @ prototype(a, b, None))) == pytest.approx(1, abs=1e-5)
    a[1:] *= 0.1  # the first is far ahead: PEFT's iterations arrive there, too
    exact = torch.linalg.svd(b @ a).Vh[0]
    assert abs(float(exact @ prototype(a, b, 5))) == pytest.approx(1, abs=1e-5)
    assert not prototype(a, 0 * b, None).any()
    assert not prototype(a, 0 * b, 5).any()
    a, b = torch.randn(4, 3), torch.randn(2, 4)  # fewer features than ranks
    assert abs(float(torch.linalg.svd(b @ a).Vh[0] @ prototype(a, b, None))) == pytest.approx(1, abs=1e-5)
