"""AdapterHub's files: what is refused, and why. That the others are served is shown in tests/training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.adapters.names import ADAPTERHUB_WEIGHTS, CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import Program, Site
from veneer.adapters.registry import lower
from veneer.errors import AdapterRefused

RECORDED = Path(__file__).parent / "adapterhub"


class RecordedBase:
    """What methods ask about the base of the recorded adapters."""

    num_layers, num_kv_heads, head_dim, hidden_size = 2, 2, 16, 64

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_file(RECORDED / "base" / "model.safetensors")
        return found

    @cached_property
    def sites(self) -> dict[str, Site]:
        return {
            (name := key.removesuffix(".weight")): Site(name, tensor.shape[1], tensor.shape[0])
            for key, tensor in self.tensors.items()
            if tensor.ndim == 2 and "embed" not in key
        }

    def weight(self, site: str) -> torch.Tensor:
        return self.tensors[f"{site}.weight"].clone()

    def bias(self, site: str) -> None:
        return None


class File:
    """A copy of a recorded adapter, to be changed and lowered."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        folder.mkdir()
        shutil.copy(RECORDED / name / CONFIG_FILE, folder)
        shutil.copy(RECORDED / name / ADAPTERHUB_WEIGHTS, folder / WEIGHTS_FILE)

    def edit(self, outer: dict[str, Any] | None = None, **fields: Any) -> None:
        path = self.folder / CONFIG_FILE
        config = json.loads(path.read_text()) | (outer or {})
        if fields:
            config["config"] |= fields
        path.write_text(json.dumps(config))

    def edit_tensors(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.folder / WEIGHTS_FILE)
        edit(tensors)
        save_file(tensors, self.folder / WEIGHTS_FILE)

    def lower(self, max_rank: int = 64) -> Program:
        base: Any = RecordedBase()
        return lower(self.folder, base, max_rank)

    def refusal(self, max_rank: int = 64) -> str:
        with pytest.raises(AdapterRefused) as error:
            self.lower(max_rank)
        return error.value.message


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], File]:
    return lambda name: File(tmp_path / name, name)


# ---- the file around the method's config ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "unknown fields 'surprise'. Every field must be one of adapters 1.3's"),
        ({"hidden_size": 128}, "hidden_size = 128: the base that is served here has 64"),
        ({"name": ""}, 'name = "": it stands in the keys'),
        ({"name": "a.b"}, 'name = "a.b": it stands in the keys'),
        ({"name": 5}, "name = 5: Expected `str`"),
        ({"name": "other"}, "8 tensors missing: 'model.layers.0.self_attn.q_proj.loras.other"),
        ({"config": {"architecture": "union", "configs": []}}, 'architecture = "union": a file with several'),
        ({"config": {"architecture": "mtl_lora"}}, "a request would have to name a task"),
        ({"config": {"architecture": "prompt_tuning"}}, "the library has it for no decoder"),
        ({"config": {"architecture": ["lora"]}}, 'architecture = ["lora"]: it is not known'),
        ({"config": 3}, "peft_type None is not served"),
    ],
)
def test_what_is_around_the_config(
    recorded: Callable[[str], File], changes: dict[str, Any], words: str
) -> None:
    file = recorded("lora")
    file.edit(changes)
    assert words in file.refusal()


def test_a_head_that_was_trained_is_refused_and_one_that_was_not_is_taken(
    recorded: Callable[[str], File],
) -> None:
    file = recorded("lora")
    assert any("no lm_head.weight" in warning for warning in file.lower().warnings)
    head = RecordedBase().weight("lm_head")
    file.edit_tensors(lambda tensors: tensors.update({"lm_head.weight": head}))
    assert not file.lower().warnings
    file.edit_tensors(
        lambda tensors: tensors.update({"lm_head.weight": head.index_fill(0, torch.tensor(3), 0)})
    )
    assert "lm_head.weight in the file differs from the head that is served here by up to" in file.refusal()
    file.edit_tensors(lambda tensors: tensors.update({"lm_head.weight": head[:9].clone()}))
    assert "'lm_head.weight' has [9, 64], the config and the base need [96, 64]" in file.refusal()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lora", "model.layers.0.self_attn.q_proj.weight"),
        ("lora", "model.invertible_adapters.task.F.0.weight"),
        ("prefix", "model.layers.0.self_attn.prefix_tuning.pool.prefix_tunings.task.self_prefix.wte.weight"),
    ],
)
def test_other_tensors_are_refused(recorded: Callable[[str], File], name: str, key: str) -> None:
    file = recorded(name)
    file.edit_tensors(lambda tensors: tensors.update({key: torch.zeros(2)}))
    assert f"1 tensor cannot be served: '{key}'" in file.refusal()


def test_values_must_be_finite(recorded: Callable[[str], File]) -> None:
    for name in ("lora", "prefix", "prefix-flat"):
        file = recorded(name)
        file.edit_tensors(lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("nan")))
        assert "holds NaN or infinite values" in file.refusal()
    file = recorded("ia3")
    file.edit_tensors(lambda tensors: tensors.pop(next(iter(tensors))))
    assert "1 tensor missing" in file.refusal()


