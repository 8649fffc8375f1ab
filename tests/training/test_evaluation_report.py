"""The report is one escaped file that needs nothing else, and JSON has what it shows."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from veneer.training.data.formats import Message, Row, Text
from veneer.training.evaluation.evaluate import Answer, EvaluationResult, Generation, assess
from veneer.training.evaluation.report import CHARACTERS, EXAMPLES, to_dict, to_html
from veneer.training.evaluation.rows import Choices

HOSTILE = "<script>alert(1)</script>'\"&{{ 7 * 7 }}"
NAMES = ["<b>base</b>", "$x$@1", "mine@2"]
ANSWER_METRICS: Any = ("exact_match", "normalized_match", "token_f1")


@pytest.fixture(scope="module")
def result() -> EvaluationResult:
    rows = [Row((Message("user", f"{HOSTILE} {n}"),), f"right {n}", f"rows:{n}") for n in range(4)]
    texts = [
        ["", HOSTILE, "right 2", "x"],
        ["right 0", "right 1", "wrong", "rihgt 3"],
        ["right 0", "no", "right 2", "right 3"],
    ]
    given = [[Answer(Generation(text, "stop")) for text in each] for each in texts]
    return assess(rows, NAMES, ANSWER_METRICS, given)


@pytest.fixture(scope="module")
def html(result: EvaluationResult) -> str:
    return to_html(result, {"data": "<i>rows</i>.jsonl"})


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_nothing_is_loaded_and_nothing_runs(html: str) -> None:
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "b", "i", "object"})
    sources = [str(each["src"]) for each in page.all("img")]
    assert len(sources) == 2
    for source in sources:
        assert source.startswith("data:image/svg+xml;base64,")
        assert b"<svg" in base64.b64decode(source.partition(",")[2])
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.text
    assert "<b>base</b>" in page.text
    assert "<i>rows</i>.jsonl" in page.text


def test_tables_show_values_intervals_and_differences(result: EvaluationResult, html: str) -> None:
    words = " ".join(Page(html).text.split())
    low, high = (f"{100 * bound:.1f} %" for bound in result["mine@2"].metrics["exact_match"][1:3])
    assert f"75.0 % {low} … {high}" in words
    assert "mine@2 − $x$@1 exact_match 25.0 %" in words
    assert "2 / 1 1 McNemar exact may be chance" in words


def test_rows_are_filtered_by_what_is_wrong_with_them(html: str) -> None:
    page = Page(html)
    choices = {str(each["id"]).removeprefix("only-") for each in page.all("input")}
    assert choices == {"all", "empty", "spelling", "other", "mended", "broken"}
    for name in choices - {"all"}:
        assert f"body:has(#only-{name}:checked) tbody.examples tr:not(.{name})" in html
    rows = re.findall(r'<tr class="([a-z_ ]*)"><td><small>(rows:\d)', html)
    assert rows == [  # the last model's mistake first, then those of others
        ("broken other right", "rows:1"),
        ("empty right", "rows:0"),
        ("mended other right", "rows:2"),
        ("mended other right spelling", "rows:3"),
    ]


def test_what_is_shown_is_bounded() -> None:
    count = EXAMPLES + 50
    rows = [Row((Message("user", "q"),), "a" * 10_000, f"rows:{n}") for n in range(count)]
    given = [[Answer(Generation("b" * 10_000, "length"))] * count]
    html = to_html(assess(rows, ["m"], ["exact_match"], given), {})
    assert len(Page(html).all("pre")) == 3 * EXAMPLES
    assert "b" * (CHARACTERS + 1) not in html
    assert "(10000 characters)" in html
    assert f"{EXAMPLES} of {count}," in html


def test_json_has_everything(result: EvaluationResult) -> None:
    found = json.loads(json.dumps(to_dict(result, {"data": "rows.jsonl"}), allow_nan=False))
    assert (found["rows"], found["settings"]) == (4, {"data": "rows.jsonl"})
    assert [each["model"] for each in found["models"]] == NAMES
    assert found["models"][0]["errors"] == {"empty": 1, "other": 2}
    assert found["models"][2]["metrics"]["exact_match"]["value"] == 0.75
    assert [(each["first"], each["second"]) for each in found["comparisons"]][2] == (NAMES[0], NAMES[2])
    difference = found["comparisons"][0]["differences"]["exact_match"]
    assert (difference["value"], difference["better"], difference["worse"]) == (0.25, 2, 1)
    assert found["answers"][3]["models"][NAMES[1]] == {
        "text": "rihgt 3",
        "error": "spelling",
        "scores": {"exact_match": 0.0, "normalized_match": 0.0, "token_f1": 0.5},
    }


def test_choices_and_texts_have_reports_too() -> None:
    row = Choices((Message("user", "q"),), ("yes", "no"), 1, "rows:1")
    chosen = assess([row], ["m"], ["accuracy"], [[Answer(log_probabilities=[[-1.0], [-2.0]])]])
    assert "choice" in Page(to_html(chosen, {})).text
    assert to_dict(chosen, {})["answers"][0]["choices"] == ["yes", "no"]
    text = assess([Text("t", "rows:1")], ["m"], ["perplexity"], [[Answer(log_probabilities=[[-1.0, -2.0]])]])
    page = Page(to_html(text, {}))
    assert "2 tokens, -3.000 nats" in page.text
    assert len(page.all("img")) == 1  # nothing was answered, so nothing is wrong
    assert to_dict(text, {})["answers"][0]["models"]["m"]["scores"]["perplexity"] == pytest.approx(
        4.4817, abs=1e-4
    )


def test_the_same_result_is_the_same_file(result: EvaluationResult, html: str) -> None:
    assert to_html(result, {"data": "<i>rows</i>.jsonl"}) == html
