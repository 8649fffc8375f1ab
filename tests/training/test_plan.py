"""What a plan says: its recipe is one, and its predictions are what PyTorch's allocator sees."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig

import veneer.training.planning.footprint
from veneer.engine.base import load_base
from veneer.engine.view import trainable_view
from veneer.engine.weight_sizes import weight_bytes
from veneer.errors import InvalidRequest
from veneer.server.cli import main
from veneer.training.data.formats import Message, Row
from veneer.training.data.report import Length, describe
from veneer.training.kinds import KINDS, Setting, make_trainable
from veneer.training.planning.advice import Choice, Facts, advise
from veneer.training.planning.footprint import Footprint, Load, Machine, predict
from veneer.training.recipe import Adapter, Training, read_recipe
from veneer.training.trainable import parameters

CPU, CUDA = Machine("cpu", "none"), Machine("cuda", "nf4")
LOAD = Load(2, 16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tiny_base: Path) -> Any:
    return AutoConfig.from_pretrained(tiny_base)


def footprint(config: Any, machine: Machine = CPU, load: Load = LOAD, **fields: Any) -> Footprint:
    return predict(Training(steps=3, **fields), config, machine, load)


def advice(rows: int, tokens: int, method: Any = "supervised", **facts: Any) -> dict[str, Choice]:
    examples = [Row((Message("user", str(row)),), "yes", f"row {row}") for row in range(rows)]
    report = describe(examples, [Length(tokens, tokens)] * rows)
    known = {"lengths": [tokens] * rows, "hidden_size": 576, "context": 8192, "numbers_per_rank": 600_000}
    return advise(Facts(report, **{**known, **facts}), method, "lora")


# ---- what is suggested


def test_rank_grows_with_the_data() -> None:
    ranks = [advice(rows, 400)["adapter.rank"].value for rows in (50, 20_000, 200_000)]
    assert ranks[0] == 4
    assert ranks == sorted(set(ranks))


def test_wide_bases_and_preferences_learn_slowly() -> None:
    rates = [advice(100, 50, hidden_size=size)["learning_rate"].value for size in (576, 4096, 8192)]
    assert rates == [pytest.approx(each, rel=0.02) for each in (1e-3, 2e-4, 1.1e-4)]  # as QLoRA's 7B and 65B
    assert advice(100, 50, "dpo")["learning_rate"].value < rates[0] / 10


def test_few_rows_are_seen_more_often() -> None:
    assert advice(30, 50)["epochs"].value == 15
    assert advice(5000, 50)["epochs"].value == 3
    assert "validation_fraction" not in advice(5, 50)


def test_one_long_row_does_not_set_the_length() -> None:
    even = advice(100, 50)
    assert (even["max_length"].value, even["overlong"].value) == (56, "refuse")
    odd = advice(100, 50, lengths=[50] * 99 + [4000])
    assert (odd["max_length"].value, odd["overlong"].value) == (200, "drop")
    assert odd["overlong"].why.startswith("1 rows")


# ---- what is predicted


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Any:
    return load_base(tiny_base, quantization="none", dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_trained_parameters_are_those_of_the_kind(kind: str, config: Any, base: Any, tiny_base: Path) -> None:
    training = Training(adapter=Adapter.model_validate({"kind": kind}), steps=10)
    trainable = make_trainable(training, Setting(trainable_view(base), 1000, "base", tiny_base, list))
    exact = sum(each.numel() for each in parameters(trainable).values())
    assert predict(training, config, CPU, LOAD).parameters == exact


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_weights_are_those_of_the_loaded_base(quantization: str, config: Any, tiny_base: Path) -> None:
    base = load_base(tiny_base, quantization=quantization, dtype=torch.float32, device=torch.device("cpu"))
    assert weight_bytes(config, quantization, torch.float32, "cpu") == base.memory_bytes()


def test_predictions_grow_as_they_must(config: Any) -> None:
    plain, rows, long = footprint(config), footprint(config, load=Load(4, 16)), Load(2, 64)
    kept = footprint(config, load=long)
    recomputed = footprint(config, gradient_checkpointing=True, load=long)
    assert rows.step > 1.5 * plain.step
    assert kept.step > 3 * plain.step
    assert recomputed.step < kept.step
    assert footprint(config, adapter=Adapter(rank=32)).state == pytest.approx(4 * plain.state, rel=0.05)
    assert footprint(config, method="dpo").step > 1.5 * plain.step
    assert footprint(config, Machine("cpu", "nf4")).weights < plain.weights
    full = Adapter(kind="layers", layers=[0, 1])
    assert footprint(config, adapter=full).state > 4 * plain.state
    assert rows.micro_batch.products > 1.9 * plain.micro_batch.products
    assert recomputed.micro_batch.products > 1.2 * kept.micro_batch.products


def test_moments_in_8_bits(config: Any) -> None:
    full = Adapter(kind="layers", layers=[0, 1])
    states = [
        footprint(config, CUDA, optimizer=name, adapter=full).state
        for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    ]
    count = footprint(config, CUDA, adapter=full).parameters
    assert states[0] == pytest.approx(12 * count, rel=0.01)
    small = 4 * 64 * 32  # keys and values: their moments stay in float32
    assert states[1] == pytest.approx(12 * small + (6 + 8 / 256) * (count - small), rel=0.01)
    assert states[2] == states[1]  # too small for pages
    with pytest.raises(InvalidRequest, match="use adamw"):
        footprint(config, optimizer="adamw_8bit")


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_checkpointing": True},
        {"method": "dpo", "accumulation": 2},
        {"packing": True},
        {"adapter": Adapter(kind="layers", layers=list(range(4)))},
    ],
)
def test_two_depths_tell_any_other(
    fields: dict[str, Any], config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 4})
    drawn = footprint(deep, Machine("cuda", "nf4"), **fields)
    monkeypatch.setattr(veneer.training.planning.footprint, "_DEPTHS", (9, 9))  # follow all layers
    assert footprint(deep, Machine("cuda", "nf4"), **fields) == drawn


@pytest.mark.parametrize("source", ["output", "sum"])
def test_no_tensor_outlives_its_prediction(source: str, config: Any) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, FakeTensor) for each in gc.get_objects())

    before = alive()
    footprint(config, adapter=Adapter(kind="bottleneck", options={"source": source}))
    assert alive() == before


# ---- the command


@pytest.fixture(scope="module")
def shallow_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one layer, for a plan makes many predictions. It has no weights: none are read."""
    folder = tmp_path_factory.mktemp("shallow") / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    return folder


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", "--device", "cpu", "--tflops", "0.1", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"what is {n}", "completion": "x" * (n % 9 + 1)}) + "\n" for n in range(30)
        )
    )
    return path


