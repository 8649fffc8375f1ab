"""Each category of wrong answers, its rule's edges, and what comes first when several hold."""

from __future__ import annotations

import pytest

from veneer.training.evaluation.error_analysis import CATEGORIES, categorize

EXPECTED = "They do not wash a warm coat."
OBJECT = '{"who": "Ben", "day": "friday"}'


OF_A_SENTENCE: list[tuple[str, str | None]] = [
    (f" {EXPECTED}\n", None),
    (" \n", "empty"),
    ("I'm sorry, but I can't help with that.", "refusal"),
    ("I’m sorry.", "refusal"),
    ("As an AI, I have no coat.", "refusal"),
    ("they do not wash the warm coat", "surface"),
    (f"{EXPECTED} They are very tidy people.", "too_long"),
    ("Sure: they do not wash a warm coat!", "too_long"),
    ("They do not wash", "too_short"),
    ("They do not wosh a warm coat.", "spelling"),
    ("They do not wash a wram caot.", "spelling"),
    ("They do not wash a wyrm cart.", "other"),  # two letters of four are no slip
    ("They do not wash a warm jacket.", "other"),
    ("They did not wash a warm coat.", "other"),
    ("They do not not not wash a warm coat.", "other"),
    ("They do not not not not wash a warm coat.", "repetitive"),
    ("They wash. They wash. They wash. They wash. They", "repetitive"),
    ("hahahahahahahahaha", "repetitive"),
    ("hahaha", "other"),
]


@pytest.mark.parametrize(("answer", "category"), OF_A_SENTENCE)
def test_of_a_sentence(answer: str, category: str | None) -> None:
    assert categorize(answer, EXPECTED) == category


OF_WHAT_PROGRAMS_READ: list[tuple[str, str, str]] = [
    (OBJECT.replace(" ", ""), OBJECT, "surface"),
    (f"Here it is: {OBJECT}", OBJECT, "format"),
    (OBJECT[:-1], OBJECT, "format"),
    ('["Ben", "friday"]', OBJECT, "format"),
    ('{"who": "Ben"}', OBJECT, "format"),
    ('{"who": "Ben", "day": "monday"}', OBJECT, "other"),
    ("[1, 2", "[1, 2]", "format"),
    ("twelve", "12", "format"),
    ("The answer is 12.", "12", "format"),
    ("13", "12", "other"),
    ("12.0", "12", "surface"),
    ("15", "1.5", "other"),
    ("NaN", "12", "format"),
    ("[" * 100_000, "[1]", "repetitive"),
    ("true", "false", "other"),
    ("9" * 5000, "12", "repetitive"),
]


@pytest.mark.parametrize(("answer", "expected", "category"), OF_WHAT_PROGRAMS_READ)
def test_of_what_programs_read(answer: str, expected: str, category: str) -> None:
    assert categorize(answer, expected) == category


def test_what_ended_at_the_limit() -> None:
    assert categorize("A coat is a", EXPECTED, "length") == "cut_off"
    assert categorize("They do not", EXPECTED, "length") == "cut_off"
    assert categorize(f"{EXPECTED} They", EXPECTED, "length") == "too_long"
    assert categorize("no no no no no no", EXPECTED, "length") == "repetitive"
    assert categorize(EXPECTED, EXPECTED, "length") is None


def test_what_is_expected_is_no_error_of_its_kind() -> None:
    assert categorize("I'm sorry, but no.", "Sorry, never.") == "other"
    assert categorize("ha ha ha ha ho", "ha ha ha ha") == "too_long"
    assert categorize("The", "A") == "surface"
    assert categorize("pizza", "the") == "other"  # an article alone is part of everything


MISSPELLINGS: list[tuple[str, str, str]] = [
    ("recieve", "receive", "spelling"),
    ("accomodation", "accommodation", "spelling"),
    ("teh", "the cat", "other"),
    ("goes", "went", "other"),
    ("room 12b", "room 13b", "other"),
]


@pytest.mark.parametrize(("answer", "expected", "category"), MISSPELLINGS)
def test_misspellings(answer: str, expected: str, category: str) -> None:
    assert categorize(answer, expected) == category


def test_every_category_but_that_of_choices_was_met_above() -> None:
    cases = [*OF_A_SENTENCE, *OF_WHAT_PROGRAMS_READ, *MISSPELLINGS]
    assert {case[-1] for case in cases} | {"cut_off"} == {None, *CATEGORIES} - {"choice"}
