"""Long rows are refused, left out or cut by the stated rule; an answer is never cut away wholly."""

from __future__ import annotations

import random
from typing import Any

import pytest

from veneer.errors import InvalidRequest
from veneer.training.data.encoding import IGNORED, Encoded, EncodedPair
from veneer.training.data.truncation import fit, fit_pairs, pieces

SHORT = Encoded([1, 2], [3], where="a:1")


def encoded(prompt: int, answer: int, where: str = "a:2") -> Encoded:
    return Encoded(list(range(100, 100 + prompt)), list(range(1000, 1000 + answer)), where=where)


def test_refuse_counts_and_names_the_first() -> None:
    with pytest.raises(
        InvalidRequest, match="2 rows are longer than max_length 10, first a:2 with 13 tokens"
    ):
        fit([SHORT, encoded(10, 3), encoded(20, 3, "a:3")], 10, "refuse")
    assert fit([SHORT, encoded(7, 3)], 10, "refuse").rows == [SHORT, encoded(7, 3)]


def test_drop_leaves_long_rows_out_and_says_which() -> None:
    fitted = fit([encoded(10, 3), SHORT], 10, "drop")
    assert fitted == ([SHORT], [1], 0, ["a:2"])
    with pytest.raises(InvalidRequest, match="all 1 rows are longer than max_length 10"):
        fit([encoded(10, 3)], 10, "drop")


def test_the_kept_side_of_the_prompt_stays() -> None:
    row = encoded(10, 3)
    end = fit([row, SHORT], 10, "keep_end", header=2)
    assert end.rows == [Encoded(row.prompt[3:], row.answer, where="a:2"), SHORT]
    assert (end.places, end.cut, end.dropped) == ([0, 1], 1, [])
    (start,) = fit([row], 10, "keep_start", header=2).rows
    assert start.prompt == row.prompt[:5] + row.prompt[-2:]


def test_the_mask_is_cut_with_the_prompt() -> None:
    row = Encoded(list(range(8)), [50, 51], bytes([0, 1, 1, 0, 0, 0, 1, 0]), "a:2")
    (end,) = fit([row], 8, "keep_end").rows
    assert (end.prompt, end.mask) == ([2, 3, 4, 5, 6, 7], bytes([1, 0, 0, 0, 1, 0]))
    (start,) = fit([row], 8, "keep_start", header=3).rows
    assert (start.prompt, start.mask) == ([0, 1, 2, 5, 6, 7], bytes([0, 1, 1, 0, 1, 0]))
    assert fit([row._replace(mask=bytes([1] + [0] * 7))], 8, "keep_end").rows[0].mask == b""


@pytest.mark.parametrize("seed", range(200))
def test_whatever_the_lengths_the_rule_holds(seed: int) -> None:
    draw = random.Random(seed)
    max_length, header = draw.randint(8, 40), draw.randint(0, 3)
    row = encoded(draw.randint(4, 60), draw.randint(1, 60))
    policy: Any = draw.choice(["keep_start", "keep_end"])
    (cut,) = fit([row], max_length, policy, header=header).rows
    assert cut.length == min(row.length, max_length)
    assert cut.answer
    assert cut.answer == row.answer[: len(cut.answer)]
    if len(row.answer) <= max_length - max_length // 2:
        assert cut.answer == row.answer
    if len(cut.answer) < len(row.answer):
        assert len(cut.prompt) == min(len(row.prompt), max_length // 2)
    assert cut.prompt[len(cut.prompt) - header :] == row.prompt[len(row.prompt) - header :]


def test_a_max_length_without_room_for_the_header_is_refused() -> None:
    with pytest.raises(
        InvalidRequest, match="a:2: max_length 6 leaves 3 tokens for the prompt, whose last 3 open"
    ):
        fit([encoded(10, 10)], 6, "keep_end", header=3)


def test_pairs_keep_one_prompt_that_gives_way_to_the_longer_answer() -> None:
    prompt = list(range(100, 110))
    pair = EncodedPair(Encoded(prompt, [1, 2], where="a:1"), Encoded(prompt, [1, 2, 3, 4], where="a:1"))
    (cut,) = fit_pairs([pair], 10, "keep_end").rows
    assert cut.chosen.prompt == cut.rejected.prompt == prompt[4:]
    assert (cut.chosen.answer, cut.rejected.answer) == ([1, 2], [1, 2, 3, 4])
    with pytest.raises(
        InvalidRequest, match="1 rows are longer than max_length 13, first a:1 with 14 tokens"
    ):
        fit_pairs([pair], 13, "refuse")
    assert fit_pairs([pair, pair._replace(rejected=pair.chosen)], 13, "drop").dropped == ["a:1"]


def test_pairs_that_cutting_makes_equal_are_refused() -> None:
    pair = EncodedPair(Encoded([9] * 4, [1] * 9), Encoded([9] * 4, [1] * 8, where="a:1"))
    with pytest.raises(InvalidRequest, match="both answers are the same after cutting to max_length 8"):
        fit_pairs([pair], 8, "keep_end")


@pytest.mark.parametrize("length", range(1, 14))
def test_every_token_of_a_text_is_learnt_once(length: int) -> None:
    text = Encoded([], list(range(length)), where="a:1")
    cut = pieces([SHORT._replace(prompt=[]), text], 5)
    assert cut.places == [0] + [1] * (len(cut.rows) - 1)
    assert all(piece.length <= 5 for piece in cut.rows)
    labels = [label for piece in cut.rows[1:] for label in piece.labels]
    assert [label for label in labels if label != IGNORED] == list(range(1, length))
    assert cut.cut == (length > 5)
    for piece in cut.rows[1:]:
        assert piece.answer == list(range(piece.answer[0], piece.answer[0] + piece.length))


def test_pieces_need_two_tokens() -> None:
    with pytest.raises(InvalidRequest, match="max_length is 1"):
        pieces([SHORT], 1)
