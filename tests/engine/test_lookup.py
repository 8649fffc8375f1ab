"""What is drafted; whether drafts change an answer is `test_drafts.py`'s."""

from __future__ import annotations

import random

from veneer.engine.lookup import PAUSE, SIZES, PromptLookup


def naive(tokens: list[int], most: int) -> list[int]:
    """What followed the last place where the last n-gram stood before, the longest first."""
    for size in SIZES:
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return [tokens[end + at % (len(tokens) - end)] for at in range(most)]
    return []


def test_the_last_occurrence_of_the_longest_n_gram_is_followed() -> None:
    rng = random.Random(3)
    for length in range(1, 60):
        tokens = [rng.randrange(4) for _ in range(length)]
        found = PromptLookup(5).find(tokens, 5)
        assert found == naive(tokens, 5), tokens
        assert PromptLookup(2).find(tokens, 5) == found[:2]
        assert PromptLookup(5).find(tokens, 1) == found[:1]


def test_tokens_are_taken_in_as_they_come() -> None:
    rng = random.Random(5)
    tokens, lookup = [rng.randrange(4) for _ in range(9)], PromptLookup(5)
    for _ in range(60):
        assert lookup.find(tokens, 5) == naive(tokens, 5)
        tokens += [rng.randrange(4) for _ in range(rng.randrange(3))]


def test_a_text_that_is_followed_goes_on_where_its_n_gram_has_a_later_place() -> None:
    tokens = [1, 2, 3, 10, 1, 2, 3, 20, 5, 6]
    lookup = PromptLookup(3)
    said = [*tokens, 1, 2, 3, 10]  # found by the whole n-gram [2, 3, 10]
    assert lookup.find(said, 3) == [1, 2, 3]
    lookup.learn(3, 3)
    said += [1, 2, 3, 20]
    assert lookup.find(said, 3) == [5, 6, 1]
    lookup.learn(3, 1)  # 5, and then 9 instead of 6
    assert lookup.find([*said, 5, 9], 3) == []
    assert lookup.find([*said, 5, 9, 20, 5], 2) == [9, 20]  # of two places the later


def test_the_prediction_is_found_from_the_first_token_on() -> None:
    lookup = PromptLookup(4, prediction=[7, 8, 9, 7, 5], prompt=[1, 2])
    assert lookup.find([1, 2, 7], 4) == [8, 9, 7, 5]
    assert PromptLookup(4, prompt=[1, 2]).find([1, 2, 7], 4) == []


def test_the_prediction_does_not_go_on_with_the_prompt() -> None:
    """Which may begin with tokens that have no ids."""
    prompt = [-1, -1, 1, 2]
    for answer, draft in (([7], [8, 9]), ([7, 8], [9]), ([7, 8, 9], []), ([8, 9], [])):
        lookup = PromptLookup(4, prediction=[7, 8, 9], prompt=[1, 2])
        assert lookup.find([*prompt, *answer], 4) == draft
        lookup.learn(len(draft), len(draft))
        assert -1 not in lookup.find([*prompt, *answer, *draft, 9], 4)


def test_drafts_grow_with_success_and_pause_without() -> None:
    lookup, tokens = PromptLookup(8), [1, 2] * 20
    assert len(lookup.find(tokens, 99)) == 8
    for drafted, accepted, next_one in [(8, 0, 4), (4, 0, 2), (2, 2, 4), (4, 4, 8), (8, 8, 8), (8, 2, 3)]:
        lookup.find(tokens, 99)
        lookup.learn(drafted, accepted)
        assert len(lookup.find(tokens, 99)) == next_one
    for drafted in (3, 1):
        lookup.find(tokens, 99)
        lookup.learn(drafted, 0)
    assert lookup.find([*tokens, *[3] * (PAUSE - 1)], 99) == []
    assert lookup.find([*tokens, *[3] * PAUSE], 99) == [3]
