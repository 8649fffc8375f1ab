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
from safetensors.torch import load_file
from tests.adapters.files import edit_tensors, refusal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods import adapterhub_fusion
from veneer.adapters.methods.adapterhub_reft import orthogonal
from veneer.adapters.methods.base import Limits
from veneer.adapters.names import ADAPTERHUB_WEIGHTS, CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import Program, Site
from veneer.adapters.reach import Span
from veneer.adapters.registry import lower
from veneer.adapters.repack import repack_fusion

RECORDED = Path(__file__).parent / "adapterhub"


class RecordedBase:
    """What methods ask about the base of the recorded adapters."""

    num_layers, num_kv_heads, head_dim, hidden_size = 2, 2, 16, 64
    model_type = "llama"
    limits, dtype = Limits(), torch.float32

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

    @cached_property
    def hidden_sites(self) -> dict[str, Site]:
        parts = [f"{part}.{kind}" for part in ("self_attn", "mlp") for kind in ("output", "sum", "residual")]
        names = [f"model.layers.{layer}.{part}" for layer in range(2) for part in [*parts, "output"]]
        return {name: Site(name, 64, 64, is_hidden=True) for name in names}

    def weight(self, site: str) -> torch.Tensor:
        return self.tensors[f"{site}.weight"].clone()

    def bias(self, site: str) -> None:
        return None


