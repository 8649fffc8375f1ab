"""The report counts what is there, by hand-counted rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.training.data.encoding import Encoder
from veneer.training.data.formats import Message, Pair, Row, Text
from veneer.training.data.report import Length, describe, lengths_of, plot_lengths, rough_lengths
from veneer.training.data.truncation import fit

USER = Message("user", "one two")
ROWS = [
    Row((USER,), "a", "x:1"),
    Row((USER,), "a", "x:2"),
    Row((Message("user", "ONE  two"),), "b", "x:3", "completion"),
    Row((Message("system", "s"), USER), "a", "x:4"),
    Row((Message("system", "s"), USER, Message("assistant", "c d"), USER), "a", "x:5"),
]


def words(text: str) -> int:
    return len(text.split())


def test_rows_are_counted() -> None:
    report = describe(ROWS, rough_lengths(ROWS, words), empty_answers=3)
    assert (report.rows, report.formats) == (5, {"chat": 4, "completion": 1})
    assert (report.exact_duplicates, report.repeated_questions) == (1, 2)
    assert (report.with_system_prompt, report.system_prompts, report.multi_turn) == (2, 1, 1)
    assert report.empty_answers == 3
    assert report.tokens_per_epoch == 3 + 3 + 3 + 4 + 8
    assert report.learnt_tokens == 1 + 1 + 1 + 1 + 3
    assert report.too_long == 0


def test_lengths_are_summed_up_by_nearest_rank() -> None:
    lengths = [Length(tokens, 1) for tokens in range(1, 101)]
    report = describe([], lengths, max_length=90, policy="drop", after=lengths[:90])
    assert report.percentiles == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert report.mean_length == 50.5
    assert report.too_long == 10
    assert report.tokens_per_epoch == sum(range(1, 91))
    edges, counts = report.histogram
    assert len(edges) == len(counts) + 1
    assert counts == [sum(low <= tokens < low + 6 for tokens in range(1, 101)) for low in edges[:-1]]
    assert sum(counts) == 100


def test_texts_and_pairs_have_rough_lengths() -> None:
    pair = Pair((USER,), "a b c", "d", "x:1")
    assert rough_lengths([pair, Text("a b", "x:2")], words) == [Length(5, 3), Length(3, 1), Length(2, 2)]


def test_encoded_rows_are_measured_before_and_after_cutting(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, [2], loss_on="assistant")
    encoded = [encoder.row(row) for row in ROWS]
    fitted = fit(encoded, 50, "keep_end", header=encoder.header)
    report = describe(
        ROWS, lengths_of(encoded), max_length=50, policy="keep_end", after=lengths_of(fitted.rows)
    )
    assert report.too_long == fitted.cut == sum(row.length > 50 for row in encoded) > 0
    assert report.percentiles["max"] == max(row.length for row in encoded)
    assert report.tokens_per_epoch == sum(min(50, row.length) for row in encoded)
    assert report.learnt_tokens == sum(row.learnt for row in fitted.rows)


def test_a_report_is_json_text_and_a_picture(tmp_path: Path) -> None:
    report = describe(ROWS, rough_lengths(ROWS, words), max_length=5)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["histogram"]["counts"] == report.histogram.counts
    assert plain["learnt_share"] == round(7 / 21, 4)
    text = str(report)
    assert "5 rows (4 chat, 1 completion): 1 exact duplicates, 2 repeated questions" in text
    assert "1 sequences (20.0%) are longer than max_length 5; policy: refuse" in text
    assert "21 tokens an epoch, 7 of them learnt (33.3%)" in text
    plot_lengths(report, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_on_nothing_is_zeros(tmp_path: Path) -> None:
    report = describe([], [], max_length=5)
    assert (report.mean_length, report.percentiles["max"], report.learnt_share) == (0.0, 0, 0.0)
    assert report.histogram == ([0, 1], [0])
    assert "0 sequences (0.0%)" in str(report)
    plot_lengths(report, tmp_path / "lengths.png")
