"""Rows are read, models asked together and compared, and the gate decides; all without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import InvalidRequest
from veneer.training.data.formats import Message, Row, Text
from veneer.training.evaluation.confidence import mcnemar, wilson
from veneer.training.evaluation.evaluate import (
    Answer,
    EvaluationResult,
    Generation,
    assess,
    evaluate,
    metrics_for,
)
from veneer.training.evaluation.gate import gate_passed
from veneer.training.evaluation.metrics import Metric
from veneer.training.evaluation.rows import (
    Choices,
    EvaluationRow,
    Turn,
    expected_of,
    prompt_of,
    read_evaluation_rows,
)
from veneer.training.recipe import Gate

ROWS = [Row((Message("user", f"q{n}"),), f"answer {n}", f"rows:{n}") for n in range(1, 9)]
CHOICES = Choices((Message("user", "q"),), ("yes", "certainly not"), 1, "rows:1")


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(right: int, rows: Sequence[Row] = ROWS) -> list[Answer]:
    """The first `right` rows answered as expected."""
    texts = [row.answer if place < right else "wrong" for place, row in enumerate(rows)]
    return [Answer(Generation(text, "stop")) for text in texts]


def assessed(metric: Metric = "exact_match", **right: int) -> EvaluationResult:
    return assess(ROWS, list(right), [metric], [answers(each) for each in right.values()])


# ---- rows ----------------------------------------------------------------------------------------


def test_reads_answers_choices_and_texts(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (first, second) = read_evaluation_rows(write(tmp_path, {"prompt": "p", "completion": "c"}, chat))
    assert (expected_of(first), [turn.content for turn in prompt_of(first)]) == ("c", ["p"])
    assert (expected_of(second), second.where) == ("a", "rows.jsonl:2")
    (row,) = read_evaluation_rows(write(tmp_path, {"prompt": "q", "choices": ["x", "y"], "answer": 1}))
    assert row == Choices((Message("user", "q"),), ("x", "y"), 1, "rows.jsonl:1")
    assert expected_of(row) == "y"
    (text,) = read_evaluation_rows(write(tmp_path, {"text": "t"}))
    assert (expected_of(text), prompt_of(text)) == ("t", ())


def test_reads_no_further_than_asked(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "1"}, {"text": "2"}, {"wrong": "3"})
    assert [expected_of(row) for row in read_evaluation_rows(path, 2)] == ["1", "2"]
    with pytest.raises(InvalidRequest, match=r"^rows.jsonl:3: has `wrong`; needs"):
        read_evaluation_rows(path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"choices": ["x", "y"], "answer": 0}, "has `prompt`, `choices` and `answer`"),
        ({"prompt": " ", "choices": ["x", "y"], "answer": 0}, "prompt must be text"),
        ({"prompt": "q", "choices": ["x"], "answer": 0}, "two texts or more"),
        ({"prompt": "q", "choices": ["x", ""], "answer": 0}, "none empty"),
        ({"prompt": "q", "choices": "xy", "answer": 0}, "must be a list"),
        ({"prompt": "q", "choices": ["x", "x"], "answer": 0}, "a text twice"),
        ({"prompt": "q", "choices": ["x", "y"], "answer": 2}, r"0 to 1 \(got 2\)"),
        ({"prompt": "q", "choices": ["x", "y"], "answer": "x"}, r"got 'x'"),
        ({"prompt": "q", "choices": ["x", "y"], "answer": True}, r"got True"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "no one answer"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"text": "t"}, "has texts, rows.jsonl:1 answers; use two files"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        read_evaluation_rows(write(tmp_path, {"prompt": "p", "completion": "c"}, row, row))
    assert caught.value.message.startswith("rows.jsonl:2: ")
    assert "rows.jsonl:3: " in caught.value.message


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no rows"):
        read_evaluation_rows(write(tmp_path))


@pytest.mark.parametrize(
    ("row", "asked", "metrics"),
    [
        (ROWS[0], [], ("exact_match", "normalized_match", "token_f1")),
        (ROWS[0], ["perplexity", "exact_match", "perplexity"], ("perplexity", "exact_match")),
        (CHOICES, [], ("accuracy", "accuracy_normalized")),
        (Text("t", "rows:1"), [], ("perplexity",)),
    ],
)
def test_which_metrics_rows_have(row: EvaluationRow, asked: list[Metric], metrics: tuple[Metric]) -> None:
    assert metrics_for([row], asked) == metrics


def test_a_metric_that_rows_do_not_have_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"no metric 'accuracy'; theirs are exact_match, .*perplexity"):
        metrics_for(ROWS, ["accuracy"])


# ---- asking --------------------------------------------------------------------------------------


class Models:
    """Answers row n right if n is at most the number that a model is called."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.open = self.most = 0

    async def generate(self, model: str, prompt: Sequence[Turn]) -> Generation:
        question = prompt[0].content
        self.asked.append((question, model))
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0)
        self.open -= 1
        number = int(question[1:])
        return Generation(f"answer {number}" if number <= int(model) else "answer", "stop")

    async def score(self, model: str, prompt: Sequence[Turn], texts: Sequence[str]) -> list[list[float]]:
        return [[-float(model)] * len(text.split()) for text in texts]


def ask(models: Models, *names: str, metrics: Sequence[Metric], **options: Any) -> EvaluationResult:
    work = evaluate(ROWS, names, metrics, generate=models.generate, score=models.score, **options)
    return asyncio.run(work)