# ---- LoRA, DoRA, VeRA, IA3 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("lora", {"use_gating": True}, "use_gating = true: its gate is a mean over the whole sequence"),
        ("lora", {"r": 0}, "r = 0: the rank must be from 1 to 64"),
        ("lora", {"r": 65}, "r = 65: the rank must be from 1 to 64"),
        ("lora", {"r": 5}, "8 tensors of a wrong shape"),
        ("lora", {"composition_mode": "scale"}, "it only with r = 1"),
        ("lora", {"composition_mode": "multiply"}, 'composition_mode = "multiply"'),
        ("lora", {"attn_matrices": ["q", "o"]}, 'attn_matrices = ["q", "o"]'),
        ("lora", {"attn_matrices": []}, "with these fields no layer is adapted"),
        ("lora", {"selfattn_lora": False}, "with these fields no layer is adapted"),
        ("lora", {"leave_out": [0]}, "4 tensors cannot be served"),
        (
            "lora",
            {"use_dora": True},
            "4 tensors missing: 'model.layers.0.self_attn.q_proj.loras.task.m.weight'",
        ),
        ("lora", {"n_up_projection": 2}, "unknown fields 'n_up_projection'"),
        (
            "vera",
            {"attn_matrices": ["q", "v"]},
            "its projections are shared, and model.layers.0.self_attn.v_proj",
        ),
        ("ia3", {"use_dora": True}, "it only with r = 1, without DoRA and VeRA"),
    ],
)
def test_lora_refusals(
    recorded: Callable[[str], File], name: str, fields: dict[str, Any], words: str
) -> None:
    file = recorded(name)
    file.edit(**fields)
    assert words in file.refusal()


def test_files_of_before_the_scaling_was_fixed_use_r(recorded: Callable[[str], File]) -> None:
    file = recorded("lora")  # r = 4, alpha = 8
    new = file.lower().sites["model.layers.0.self_attn.q_proj"].b
    file.edit({"version": "adapters.1.0.1"})
    program = file.lower()
    old = program.sites["model.layers.0.self_attn.q_proj"].b
    assert old is not None
    assert new is not None
    assert torch.equal(2 * old, new)
    assert program.warnings[-1].startswith("alpha = 8.0: r is used instead")
    assert sum("alpha" in warning for warning in program.warnings) == 1


def test_the_file_tells_which_layer_is_the_intermediate_one(recorded: Callable[[str], File]) -> None:
    file = recorded("lora-all")
    file.edit(output_lora=False)
    assert "2 tensors cannot be served: 'model.layers.0.mlp.up_proj" in file.refusal()

    file.edit_tensors(lambda tensors: [tensors.pop(key) for key in [*tensors] if "down_proj" in key])
    assert "model.layers.0.mlp.up_proj" in file.lower().sites
    assert "model.layers.0.mlp.down_proj" not in file.lower().sites


# ---- prefix tuning ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "prefix",
            {"leave_out": [0]},
            "leave_out = [0]: virtual tokens are in front of the prompt in every layer",
        ),
        ("prefix", {"use_gating": True}, "use_gating = true"),
        ("prefix", {"prefix_length": 0}, "prefix_length = 0: there must be at least one virtual token"),
        ("prefix", {"prefix_length": 10**12}, "the config and the base need [1000000000000, 64]"),
        ("prefix", {"bottleneck_size": 17}, "of a wrong shape"),
        ("prefix", {"non_linearity": "mish"}, 'non_linearity = "mish": served are gelu'),
        ("prefix", {"flat": True}, "5 tensors cannot be served"),
        ("prefix-flat", {"prefix_length": 6}, "has [640], the config and the base need [768]"),
    ],
)
def test_prefix_refusals(
    recorded: Callable[[str], File], name: str, fields: dict[str, Any], words: str
) -> None:
    file = recorded(name)
    file.edit(**fields)
    assert words in file.refusal()


def test_a_prefix_takes_no_positions(recorded: Callable[[str], File]) -> None:
    program = recorded("prefix").lower()
    assert program.prompt is not None
    assert program.prompt.shape == (2, 2, 6, 2, 16)
    assert not program.reach.virtual_positions


def test_activations_had_other_names(recorded: Callable[[str], File]) -> None:
    """Before the version was written into files, "gelu" was the approximation by tanh."""

    def values(name: str) -> torch.Tensor:
        file.edit(non_linearity=name)
        prompt = file.lower().prompt
        assert prompt is not None
        assert prompt.kv is not None
        return prompt.kv

    file = recorded("prefix")
    exact, approximate = values("gelu"), values("gelu_new")
    assert not torch.equal(exact, approximate)
    path = file.folder / CONFIG_FILE
    config = json.loads(path.read_text())
    del config["version"]
    path.write_text(json.dumps(config))
    assert torch.equal(values("gelu"), approximate)
    assert torch.equal(values("gelu_orig"), exact)
