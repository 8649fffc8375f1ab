"""References of AdapterHub's and pyreft's kinds: restated libraries against numbers that these computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from veneer.adapters.pyreft import repack_pyreft
from veneer.adapters.repack import Kind, repack_adapterhub, repack_fusion
from veneer.engine.config import EngineConfig
from veneer.training.conformance.adapterhub import add_lora, add_prefix, load_tensors, run_prefix
from veneer.training.conformance.bottlenecks import add_bottlenecks
from veneer.training.conformance.cases import PROMPT
from veneer.training.conformance.pyreft import Ends, add_interventions, load_interventions
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


# ---- pyreft -----------------------------------------------------------------------------------------

PYREFT = RECORDED.parent / "pyreft"
# As in make_pyreft.py.
ENDS = {
    "loreft": ("Loreft", Ends([0, 1], 3, 0)),
    "loreft-both": ("Loreft", Ends([0, 1, 0, 1], 3, 3)),
    "loreft-shared": ("Loreft", Ends([1], 2, 3)),
    "noreft": ("Noreft", Ends([0, 1], 0, 5)),
    "consreft": ("Consreft", Ends([0], 4, 0)),
    "lobireft": ("Lobireft", Ends([0], 2, 2)),
    "direft": ("Direft", Ends([0, 1, 0, 1], 2, 2)),
    "nodireft": ("Nodireft", Ends([0, 1], 3, 3)),
}


def pickled(name: str, folder: Path) -> Path:
    """A recorded folder with the pickles that pyreft saves."""
    folder.mkdir()
    shutil.copy(PYREFT / name / "config.json", folder)
    for path in (PYREFT / name).glob("*.safetensors"):
        torch.save(load_file(path), folder / f"{path.stem}.bin")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", ENDS)
def test_pyreft(name: str, tmp_path: Path) -> None:
    kind, ends = ENDS[name]
    recorded = load_file(PYREFT / "expected.safetensors")[name]
    model = add_interventions(base(), kind, ends, rank=3)
    load_interventions(model, pickled(name, tmp_path / "saved"))
    assert error(run_reft(model, torch.tensor([PROMPT]), len(PROMPT)), recorded) < 1e-5


# ---- the libraries' own files, served ---------------------------------------------------------------


def prepare(name: str, folder: Path) -> None:
    """An upload of what AdapterHub's library saved."""
    source = RECORDED / name
    if name in FUSED:
        parts = json.loads((source / "layer" / "adapter_fusion_config.json").read_text())["adapter_names"]
        repack_fusion([source / part for part in parts], source / "layer", folder)
    else:
        kind: Kind | None = "direft" if name == "direft" else "noreft" if "noreft" in name else None
        repack_adapterhub(source, folder, kind)


def check_served(folders: dict[str, Path], store: Path, expected: dict[str, torch.Tensor]) -> None:
    """All in one batch, in chunks."""
    config = EngineConfig(
        model=str(RECORDED / "base"),
        store=str(store),
        device="cpu",
        dtype="float32",
        quantization="none",
        max_loras=len(folders),
        max_num_seqs=len(folders),
        max_num_batched_tokens=50,
    )
    digests = {name: folder.name for name, folder in folders.items()}
    with Served(config) as served:
        for digest, checked in served.check({folder.name: folder for folder in folders.values()}).items():
            assert checked.error is None, (digest, checked.error)
        answers = served.ask([Asked(digest, PROMPT, (3,)) for digest in digests.values()])
    for name, answer in zip(digests, answers, strict=True):
        assert isinstance(answer, torch.Tensor), (name, answer)
        assert relative_error(answer[0], expected[name][-1]) < 1e-5, name


def folders_for(names: Iterable[str], store: Path) -> dict[str, Path]:
    return {name: store / "blobs" / f"{index:064x}" for index, name in enumerate(names)}


def test_adapterhubs_files_are_served_as_it_computes_them(
    expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folders = folders_for((*SINGLE, *FUSED), tmp_path)
    for name, folder in folders.items():
        prepare(name, folder)
    check_served(folders, tmp_path, expected)


def test_pyrefts_files_are_served_as_it_computes_them(tmp_path: Path) -> None:
    folders = folders_for(ENDS, tmp_path)
    for name, folder in folders.items():
        ends = ENDS[name][1]
        repack_pyreft(pickled(name, tmp_path / name), folder, first=ends.first, last=ends.last)
    check_served(folders, tmp_path, load_file(PYREFT / "expected.safetensors"))
