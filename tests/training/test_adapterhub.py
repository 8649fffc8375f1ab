"""The reference for AdapterHub's kinds: the restated library against numbers that the library itself computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from veneer.adapters.names import ADAPTERHUB_WEIGHTS, CONFIG_FILE, WEIGHTS_FILE
from veneer.engine.config import EngineConfig
from veneer.training.conformance.adapterhub import add_lora, add_prefix, load_tensors, run_prefix
from veneer.training.conformance.bottlenecks import add_bottlenecks
from veneer.training.conformance.cases import PROMPT
from veneer.training.conformance.reft import add_reft, run_reft
from veneer.training.conformance.run import relative_error
from veneer.training.conformance.serving import Asked, Served

RECORDED = Path(__file__).parents[1] / "adapters" / "adapterhub"
SINGLE = sorted(path.parent.name for path in RECORDED.glob("*/adapter.safetensors"))
FUSED = sorted(path.parents[1].name for path in RECORDED.glob("*/*/model_adapter_fusion.safetensors"))


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(RECORDED / "expected.safetensors")
    return found


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(RECORDED / "base", dtype=torch.float32).eval()


def config_of(folder: Path, file: str = "adapter_config.json") -> Any:
    return json.loads((folder / file).read_text())["config"]


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return relative_error(torch.log_softmax(logits[0], -1), expected)


@torch.no_grad()
def test_the_base_is_the_same(expected: dict[str, torch.Tensor]) -> None:
    assert error(base()(torch.tensor([PROMPT])).logits, expected["base"]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", SINGLE)
def test_single(name: str, expected: dict[str, torch.Tensor]) -> None:
    folder, tokens = RECORDED / name, torch.tensor([PROMPT])
    config = config_of(folder)
    if name == "direft":  # the library forgets it when it saves
        config["subtract_projection"] = False
    match config.get("architecture"):
        case None:
            model = add_bottlenecks(base(), {"task": config})
        case "lora":
            model = add_lora(base(), config)
        case "prefix_tuning":
            model = add_prefix(base(), config)
        case "reft":
            model = add_reft(base(), config)
    load_tensors(model, folder / "adapter.safetensors")
    if config.get("architecture") == "reft":
        logits = run_reft(model, tokens, len(PROMPT))
    elif config.get("architecture") == "prefix_tuning":
        logits = run_prefix(model, tokens)
    else:
        logits = model(tokens).logits
    assert relative_error(expected["base"], expected[name]) > 1e-2
    assert error(logits, expected[name]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = RECORDED / name
    fusion = json.loads((folder / "layer" / "adapter_fusion_config.json").read_text())
    parts = fusion["adapter_names"]
    model = add_bottlenecks(base(), {part: config_of(folder / part) for part in parts}, fusion["config"])
    tensors = load_file(folder / "layer" / "model_adapter_fusion.safetensors")
    for part in parts:
        tensors |= load_file(folder / part / "adapter.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert not [key for key in missing if "adapters" in key]
    assert error(model(torch.tensor([PROMPT])).logits, expected[name]) < 1e-5


# ---- the library's own files, served ----------------------------------------------------------------

SERVED = [name for name in SINGLE if name[:4] in ("lora", "dora", "vera", "ia3", "pref")]


def test_the_librarys_files_are_served_as_it_computes_them(
    expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    digests = {name: f"{index:064x}" for index, name in enumerate(SERVED)}
    folders = {digest: tmp_path / "blobs" / digest for digest in digests.values()}
    for name, digest in digests.items():
        folders[digest].mkdir(parents=True)
        shutil.copy(RECORDED / name / CONFIG_FILE, folders[digest])
        shutil.copy(RECORDED / name / ADAPTERHUB_WEIGHTS, folders[digest] / WEIGHTS_FILE)
    config = EngineConfig(
        model=str(RECORDED / "base"),
        store=str(tmp_path),
        device="cpu",
        dtype="float32",
        quantization="none",
        max_loras=len(SERVED),
        max_num_seqs=len(SERVED),
    )
    with Served(config) as served:
        for digest, checked in served.check(folders).items():
            assert checked.error is None, (digest, checked.error)
        answers = served.ask([Asked(digest, PROMPT, (3,)) for digest in digests.values()])
    for name, answer in zip(digests, answers, strict=True):
        assert isinstance(answer, torch.Tensor), (name, answer)
        assert relative_error(answer[0], expected[name][-1]) < 1e-5, name