def test_the_text_is_a_recipe(
    capsys: pytest.CaptureFixture[str], rows: Path, shallow_base: Path, tmp_path: Path
) -> None:
    text = plan(capsys, "--data", str(rows), "--base", str(shallow_base))
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.data, recipe.adapter.rank, recipe.quantization) == (rows, 4, "none")
    for part in ("# adapter.rank: 4 - ", "QLoRA", "full", "about"):
        assert part in text


def test_what_does_not_fit_is_changed(
    capsys: pytest.CaptureFixture[str], rows: Path, shallow_base: Path
) -> None:
    arguments = ("--data", str(rows), "--base", str(shallow_base), "--json", "--batch-size")
    found = json.loads(plan(capsys, *arguments, "1", "--memory", "1K"))
    assert "smaller base" in found["changes"][-1]
    config = AutoConfig.from_pretrained(shallow_base)
    load = Load(2, found["data"]["percentiles"]["max"])
    tuned = {"adapter": Adapter(rank=4), "gradient_checkpointing": True, "accumulation": 2}
    memory = footprint(config, Machine("cpu", "nf4"), load, **tuned).total
    found = json.loads(plan(capsys, *arguments, "4", "--memory", str(memory)))
    recipe = found["recipe"]
    assert recipe["gradient_checkpointing"]
    assert (recipe["quantization"], recipe["batch_size"], recipe["accumulation"]) == ("nf4", 2, 2)
    assert not any(each["fits"] for each in found["predictions"] if each["way"] == "full")


def test_kinds_of_data_are_told_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shallow_base: Path
) -> None:
    rows = {
        "dpo": {"prompt": "a", "chosen": "good", "rejected": "bad"},
        "self_supervised": {"text": "some words " * 9},
    }
    for method, row in rows.items():
        path = tmp_path / f"{method}.jsonl"
        path.write_text(
            "".join(json.dumps(row | {"prompt": str(n)} if "prompt" in row else row) + "\n" for n in range(4))
        )
        fields = yaml.safe_load(plan(capsys, "--data", str(path), "--base", str(shallow_base)))
        assert fields["method"] == method


def test_a_device_that_is_not_here_has_no_time(
    capsys: pytest.CaptureFixture[str], rows: Path, shallow_base: Path
) -> None:
    arguments = ["plan", "--device", "cuda", "--data", str(rows), "--base", str(shallow_base), "--json"]
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["seconds"] for each in found["predictions"]} == {None}
    assert found["memory_bytes"] is None


@pytest.mark.model
def test_a_measured_peak_is_the_predicted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the packaged base, by PyTorch's own account of its allocator."""
    from benchmarks.memory import CASES, measure_alone

    from veneer.engine.source import resolve

    # glibc's heap, with the profiler's events among the tensors, would take 20 times the peak
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    case = CASES["nf4-short"]
    config = AutoConfig.from_pretrained(resolve(None))
    predicted = predict(case.training(config.num_hidden_layers), config, Machine("cpu", "nf4"), case.load)
    measured = measure_alone("nf4-short", None)["peak_bytes"]
    assert predicted.total == pytest.approx(measured, rel=0.15)
    assert predicted.total - predicted.weights == pytest.approx(measured - predicted.weights, rel=0.15)
