"""In which way an answer is wrong: one category for each, the first whose rule holds.

| category | rule |
| --- | --- |
| empty | nothing but white space |
| refusal | begins with one of `REFUSALS`, with which the expected answer does not |
| repetitive | has up to 16 words, or 8 characters, 4 times or more in a row, which the expected answer has not |
| format | not a JSON object (with the same keys), JSON list or number where the expected answer is one |
| surface | equal but for case, punctuation, articles and white space; of JSON and numbers equal in value |
| too_long | has the expected answer's words, and more |
| cut_off | ended at the limit of tokens |
| too_short | is a part of the expected answer |
| spelling | has the expected words, some of them misspelled: in each at most 2 letters and less than a third are |
| | inserted, left out, replaced or swapped with a neighbour (Damerau, 1964); a wrong digit is no misspelling |
| other | none of these: words or numbers that are not the expected ones |

`choice` is the category of a multiple choice row whose most likely choice is wrong. The rules look at the texts
alone, know English refusals only, and words as white space divides them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from rapidfuzz.distance import OSA

from veneer.training.evaluation.metrics import exact_match, normalize

Category = Literal[
    "empty",
    "refusal",
    "repetitive",
    "format",
    "surface",
    "too_long",
    "cut_off",
    "too_short",
    "spelling",
    "other",
    "choice",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
REFUSALS = (
    "i cannot",
    "i can't",
    "i can not",
    "i am not able to",
    "i'm not able to",
    "i am unable to",
    "i'm unable to",
    "i am sorry",
    "i'm sorry",
    "sorry",
    "i apologize",
    "as an ai",
    "i do not know",
    "i don't know",
)
_TIMES = 4  # in a row, to be called repetitive
_WORDS, _CHARACTERS = 16, 8  # longest thing that is repeated
_LETTERS = 2  # wrong ones in a misspelled word


def categorize(answer: str, expected: str, finish_reason: str | None = None) -> Category | None:
    """The category of a wrong answer; None when it is right, surrounding white space aside."""
    if exact_match(answer, expected):
        return None
    return next(
        category for category, holds in _RULES if holds(answer.strip(), expected.strip(), finish_reason)
    )


def _is_empty(answer: str, expected: str, finish_reason: str | None) -> bool:
    return not answer


def _is_refusal(answer: str, expected: str, finish_reason: str | None) -> bool:
    return _refuses(answer) and not _refuses(expected)


def _is_repetitive(answer: str, expected: str, finish_reason: str | None) -> bool:
    return _repeats(answer) and not _repeats(expected)


def _is_other_format(answer: str, expected: str, finish_reason: str | None) -> bool:
    wanted, got = _parsed(expected), _parsed(answer)
    if isinstance(wanted, dict) and isinstance(got, dict):
        return wanted.keys() != got.keys()
    return wanted is not None and type(got) is not type(wanted)


def _is_surface(answer: str, expected: str, finish_reason: str | None) -> bool:
    wanted = _parsed(expected)
    return normalize(answer) == normalize(expected) if wanted is None else bool(_parsed(answer) == wanted)


def _is_too_long(answer: str, expected: str, finish_reason: str | None) -> bool:
    return _contains(normalize(answer), normalize(expected))


def _is_cut_off(answer: str, expected: str, finish_reason: str | None) -> bool:
    return finish_reason == "length"


def _is_too_short(answer: str, expected: str, finish_reason: str | None) -> bool:
    return _contains(normalize(expected), normalize(answer))


def _is_misspelled(answer: str, expected: str, finish_reason: str | None) -> bool:
    got, wanted = normalize(answer).split(), normalize(expected).split()
    return got != wanted and len(got) == len(wanted) and all(map(_is_spelling_of, got, wanted))


def _is_spelling_of(word: str, right: str) -> bool:
    if word == right:
        return True
    if any(letter.isdigit() for letter in word + right):
        return False
    wrong = OSA.distance(word, right, score_cutoff=_LETTERS)
    return wrong <= _LETTERS and 3 * wrong < max(len(word), len(right))


_Rule = Callable[[str, str, str | None], bool]
_RULES: tuple[tuple[Category, _Rule], ...] = (
    ("empty", _is_empty),
    ("refusal", _is_refusal),
    ("repetitive", _is_repetitive),
    ("format", _is_other_format),
    ("surface", _is_surface),
    ("too_long", _is_too_long),
    ("cut_off", _is_cut_off),
    ("too_short", _is_too_short),
    ("spelling", _is_misspelled),
    ("other", lambda answer, expected, finish_reason: True),
)


def _refuses(text: str) -> bool:
    words = normalize(text.replace("’", "'")) + " "
    return any(words.startswith(f"{normalize(refusal)} ") for refusal in REFUSALS)


def _contains(whole: str, part: str) -> bool:
    """Whether the words of `part` follow each other in `whole`, which has more."""
    return bool(part) and whole != part and f" {part} " in f" {whole} "


def _repeats(text: str) -> bool:
    return _has_run(text.split(), _WORDS) or _has_run(text, _CHARACTERS, least=16)


def _has_run(items: Sequence[str], longest: int, least: int = _TIMES) -> bool:
    """Whether up to `longest` items come `_TIMES` times right after each other, `least` items in all."""
    for period in range(1, min(longest, len(items) // _TIMES) + 1):
        needed = max((_TIMES - 1) * period, least - period)
        run = 0
        for place in range(period, len(items)):
            run = run + 1 if items[place] == items[place - period] else 0
            if run >= needed:
                return True
    return False


def _parsed(text: str) -> Any:
    """A JSON object or list, or a number; None for other text."""
    try:
        found = json.loads(text, parse_int=float, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list | float) else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
