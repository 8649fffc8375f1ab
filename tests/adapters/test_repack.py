"""`veneer adapters convert` for AdapterHub and pyreft: two files of what these libraries save otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.adapters.test_adapterhub import RECORDED, RecordedBase

from veneer.adapters.names import ADAPTERHUB_WEIGHTS, CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.program import Program
from veneer.adapters.pyreft import is_pyreft, repack_pyreft
from veneer.adapters.reach import Span
from veneer.adapters.registry import lower
from veneer.adapters.repack import is_adapterhub, repack_adapterhub, repack_fusion
from veneer.errors import AdapterRefused, Conflict, InvalidRequest
from veneer.server.cli import main
from veneer.training.conformance.pyreft import Intervention, save_interventions


def lowered(folder: Path) -> Program:
    base: Any = RecordedBase()
    return lower(folder, base, 64)


def pickled(name: str, folder: Path) -> Path:
    """A recorded adapter as the library saves it unless told otherwise."""
    folder.mkdir()
    shutil.copy(RECORDED / name / CONFIG_FILE, folder)
    torch.save(load_file(RECORDED / name / ADAPTERHUB_WEIGHTS), folder / "pytorch_adapter.bin")
    return folder


# ---- AdapterHub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["houlsby", "lora", "prefix"])
def test_a_pickle_becomes_safetensors(name: str, tmp_path: Path) -> None:
    folder = pickled(name, tmp_path / "in")
    assert is_adapterhub(folder)
    result = repack_adapterhub(folder, tmp_path / "out")
    assert result.what.startswith("ADAPTERHUB_")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    before, after = (
        load_file(RECORDED / name / ADAPTERHUB_WEIGHTS),
        load_file(tmp_path / "out" / WEIGHTS_FILE),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    lowered(tmp_path / "out")
    with pytest.raises(Conflict):
        repack_adapterhub(folder, tmp_path / "out")


def test_second_names_of_a_prefix_are_left_out(tmp_path: Path) -> None:
    folder = pickled("prefix", tmp_path / "in")
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    for key in list(tensors):
        tensors[key.replace("model.", "model.layers.1.self_attn.prefix_tuning.pool.")] = tensors[key]
    tensors = {
        key.replace("pool.prefix_tuning.", "pool."): value for key, value in tensors.items()
    }  # as the library names them
    torch.save(tensors, folder / "pytorch_adapter.bin")
    assert repack_adapterhub(folder, tmp_path / "out").tensors == 5
    assert lowered(tmp_path / "out").prompt is not None


def test_the_head_comes_along(tmp_path: Path) -> None:
    folder = pickled("lora", tmp_path / "in")
    torch.save({"lm_head.weight": RecordedBase().weight("lm_head")}, folder / "pytorch_model_head.bin")
    assert repack_adapterhub(folder, tmp_path / "out").what == "ADAPTERHUB_LORA with the output head"
    assert not lowered(tmp_path / "out").warnings
    torch.save({"heads.task.1.weight": torch.zeros(2)}, folder / "pytorch_model_head.bin")
    with pytest.raises(
        AdapterRefused, match=r"has 'heads\.task\.1\.weight'; only the output head of a causal"
    ):
        repack_adapterhub(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_reft_must_be_told_apart(tmp_path: Path) -> None:
    folder = pickled("direft", tmp_path / "in")
    with pytest.raises(AdapterRefused, match="NoReFT and DiReFT have the same files; tell by --kind"):
        repack_adapterhub(folder, tmp_path / "out")
    repack_adapterhub(folder, tmp_path / "di", "direft")
    repack_adapterhub(folder, tmp_path / "no", "noreft")
    kinds = [lowered(tmp_path / name).kind for name in ("di", "no")]
    assert kinds == ["adapterhub_direft", "adapterhub_noreft"]
    for other in (tmp_path / "di", pickled("lora", tmp_path / "lora")):
        with pytest.raises(
            AdapterRefused, match="--kind direft is for ReFT files without subtract_projection"
        ):
            repack_adapterhub(other, tmp_path / "x", "direft")


def test_fusion_folders_must_be_those_of_the_layer(tmp_path: Path) -> None:
    root = RECORDED / "fusion"
    parts, layer = [root / "two", root / "one"], root / "layer"
    assert repack_fusion(parts, layer, tmp_path / "out").what == "a fusion of 2 adapters"
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert [each["name"] for each in config["adapters"]] == ["one", "two"]  # in the layer's order
    for wrong in ([root / "one"], [root / "one", root / "one"], [*parts, root / "one"]):
        with pytest.raises(AdapterRefused, match="fuses 'one', 'two', the folders hold"):
            repack_fusion(wrong, layer, tmp_path / "x")
    with pytest.raises(AdapterRefused, match="holds no bottleneck adapter"):
        repack_fusion([root / "one", RECORDED / "loreft"], layer, tmp_path / "x")
    assert not (tmp_path / "x").exists()


class Evil:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/veneer-pickle-ran"),))


@pytest.mark.parametrize("content", [Evil(), [1, 2], {"a": 1}, {"a": Evil()}, None])
def test_a_pickle_of_anything_but_tensors_is_refused(content: object, tmp_path: Path) -> None:
    folder = pickled("lora", tmp_path / "in")
    if content is None:
        (folder / "pytorch_adapter.bin").write_bytes(b"PK\x03\x04 cut off")
    else:
        torch.save(content, folder / "pytorch_adapter.bin")
    with pytest.raises(AdapterRefused, match=r"pytorch_adapter\.bin' (holds|cannot be read)"):
        repack_adapterhub(folder, tmp_path / "out")
    assert not Path("/tmp/veneer-pickle-ran").exists()


# ---- pyreft -----------------------------------------------------------------------------------------


class Model:
    """As much of a model as is saved."""

    def __init__(self, kind: str, count: int) -> None:
        torch.manual_seed(count)
        self.interventions = [Intervention(kind, 64, 3) for _ in range(count)]


def pyreft(folder: Path, kind: str = "Loreft", layers: tuple[int, ...] = (0, 1)) -> Path:
    save_interventions(Model(kind, len(layers)), folder, kind, layers)
    return folder


def test_two_interventions_in_a_layer_are_for_the_two_ends(tmp_path: Path) -> None:
    folder = pyreft(tmp_path / "in", layers=(1, 0, 1, 0))
    assert is_pyreft(folder)
    assert not is_adapterhub(folder)
    result = repack_pyreft(folder, tmp_path / "out", first=2, last=5)
    assert result.what == "4 interventions of pyreft"
    assert result.warnings == (
        "act_fn is in none of pyreft's files; if there was one, give it as --activation.",
    )
    program = lowered(tmp_path / "out")
    assert (program.kind, program.span, program.rank) == ("bottleneck", Span(2, 5, True), 3)
    head, tail = (part["model.layers.1.output"] for part in (program.sites, program.tail))
    saved = [
        torch.load(folder / f"intkey_layer_1_comp_block_output_unit_pos_nunit_1#{n}.bin", weights_only=True)
        for n in (0, 1)
    ]
    for site, tensors in zip((head, tail), saved, strict=True):
        assert site.a is not None
        assert torch.allclose(site.a, tensors["weight"] - tensors["rotate_layer"].T)


@pytest.mark.parametrize(
    ("layers", "options", "words"),
    [
        ((0, 1), {}, "pyreft's files do not say where the interventions act"),
        ((0, 1), {"first": -1}, "pyreft's files do not say where"),
        ((0, 0), {"first": 2}, "both --first and --last are needed"),
        ((0, 0, 1, 1), {"first": 2, "last": 2}, "the first half of the list must name each layer once"),
        ((0, 1, 0), {"first": 2, "last": 2}, "the first half of the list must name each layer once"),
        ((0, 1), {"first": 2, "activation": "mish"}, "--activation mish: served are relu"),
    ],
)
def test_positions_must_fit(
    layers: tuple[int, ...], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        repack_pyreft(pyreft(tmp_path / "in", layers=layers), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"intervention_types": ["<class 'os.system'>"] * 2},
            "the intervention \"<class 'os.system'>\" is not",
        ),
        ({"sorted_keys": ["../../etc/passwd", "x"]}, "the key '../../etc/passwd' is none of pyreft's"),
        ({"sorted_keys": ["one"]}, "lists no interventions as pyreft saves them"),
        ({"mode": "serial"}, "mode 'serial' of pyreft is not served"),
        (
            {"representations": [[0, "mlp_output", "pos", 1]] * 2},
            "component = 'mlp_output' of pyreft is not served",
        ),
        ({"representations": [[0, "block_output", "h", 1]] * 2}, "unit = 'h' of pyreft is not served"),
        (
            {"representations": [{"layer": 0, "component": "block_output", "group_key": 1}] * 2},
            "group_key = 1",
        ),
        ({"representations": ["x", "y"]}, "the representation 'x' is none of pyreft's"),
    ],
)
def test_hostile_configs(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = pyreft(tmp_path / "in") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterRefused) as error:
        repack_pyreft(path.parent, tmp_path / "out", first=1)
    assert words in error.value.message


def test_tensors_must_be_those_of_the_kind(tmp_path: Path) -> None:
    folder = pyreft(tmp_path / "in", "Direft")
    path = next(iter(folder.glob("*.bin")))
    tensors = torch.load(path, weights_only=True)
    torch.save(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(AdapterRefused, match=r"has .*, not 'rotate_layer\.parametrizations"):
        repack_pyreft(folder, tmp_path / "out", first=1)
    torch.save(tensors | {"learned_source.bias": torch.full((3,), float("nan"))}, path)
    with pytest.raises(AdapterRefused, match="holds NaN or infinite values"):
        repack_pyreft(folder, tmp_path / "out", first=1)
    path.unlink()
    with pytest.raises(AdapterRefused, match="cannot be read"):
        repack_pyreft(folder, tmp_path / "out", first=1)
    for kind in ("Consreft", "Lobireft"):
        with pytest.raises(InvalidRequest, match="has none; leave it out"):
            repack_pyreft(pyreft(tmp_path / kind, kind), tmp_path / "out", first=1, activation="relu")


# ---- the command ------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(*arguments: object) -> int:
        return main(
            ["adapters", "convert", *map(str, arguments), "--output", str(tmp_path / f"out{len(done)}")]
        )

    done: list[str] = []
    hub, reft = pickled("direft", tmp_path / "hub"), pyreft(tmp_path / "reft")
    root = RECORDED / "fusion"
    taken: list[tuple[tuple[object, ...], str]] = [
        ((hub, "--kind", "direft"), "ADAPTERHUB_REFT, 12 tensors"),
        ((root / "one", root / "two", "--fusion", root / "layer"), "a fusion of 2 adapters, 26 tensors"),
        ((reft, "--first", 2, "--last", 1), "2 interventions of pyreft, 8 tensors"),
    ]
    for arguments, words in taken:
        assert convert(*arguments) == 0
        assert words in capsys.readouterr().out
        lowered(tmp_path / f"out{len(done)}")
        done.append(words)
    refused: list[tuple[tuple[object, ...], str]] = [
        ((hub,), "tell by --kind which it is"),
        ((hub, reft), "they need --fusion LAYER, and it alone"),
        (
            (reft, "--kind", "direft", "--first", 1),
            "holds no adapter of AdapterHub's library or pyreft, or the options",
        ),
        ((hub, "--kind", "direft", "--first", 1), "or the options are not its"),
        ((root / "one", "--fusion", root / "layer", "--last", 1), "and it alone"),
        ((hub, "--weights", tmp_path, "--kind", "direft"), "goes with none of the other options"),
        ((tmp_path / "nothing",), "holds no adapter of AdapterHub's library or pyreft"),
    ]
    for arguments, words in refused:
        assert convert(*arguments) == 1
        assert words in capsys.readouterr().err


# ---- our own format ---------------------------------------------------------------------------------


def edited(tmp_path: Path, **fields: Any) -> Path:
    folder = tmp_path / "native"
    if not folder.exists():
        repack_pyreft(pyreft(tmp_path / "in", layers=(0, 1)), folder, first=2)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"surprise": 1}, "unknown fields 'surprise'. Every field must be one of Veneer's BOTTLENECK"),
        ({"rank": 65}, "rank = 65: the rank must be from 1 to 64"),
        ({"rank": 2}, "of a wrong shape"),
        ({"places": []}, "places = []: it must name each of its places once"),
        ({"places": ["block", "block"]}, 'places = ["block", "block"]'),
        ({"places": ["head"]}, 'places = ["head"]'),
        ({"places": ["mlp"]}, "8 tensors cannot be served"),
        ({"layers": [0, 2]}, "layers = [0, 2]: each must be there once and from 0 to 1"),
        ({"layers": [0, 0]}, "layers = [0, 0]"),
        ({"source": "sum"}, 'source = "sum": a whole layer has no residual'),
        ({"activation": "mish"}, 'activation = "mish"'),
        ({"bias": False}, "4 tensors cannot be served"),
        ({"scale": 1e39}, "overflow with the adapter's scale"),
        ({"positions": {"first": 0}}, "there must be first or last tokens, and both for a tail"),
        ({"positions": {"first": 2, "tail": True}}, "and both for a tail"),
        ({"positions": {"first": 2, "middle": 1}}, "positions"),
        (
            {"positions": {"first": 2, "last": 2, "tail": True}},
            "8 tensors missing: 'layers.0.block.tail.down.weight'",
        ),
    ],
)
def test_our_own_format_refuses(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused) as error:
        lowered(edited(tmp_path, **fields))
    assert words in error.value.message


def test_our_own_format_without_positions_acts_everywhere(tmp_path: Path) -> None:
    program = lowered(edited(tmp_path, positions=None, activation="gelu", scale=0.5, layers=None))
    assert program.span is None
    assert program.primitives == ("low_rank", "activation", "bias")
