"""Conformance: some cases through the whole run, and that what is wrong fails."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from veneer.adapters.registry import METHODS, REFUSED
from veneer.engine.runner import Runner
from veneer.errors import InvalidRequest
from veneer.server.cli import main
from veneer.training.conformance import cases, run, table
from veneer.training.conformance.cases import CONTINUATION, PROMPT, Case, collect, peft_case
from veneer.training.conformance.run import Row, relative_error

ERRORS = ("alone", "batch", "cache", "nf4")
DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"


def case_of(method: str) -> Case:
    return next(case for case in collect() if case.method == method)


@pytest.fixture(scope="module")
def lora() -> Case:
    return case_of("LORA")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    cases.tiny_base(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rows_of(*chosen: Case) -> dict[str, Row]:
    return {row.method: row for row in run.check(chosen, None, "cpu")}


# ---- the cases ------------------------------------------------------------------------------------


def test_every_method_has_a_case() -> None:
    kinds = [case.kind for case in collect() if not case.refused]
    assert set(METHODS) == set(kinds)
    assert not set(METHODS) & set(REFUSED)


def test_a_case_is_the_same_each_time_and_acts(lora: Case, base: Any, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    tokens = [*PROMPT, *CONTINUATION]
    answers = []
    for name in ("one", "two"):
        lora.write(base, tmp_path / name)
        answers.append(lora.reference(base, tmp_path / name, tokens))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert torch.equal(*answers)
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        plain = torch.log_softmax(base(torch.tensor([tokens])).logits[0], -1)
    assert relative_error(answers[0], plain) > 0.1


def test_two_cases_of_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.training.conformance import cases_lora

    monkeypatch.setattr(cases_lora, "CASES", [*cases_lora.CASES, cases_lora.CASES[0]])
    with pytest.raises(ValueError, match="LORA"):
        collect()


# ---- the run --------------------------------------------------------------------------------------


def test_some_kinds_in_one_batch(monkeypatch: pytest.MonkeyPatch, lora: Case) -> None:
    batches: list[list[tuple[str | None, int]]] = []
    launch = Runner.launch

    def watched(self: Runner, batch: Any, *rest: Any) -> Any:
        batches.append([(item.sequence.adapter, item.count) for item in batch.items])
        return launch(self, batch, *rest)

    monkeypatch.setattr(Runner, "launch", watched)
    kinds = ("LORA", "LOHA", "VERA", "HRA", "LORA lora_bias", "LORA PiSSA, unconverted")
    rows = rows_of(*(case_of(method) for method in kinds))
    assert list(rows) == ["(base)", *kinds]
    assert rows.pop("LORA PiSSA, unconverted").verdict == "refused"
    for row in rows.values():
        assert row.verdict == "pass", row
        assert all(error is not None and error <= 1e-5 for error in map(row.__getattribute__, ERRORS)), row
        assert row.graphed is None
    control = [row.control for row in rows.values() if row.kind != "base"]
    assert all(error is not None and error > 1e-4 for error in control)
    assert rows["HRA"].portability == "proportional"
    assert rows["LORA lora_bias"].primitives == ["low_rank", "bias"]
    assert rows["LORA"].rank == 8
    assert rows["LORA"].bytes == 4 * 2 * (8 * (64 + 64) + 8 * (64 + 32))  # float32, two layers, q and v
    mixed = [batch for batch in batches if len({adapter for adapter, _ in batch}) == 6]
    assert any({count for _, count in batch} == {1} for batch in mixed)  # all decode in one step
    both = [{count == 1 for _, count in batch} == {True, False} for batch in batches]
    assert any(both)  # prompts beside decoding rows


def broken(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


def test_what_is_wrong_fails(lora: Case) -> None:
    def fails(*_: Any) -> Any:
        raise KeyError("no such layer")

    plain = LoraConfig(r=4, target_modules=["q_proj"])
    rows = rows_of(
        lora,
        broken(lora, method="serves the base", load=lambda model, folder: model),
        broken(lora, method="cannot be made", make=fails),
        broken(lora, method="cannot be run", run=fails),
        broken(lora, method="is served", refused=True),
        peft_case("LILY", "is refused", lambda model: plain, save=save_as("LILY")),
        peft_case("LORA", "is untrained", lambda model: plain, randomize=lambda model: None),
    )
    assert rows.pop("(base)").verdict == rows.pop("LORA").verdict == "pass"
    reasons = {row.method: row.reason or "" for row in rows.values() if row.verdict == "fail"}
    assert set(reasons) == set(rows)
    assert reasons["serves the base"].startswith("alone: the error")
    assert reasons["cannot be made"] == "its library could not make it: KeyError: 'no such layer'"
    assert "KeyError" in reasons["cannot be run"]
    assert "was not refused" in reasons["is served"]
    assert REFUSED["LILY"] in reasons["LILY is refused"]
    assert "changes nothing" in reasons["LORA is untrained"]


def save_as(kind: str) -> Any:
    def save(model: Any, folder: Path) -> None:
        cases.save_with_peft(model, folder)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": kind}))

    return save


def test_noise_that_does_not_show_fails(lora: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "NOISE", 1e-9)
    row = rows_of(lora)["LORA"]
    assert row.verdict == "fail"
    assert (row.reason or "").startswith("control:")


@pytest.mark.parametrize(
    ("ours", "error"),
    [
        ([-1.0, -2.0], 0.0),
        ([-1.0, -2.5], 0.25),
        ([-1.5, float("nan")], 0.5),
        ([float("nan"), float("nan")], float("inf")),
    ],
)
def test_relative_error(ours: Sequence[float], error: float) -> None:
    assert relative_error(torch.tensor(ours), torch.tensor([-1.0, -2.0])) == error


# ---- the command ----------------------------------------------------------------------------------


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--only", "lora p*", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["verdict"]) for row in rows] == [
        ("(base)", "pass"),
        ("LORA PiSSA, unconverted", "refused"),
    ]
    assert {"method", "primitives", "alone", "batch", "cache", "nf4", "verdict", "reason"} <= set(rows[1])
    assert "base-fragile" in rows[1]["reason"]


ROWS = [
    Row(method="A", kind="A", primitives=["low_rank", "bias"], rank=8, bytes=64, alone=0.0, batch=1.25e-7),
    Row(method="B", kind="B", verdict="refused", reason="this | that"),
]


def test_the_exit_status_and_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = list(ROWS)
    monkeypatch.setattr(table, "run", lambda *_: rows)
    assert main(["conformance"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^A +low_rank bias +- +8 +64 +0.0e\+00 +1\.\de-07 +- .* pass$", out, re.MULTILINE)
    assert "B: this | that" in out
    assert "1 pass, 0 fail, 1 refused" in out
    rows.append(Row(method="C", kind="C", verdict="fail", reason="alone: the error 1.0e-01 is above 1e-05"))
    file = tmp_path / "docs.md"
    file.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert main(["conformance", "--markdown", str(file)]) == 1
    assert "veneer: C: alone: the error" in capsys.readouterr().err
    text = file.read_text()
    assert "old" not in text
    assert re.fullmatch(
        r"before\n<!--.*\| A \|.*\| B \| this \\\| that \|\n\n<!--.*-->\nafter\n", text, re.DOTALL
    )
    file.write_text("no markers")
    assert main(["conformance", "--markdown", str(file)]) == 1
    assert file.read_text() == "no markers"


@pytest.mark.parametrize("arguments", [["--only", "NOTHING"], ["--base", "/nowhere"]])
def test_what_cannot_be_run_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", *arguments]) == 1
    assert arguments[1] in capsys.readouterr().err


def test_nothing_matches() -> None:
    with pytest.raises(InvalidRequest, match="NOTHING"):
        run.run(None, "NOTHING")


def test_the_documented_tables_are_of_these_methods() -> None:
    text = DOCS.read_text().partition(table.BEGIN)[2].partition(table.END)[0]
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    verdicts = {line[0]: line[-1] for line in lines if len(line) > 2}
    refused = {line[0] for line in lines if len(line) == 2} - {"METHOD", "---"}
    assert {method for method, verdict in verdicts.items() if verdict == "pass"} == {
        "(base)",
        *(case.method for case in collect() if not case.refused),
    }, "run veneer conformance --markdown docs/adapters.md"
    assert set(verdicts.values()) == {"VERDICT", "---", "pass"}
    assert refused == {*REFUSED, *(case.method for case in collect() if case.refused)}