class File:
    """A copy of a recorded adapter, to be changed and lowered."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        folder.mkdir()
        if (RECORDED / name / "layer").is_dir():
            parts = sorted(path.parent for path in (RECORDED / name).glob(f"*/{CONFIG_FILE}"))
            folder.rmdir()
            repack_fusion(parts, RECORDED / name / "layer", folder)
            return
        shutil.copy(RECORDED / name / CONFIG_FILE, folder)
        shutil.copy(RECORDED / name / ADAPTERHUB_WEIGHTS, folder / WEIGHTS_FILE)

    def edit(self, outer: dict[str, Any] | None = None, **fields: Any) -> None:
        path = self.folder / CONFIG_FILE
        config = json.loads(path.read_text()) | (outer or {})
        if fields:
            config["config"] |= fields
        path.write_text(json.dumps(config))

    def edit_tensors(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        edit_tensors(self.folder, edit)

    def lower(self, max_rank: int = 64) -> Program:
        base: Any = RecordedBase()
        return lower(self.folder, base, max_rank)

    def refusal(self, max_rank: int = 64) -> str:
        return refusal(self.folder, RecordedBase(), max_rank)


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


def test_a_prefix_that_the_mlp_makes_too_large_is_refused_before_it_is_made(
    recorded: Callable[[str], File], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordedBase, "limits", Limits(module_bytes=6 * 128 * 4 - 1))
    monkeypatch.setattr(Checkpoint, "_load", lambda *_: pytest.fail("a tensor was read"))
    message = recorded("prefix").refusal()
    assert "What the MLP makes of the prefix takes 3072 bytes in full, [6, 128] numbers" in message
    assert "(--max-module-bytes)" in message


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


# ---- bottlenecks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("houlsby", {"use_gating": True}, "use_gating = true: its gate is a mean over the whole sequence"),
        ("houlsby", {"ln_before": True}, "ln_before = true: a layer norm inside the adapter is not served"),
        ("houlsby", {"ln_after": True}, "ln_after = true: a layer norm inside the adapter is not served"),
        (
            "houlsby",
            {"inv_adapter": "nice"},
            'inv_adapter = "nice": invertible adapters change the embeddings',
        ),
        ("houlsby", {"residual_before_ln": "post_add"}, "the library fails with it"),
        ("houlsby", {"residual_before_ln": "before"}, 'residual_before_ln = "before"'),
        ("houlsby", {"original_ln_after": False}, "the layer's residual is added not"),
        ("pfeiffer", {"residual_before_ln": False}, "the layer's residual is added twice"),
        ("parallel", {"original_ln_after": False}, "the layer's residual is added not"),
        ("houlsby", {"non_linearity": "mish"}, 'non_linearity = "mish": served are gelu'),
        ("houlsby", {"scaling": 1}, "scaling = 1: the library takes a number with a point"),
        ("houlsby", {"scaling": "shared"}, 'scaling = "shared"'),
        ("houlsby", {"scaling": "learned"}, "4 tensors missing: 'model.layers.0.attention_adapters"),
        ("houlsby", {"reduction_factor": 0}, "reduction_factor = 0.0: it must be above 0"),
        ("houlsby", {"reduction_factor": 1e-9}, "leave a bottleneck of a sensible size"),
        (
            "houlsby",
            {"reduction_factor": 0.5},
            "it makes a bottleneck of 128, the limit is 64 (--max-lora-rank)",
        ),
        ("houlsby", {"reduction_factor": {"0": 8}}, 'it has neither layer 1 nor "default"'),
        ("houlsby", {"reduction_factor": 4}, "12 tensors of a wrong shape"),
        ("houlsby", {"leave_out": [0]}, "8 tensors cannot be served"),
        ("houlsby", {"leave_out": [0, 1]}, "leave_out = [0, 1]: no layer is left"),
        ("houlsby", {"mh_adapter": False}, "8 tensors cannot be served"),
        ("compacter", {"phm_dim": 3}, "phm_dim = 3: it must divide the sizes 64 and 8"),
        ("compacter", {"phm_dim": 0}, "phm_dim = 0"),
        ("compacter", {"phm_dim": 128}, "phm_dim = 128: the limit is 64"),
        ("compacter", {"phm_rank": 1 << 40}, "of a wrong shape"),
        ("compacter-shared", {"reduction_factor": {"0": 8, "default": 4}}, "of several sizes"),
        (
            "houlsby",
            {"surprise": 1},
            "unknown fields 'surprise'. Every field must be one of adapters 1.3's BnConfig",
        ),
    ],
)
def test_bottleneck_refusals(
    recorded: Callable[[str], File], name: str, fields: dict[str, Any], words: str
) -> None:
    file = recorded(name)
    file.edit(**fields)
    assert words in file.refusal()


def test_bottlenecks_need_layers_of_llamas_form(
    recorded: Callable[[str], File], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordedBase, "hidden_sites", {})
    monkeypatch.setattr(RecordedBase, "model_type", "gemma3_text")
    for name in ("houlsby", "fusion", "loreft"):
        assert "the base (gemma3_text) has no hidden state model.layers.0." in recorded(name).refusal()


def test_a_scale_that_overflows_is_refused(recorded: Callable[[str], File]) -> None:
    file = recorded("houlsby")
    file.edit(scaling=1e40)
    assert "overflow with the adapter's scale" in file.refusal()


# ---- fusion -----------------------------------------------------------------------------------------


def edit_fusion(file: File, part: int | None = None, **fields: Any) -> None:
    """Change the config of the fusion layer, or of one of the fused adapters."""
    path = file.folder / CONFIG_FILE
    config = json.loads(path.read_text())
    (config["fusion"] if part is None else config["adapters"][part])["config"] |= fields
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        (None, {"residual_before": True}, "the value projection would act on the residual, too"),
        (None, {"temperature": True}, "the library lowers it with every call"),
        (None, {"query_before_ln": True}, "the query would read another state than the adapters"),
        (None, {"value": False}, "2 tensors cannot be served"),
        (None, {"query": False, "key": False, "value": False}, "4 tensors missing"),
        (None, {"surprise": 1}, "unknown fields 'surprise'"),
        (1, {"is_parallel": True}, "a fusion whose last adapter is parallel adds the residual twice"),
        (0, {"non_linearity": "gelu"}, 'non_linearity = ["gelu", "relu"]: the fused adapters must have one'),
        (0, {"mh_adapter": True}, "mh_adapter = [true, false]: all fused adapters must have the same"),
        (0, {"use_gating": True}, "use_gating = true"),
        (1, {"leave_out": [0]}, "4 tensors cannot be served"),
    ],
)
def test_fusion_refusals(
    recorded: Callable[[str], File], part: int | None, fields: dict[str, Any], words: str
) -> None:
    file = recorded("fusion")
    edit_fusion(file, part, **fields)
    assert words in file.refusal()


def test_the_last_fused_adapter_must_be_in_every_layer(recorded: Callable[[str], File]) -> None:
    file = recorded("fusion")
    edit_fusion(file, 1, leave_out=[0])
    file.edit_tensors(
        lambda tensors: [tensors.pop(key) for key in [*tensors] if "layers.0" in key and ".two." in key]
    )
    assert "the last fused adapter must be in every layer that another one is in" in file.refusal()


def test_adapters_are_counted_before_they_are_read(
    recorded: Callable[[str], File], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recorded("fusion")
    config = json.loads((file.folder / CONFIG_FILE).read_text())
    file.edit({"adapters": config["adapters"][:1] * 33})
    monkeypatch.setattr(adapterhub_fusion, "read", lambda *_: pytest.fail("an adapter was read"))
    assert 'adapters = "33 of them": at most 32 adapters can be fused' in file.refusal()


@pytest.mark.parametrize("names", [[], ["two", "one"], ["one", "two", "two"]])
def test_the_layer_must_name_the_adapters(recorded: Callable[[str], File], names: list[str]) -> None:
    file = recorded("fusion")
    config = json.loads((file.folder / CONFIG_FILE).read_text())
    config["fusion"]["adapter_names"] = names
    (file.folder / CONFIG_FILE).write_text(json.dumps(config))
    assert "the adapters in the file are ['one', 'two'], in this order" in file.refusal()


def test_the_rank_of_a_fusion_is_bounded(recorded: Callable[[str], File]) -> None:
    assert recorded("fusion").lower().rank == 2 * (1 + 2 * 8)
    (file := recorded("fusion-static")).lower(51)
    assert "3 fused bottlenecks of 8 need rank 51, the limit is 50" in file.refusal(50)


# ---- ReFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "noreft",
            {},
            "subtract_projection = null: the library leaves it out, so NoReFT and DiReFT have the same",
        ),
        ("direft", {}, "or let `veneer adapters convert FOLDER --kind noreft|direft"),
        ("loreft", {"r": 0}, "r = 0: it needs rank 0, which must be from 1 to 64"),
        ("loreft", {"r": 64}, "r = 64: with orthogonality it must be below the hidden size 64"),
        ("noreft", {"subtract_projection": True, "r": 22}, "r = 22: it needs rank 66"),
        ("loreft", {"r": 4}, "of a wrong shape"),
        ("loreft", {"layers": [0, 2]}, "layers = [0, 2]: they must be from 0 to 1"),
        ("loreft", {"layers": []}, "layers = []"),
        ("loreft", {"layers": [1]}, "8 tensors cannot be served"),
        ("loreft", {"prefix_positions": 0}, "the adapter acts on no token"),
        ("loreft", {"prefix_positions": -1}, "prefix_positions = -1"),
        ("loreft", {"output_reft": False}, "output_reft = false: without it the adapter is nowhere"),
        ("loreft", {"tied_weights": True}, "8 tensors cannot be served"),
        (
            "noreft",
            {"subtract_projection": True, "non_linearity": "tanh"},
            'non_linearity = "tanh": together with the subtracted projection it is served only as relu',
        ),
        ("loreft", {"orthogonality": False, "subtract_projection": True}, "4 tensors missing"),
    ],
)
def test_reft_refusals(
    recorded: Callable[[str], File], name: str, fields: dict[str, Any], words: str
) -> None:
    file = recorded(name)
    file.edit(**fields)
    assert words in file.refusal()


def test_reft_says_on_which_tokens_it_acts(recorded: Callable[[str], File]) -> None:
    both = recorded("loreft-both").lower()
    assert (both.span, both.kind) == (Span(4, 3, True), "adapterhub_loreft")
    assert set(both.sites) == set(both.tail) == {"model.layers.1.output"}
    assert any("served as LoReFT" in warning for warning in both.warnings)
    file = recorded("noreft")
    file.edit(subtract_projection=True)
    tied = file.lower()
    assert (tied.span, tied.tail, tied.kind) == (Span(2, 2, False), {}, "adapterhub_noreft")
    file.edit(tied_weights=True, prefix_positions=0)
    assert file.lower().span == Span(0, 2, False)
    file = recorded("direft")
    file.edit(subtract_projection=False, prefix_positions=0)
    alone = file.lower()
    assert (alone.span, alone.tail, alone.kind) == (Span(0, 5, False), {}, "adapterhub_direft")
    file.edit(prefix_positions=1)
    assert torch.equal(
        file.lower().tail["model.layers.0.output"].tensors[0], alone.sites["model.layers.0.output"].tensors[0]
    )


def test_the_orthogonal_projection_is_torchs() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 5, bias=False)
    torch.nn.utils.parametrizations.orthogonal(linear)
    made: Any = linear.parametrizations
    for _ in range(3):
        with torch.no_grad():
            made.weight.original += 0.3 * torch.randn(5, 24).tril(-1) + 0.3 * torch.randn(5, 24).triu(1)
            found = orthogonal(made.weight.original, made.weight[0].base)
            assert torch.allclose(found, linear.weight, atol=1e-6)
            assert torch.allclose(found @ found.T, torch.eye(5), atol=1e-5)