def test_models_are_asked_side_by_side_and_within_bounds() -> None:
    models, done = Models(), [0]

    def count() -> None:
        done[0] += 1

    result = ask(models, "0", "4", "8", metrics=["exact_match"], concurrency=5, on_answer=count)
    assert done == [24]
    assert models.most == 5
    assert models.asked[:4] == [("q1", "0"), ("q1", "4"), ("q1", "8"), ("q2", "0")]
    assert [model.metrics["exact_match"].value for model in result.models] == [0, 0.5, 1]
    assert [(each.first, each.second) for each in result.comparisons] == [("0", "4"), ("4", "8"), ("0", "8")]
    assert result["4"].metrics["exact_match"] == (0.5, *wilson(4, 8), 8)
    difference = result.comparisons[0].differences["exact_match"]
    assert (difference.value, difference.p_value) == (0.5, mcnemar(4, 0))
    assert result["4"].categories == {"too_short": 4}
    assert not result["8"].categories


def test_perplexity_asks_for_likelihoods_only() -> None:
    models = Models()
    result = ask(models, "1", "2", metrics=["perplexity"])
    assert models.asked == []
    assert [model.metrics["perplexity"].value for model in result.models] == pytest.approx([2.71828, 7.38906])
    outcome = result["1"].outcomes[0]
    assert (outcome.text, outcome.category, outcome.scores["perplexity"]) == (None, None, (-2.0, 2))


def test_a_failure_ends_it_and_names_row_and_model() -> None:
    models = Models()

    async def generate(model: str, prompt: Sequence[Turn]) -> Generation:
        if prompt[0].content == "q3":
            raise InvalidRequest("too long")
        return await models.generate(model, prompt)

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(
            evaluate(ROWS, ["1"], ["exact_match"], generate=generate, score=models.score, concurrency=2)
        )
    assert caught.value.message == "rows:3 to 1: too long"
    assert len(models.asked) < 7


def test_choices_are_taken_by_their_likelihood() -> None:
    given = Answer(log_probabilities=[[-1.0], [-0.75, -0.75]])  # yes; certainly not
    result = assess([CHOICES], ["m"], ["accuracy", "accuracy_normalized"], [[given]])
    assert [measured.value for measured in result["m"].metrics.values()] == [0, 1]
    assert (result["m"].outcomes[0].text, result["m"].outcomes[0].category) == ("yes", "choice")
    by_length = assess([CHOICES], ["m"], ["accuracy_normalized"], [[given]])
    assert (by_length["m"].outcomes[0].text, by_length["m"].outcomes[0].category) == ("certainly not", None)


# ---- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "right", "passed", "says"),
    [
        ({"at_least": 0.75}, 6, True, "exact_match of new is 75.0 %, at least 75.0 % as the gate asks"),
        ({"at_least": 0.76}, 6, False, "not at least 76.0 %"),
        ({"no_worse_than": "base"}, 0, True, "equal to that of base (0.0 % and 0.0 %, p = 1)"),
        ({"no_worse_than": "previous"}, 6, False, "worse than that of old (75.0 % and 87.5 %, maybe chance"),
        ({"no_worse_than": "previous"}, 8, True, "better than that of old"),
        ({"no_worse_than": "base"}, 8, True, "(100.0 % and 0.0 %, more than chance, p = 0.0078)"),
        ({"at_least": 0.5, "no_worse_than": "previous"}, 6, False, "at least 50.0 % as the gate asks; exact"),
    ],
)  # fmt: skip
def test_the_gate(gate: dict[str, Any], right: int, passed: bool, says: str) -> None:
    result = assessed(base=0, old=7, new=right)
    decision = gate_passed(Gate(**gate), result, new="new", base="base", previous="old")
    assert decision.passed is passed
    assert says in decision.reason


def test_perplexity_must_be_low() -> None:
    likelihoods = {"old": -1.0, "new": -1.5}
    given = [[Answer(log_probabilities=[[value]])] * 8 for value in likelihoods.values()]
    result = assess(ROWS, list(likelihoods), ["perplexity"], given)
    for bound, passed in ((4.5, True), (4.4, False)):
        decision = gate_passed(Gate(metric="perplexity", at_least=bound), result, new="new")
        assert decision.passed is passed
        assert f"at most {bound:.2f}" in decision.reason
    worse = gate_passed(
        Gate(metric="perplexity", no_worse_than="previous"), result, new="new", previous="old"
    )
    assert not worse.passed
    assert "worse than that of old (4.48 and 2.72, more than chance" in worse.reason


def test_the_first_version_has_none_to_be_worse_than() -> None:
    decision = gate_passed(Gate(no_worse_than="previous"), assessed(base=8, new=0), new="new", base="base")
    assert decision == (True, "there is no previous version to be worse than")


def test_what_was_not_measured_cannot_be_decided() -> None:
    with pytest.raises(InvalidRequest, match="asks for token_f1"):
        gate_passed(Gate(metric="token_f1", at_least=0), assessed(new=1), new="new")
    with pytest.raises(InvalidRequest, match="the base, which was not measured"):
        gate_passed(Gate(no_worse_than="base"), assessed(new=1), new="new")


@pytest.mark.parametrize(
    ("gate", "says"),
    [({}, "needs `at_least` or `no_worse_than`"), ({"at_least": 95}, "from 0 to 1 .got 95")],
)
def test_a_gate_that_asks_nothing_or_too_much_is_refused(gate: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Gate(**gate)
    assert Gate(metric="perplexity", at_least=95).at_least == 95
