"""Parts share no question, are as large as was asked, and follow from questions and seed alone."""

from __future__ import annotations

import random

import pytest

from veneer.errors import InvalidRequest
from veneer.training.data.formats import Message, Pair, Row, Text
from veneer.training.data.splitting import check_apart, drop_leaks, split, split_rows


def row(prompt: str, answer: str = "yes", where: str = "rows.jsonl:1") -> Row:
    return Row((Message("user", prompt),), answer, where)


def talk(*contents: str, where: str = "rows.jsonl:1", weight: int = 1) -> Row:
    """A conversation whose last content is the answer."""
    turns = [Message(("user", "assistant")[at % 2], text, weight) for at, text in enumerate(contents)]
    return Row(tuple(turns[:-1]), turns[-1].content, where)


def random_rows(seed: int) -> list[Row]:
    """Rows that repeat each other's questions in other cases and spacing, and continue each other."""
    draw = random.Random(seed)
    found = []
    for _ in range(draw.randint(3, 60)):
        asked = f"question {draw.randint(0, 40)}"
        asked = draw.choice([asked, asked.upper(), f" {asked} ".replace(" ", "\n ")])
        if draw.random() < 0.3:
            found.append(talk(asked, "hello", f"question {draw.randint(0, 40)}", "bye"))
        else:
            found.append(row(asked, str(draw.random())))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_rows_parts_are_apart_complete_and_of_the_right_size(seed: int) -> None:
    rows = random_rows(seed)
    draw = random.Random(-seed)
    validation, test = draw.choice([(0.0, 0.3), (0.1, 0.1), (0.4, 0.5), (0.01, 0.01), (0.2, 0.0)])
    parts = split(rows, seed=seed, validation=validation, test=test)
    assert sorted(map(repr, rows)) == sorted(repr(item) for part in parts for item in part)
    assert [bool(part) for part in parts] == [True, validation > 0, test > 0]
    for first, second in [(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)]:
        check_apart(parts[first], parts[second])

    shuffled = draw.sample(rows, len(rows))
    again = split(shuffled, seed=seed, validation=validation, test=test)
    assert [{item.key for item in part} for part in again] == [{item.key for item in part} for part in parts]


def test_shares_are_those_of_the_questions() -> None:
    rows = [row(f"question {n % 40}", answer=str(n)) for n in range(120)]
    parts = split(rows, seed=0, validation=0.25, test=0.1)
    assert [len({item.key for item in part}) for part in parts] == [26, 10, 4]


def test_another_seed_gives_another_split_and_more_validation_the_same_test() -> None:
    rows = [row(f"question {n}") for n in range(40)]
    first, second = split(rows, seed=1, test=0.2), split(rows, seed=2, test=0.2)
    assert first.test != second.test
    assert split(rows, seed=1, validation=0.5, test=0.2).test == first.test


def test_split_rows_leaves_neither_side_empty() -> None:
    for fraction in (0.01, 0.99):
        training, held_out = split_rows([row("a"), row("b"), row("c")], fraction, seed=0)
        assert training
        assert held_out
    with pytest.raises(InvalidRequest, match="only 1 different question, too few for 2 parts"):
        split_rows([row("a"), row("A ")], 0.5, seed=0)


@pytest.mark.parametrize("shares", [(-0.1, 0.2), (0.5, 0.5), (0, 1)])
def test_shares_that_leave_nothing_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(InvalidRequest, match=r"must be at least 0 and together below 1"):
        split([row("a"), row("b")], seed=0, validation=shares[0], test=shares[1])


def test_the_same_letters_composed_otherwise_are_the_same_question() -> None:
    assert row("Café").key == row("cafe\u0301").key
    assert row("x²").key != row("x2").key


def test_texts_and_pairs_are_split_too() -> None:
    texts = [Text(f"text {n % 5}", f"a:{n}") for n in range(10)]
    training, held_out = split_rows(texts, 0.4, seed=0)
    check_apart(training, held_out)
    assert (len(training), len(held_out)) == (6, 4)
    pairs = [Pair(row(f"q{n % 5}").prompt, "a", "b", f"a:{n}") for n in range(10)]
    check_apart(*split_rows(pairs, 0.4, seed=0))


def test_a_held_out_row_that_is_trained_on_is_refused() -> None:
    training = [row("Hello  there", where="train:1"), row("b", where="train:2")]
    with pytest.raises(InvalidRequest, match=r"test:7 asks the same as train:1.*memory; remove"):
        check_apart(training, [row("hello there", where="test:7")])
    with pytest.raises(InvalidRequest, match=r"\(and 1 more rows\)"):
        check_apart(training, [row("hello there"), row("B")])


def test_an_earlier_turn_that_is_learnt_leaks_one_of_weight_0_does_not() -> None:
    held_out = [row("hi", where="test:1")]
    with pytest.raises(InvalidRequest, match="test:1 asks the same as train:1"):
        check_apart([talk("hi", "hello", "and?", "bye", where="train:1")], held_out)
    check_apart([talk("hi", "hello", "and?", "bye", weight=0)], held_out)


def test_leaks_can_be_left_out_of_training() -> None:
    training = [
        row("a", where="train:1"),
        talk("b", "x", "c", "y", where="train:2"),
        row("d", where="train:3"),
    ]
    kept = drop_leaks(training, [row("A"), row("b")])
    assert kept == ([training[2]], ["train:1", "train:2"])
    check_apart(kept.rows, [row("A"), row("b")])
    with pytest.raises(InvalidRequest, match="every training row is also held out"):
        drop_leaks(training[:1], [row("a")])
