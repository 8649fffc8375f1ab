"""The page pool by itself: references, the prefix cache, eviction."""

from __future__ import annotations

import random
from itertools import count

import pytest

from veneer.engine.messages import SamplingParams
from veneer.engine.pages import PagePool
from veneer.engine.sequence import Sequence

PAGE = 4
_ids = count()


def make(tokens: list[int], adapter: str | None = None) -> Sequence:
    return Sequence(
        id=str(next(_ids)), tokens=list(tokens), sampling=SamplingParams(max_tokens=8), adapter=adapter
    )


def compute(pool: PagePool, sequence: Sequence, until: int | None = None) -> None:
    """What the scheduler does when the tokens before `until` have been computed."""
    start = sequence.num_computed
    sequence.num_computed = len(sequence.tokens) if until is None else until
    pool.register(sequence, start)


def run(pool: PagePool, sequence: Sequence) -> Sequence:
    assert pool.can_allocate(sequence)
    pool.allocate(sequence)
    compute(pool, sequence)
    return sequence


def test_allocates_whole_pages_and_frees_them() -> None:
    pool = PagePool(4, PAGE)
    sequence = run(pool, make([1] * 9))
    assert len(set(sequence.pages)) == 3
    assert pool.used == 3
    pool.free(sequence)
    assert (pool.used, sequence.pages, sequence.num_computed) == (0, [], 0)


def test_asks_before_it_allocates() -> None:
    pool = PagePool(2, PAGE)
    assert not pool.can_allocate(make([1] * 9))
    first = run(pool, make([1] * 8))
    assert not pool.can_allocate(make([2]))
    first.tokens.append(1)
    assert not pool.can_allocate(first)
    pool.free(first)
    assert pool.can_allocate(make([2] * 8))


def test_what_is_still_to_be_scored_is_not_taken_from_the_cache() -> None:
    pool = PagePool(9, PAGE)
    run(pool, make([5] * 16))
    sequence = make([5] * 16)
    sequence.sampling = SamplingParams(max_tokens=8, prompt_logprobs=0)
    found = []
    for sequence.num_read in (0, 3, 4, 11, 14, 15, 16):  # after 15 nothing of the prompt is left
        found.append(len(pool.lookup(sequence)))
    assert found == [0, 0, 1, 2, 3, 3, 3]
    sequence.num_read = 0
    sequence.num_virtual = 8  # their pages are the adapter's
    assert len(pool.lookup(sequence)) == 2


def test_a_page_is_added_only_when_the_last_is_full() -> None:
    pool = PagePool(4, PAGE)
    sequence = run(pool, make([1, 2, 3]))
    sequence.tokens.append(4)
    pool.allocate(sequence)
    assert len(sequence.pages) == 1
    sequence.tokens.append(5)
    pool.allocate(sequence)
    assert len(sequence.pages) == 2


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (30, 8)])
def test_a_cached_prefix_leaves_a_token_to_compute(length: int, cached: int) -> None:
    pool = PagePool(32, PAGE)
    tokens = list(range(30))
    first = run(pool, make(tokens[:9]))
    second = make(tokens[:length])
    pool.allocate(second)
    assert second.num_computed == second.num_cached == cached
    assert second.pages[: cached // PAGE] == first.pages[: cached // PAGE]
    assert not set(second.pages[cached // PAGE :]) & set(first.pages)
    assert (pool.query_tokens, pool.hit_tokens) == (9 + length, cached)


def test_the_prefix_must_match_from_the_start() -> None:
    pool = PagePool(16, PAGE)
    run(pool, make([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert pool.lookup(make([5, 6, 7, 8, 9])) == []  # the same page at another place
    assert pool.lookup(make([0, 2, 3, 4, 5, 6, 7, 8, 9])) == []
    assert len(pool.lookup(make([1, 2, 3, 4, 0, 6, 7, 8, 9]))) == 1


def test_adapters_and_the_base_never_share() -> None:
    pool = PagePool(16, PAGE)
    for adapter in (None, "a" * 64, "b" * 64):
        assert pool.lookup(make([1] * 9, adapter)) == []
        run(pool, make([1] * 9, adapter))
        assert len(pool.lookup(make([1] * 9, adapter))) == 2


def test_no_caching_when_it_is_off() -> None:
    pool = PagePool(16, PAGE, prefix_caching=False)
    pool.free(run(pool, make([1] * 9)))
    second = run(pool, make([1] * 9))
    assert (second.num_cached, pool.query_tokens) == (0, 0)


def test_a_page_that_fills_during_decode_is_cached() -> None:
    pool = PagePool(16, PAGE)
    sequence = run(pool, make([1, 2, 3]))
    probe = make([1, 2, 3, 4, 5])
    assert pool.lookup(probe) == []
    sequence.tokens.append(4)
    pool.allocate(sequence)
    assert pool.lookup(probe) == []  # planned, not computed
    compute(pool, sequence)
    assert pool.lookup(probe) == sequence.pages


def test_chunks_are_cached_as_they_are_computed() -> None:
    pool = PagePool(16, PAGE)
    sequence = make(list(range(13)))
    pool.allocate(sequence)
    for until, pages in ((3, 0), (5, 1), (12, 3), (13, 3)):
        compute(pool, sequence, until)
        assert pool.lookup(make(list(range(13)))) == sequence.pages[:pages]


def test_identical_pages_filled_at_the_same_time() -> None:
    pool = PagePool(6, PAGE)
    first, second = make([1] * 9), make([1] * 9)
    pool.allocate(first)
    pool.allocate(second)
    compute(pool, first)
    compute(pool, second)
    assert not set(first.pages) & set(second.pages)
    assert pool.lookup(make([1] * 9)) == first.pages[:2]
    cached, private = first.pages[:2], second.pages
    pool.free(second)
    assert pool.lookup(make([1] * 9)) == cached
    pool.free(first)
    taken = run(pool, make([2] * 16))  # the private pages go before the cached ones
    assert set(private) < set(taken.pages)
    assert pool.lookup(make([1] * 9)) == cached


def test_a_shared_page_lives_until_its_last_user_is_gone() -> None:
    pool = PagePool(3, PAGE)
    first = run(pool, make([1] * 5))
    second = run(pool, make([1] * 5))
    shared = second.pages[0]
    assert first.pages[0] == shared
    pool.free(first)
    assert pool.used == 2
    assert not pool.can_allocate(make([2] * 5))
    pool.free(second)
    assert pool.used == 0
    assert pool.lookup(make([1] * 5)) == [shared]


def test_reused_idle_pages_are_not_counted_as_free() -> None:
    pool = PagePool(3, PAGE)
    pool.free(run(pool, make([1] * 8)))  # two idle pages, one free
    assert pool.can_allocate(make([1] * 12))
    assert not pool.can_allocate(make([1] * 13))
    run(pool, make([3] * 4))
    assert pool.lookup(make([1] * 12))
    assert not pool.can_allocate(make([1] * 12))


def test_the_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = PagePool(4, PAGE)
    old, new = [1] * 9, [2] * 5
    pool.free(run(pool, make(old)))
    pool.free(run(pool, make(new)))
    for taken, (left_old, left_new) in enumerate([(2, 1), (1, 1), (0, 1), (0, 0)], start=1):
        copy = PagePool(4, PAGE)
        copy.free(run(copy, make(old)))
        copy.free(run(copy, make(new)))
        run(copy, make([9] * (PAGE * taken)))
        assert (len(copy.lookup(make(old))), len(copy.lookup(make(new)))) == (left_old, left_new)
    pool.free(run(pool, make(old)))  # used again: now the younger
    run(pool, make([9] * 8))
    assert (len(pool.lookup(make(old))), len(pool.lookup(make(new)))) == (2, 0)


def test_a_preempted_sequence_finds_its_pages_again_and_it_counts_as_no_hit() -> None:
    pool = PagePool(8, PAGE)
    sequence = run(pool, make(list(range(9))))
    pages, hits = sequence.pages, pool.hit_tokens
    pool.free(sequence)
    sequence.preemptions += 1
    pool.allocate(sequence)
    assert sequence.pages[:2] == pages[:2]
    assert (sequence.num_computed, sequence.num_cached, pool.hit_tokens) == (8, 0, hits)


def test_forget_drops_one_adapter_only() -> None:
    pool = PagePool(16, PAGE)
    running = run(pool, make([1] * 9, "a"))
    pool.free(run(pool, make([2] * 9, "a")))
    pool.free(run(pool, make([1] * 9, "b")))
    pool.forget("a")
    assert pool.lookup(make([1] * 9, "a")) == pool.lookup(make([2] * 9, "a")) == []
    assert len(pool.lookup(make([1] * 9, "b"))) == 2
    assert pool.used == len(running.pages)
    pool.free(running)
    assert pool.used == 0
    run(pool, make([3] * 16 * PAGE))  # all pages can still be taken
    assert pool.used == 16


def test_random_use_leaks_and_mixes_nothing() -> None:
    """Each page remembers what was last written to it; a reused prefix must hold exactly its own tokens."""
    rng = random.Random(0)
    pool = PagePool(24, PAGE)
    content: dict[int, tuple[str | None, tuple[int, ...]]] = {}
    alive: list[Sequence] = []
    hits = 0
    for _ in range(4000):
        if alive and rng.random() < 0.45:
            pool.free(alive.pop(rng.randrange(len(alive))))
        elif rng.random() < 0.02:
            pool.forget("a")
        else:
            adapter = rng.choice([None, "a", "b"])
            sequence = make([rng.randrange(2) for _ in range(rng.randrange(1, 30))], adapter)
            if not pool.can_allocate(sequence):
                continue
            pool.allocate(sequence)
            alive.append(sequence)
            hits += bool(sequence.num_cached)
            for index, page in enumerate(sequence.pages):
                prefix = adapter, tuple(sequence.tokens[: (index + 1) * PAGE])
                if index * PAGE < sequence.num_computed:
                    assert content[page] == prefix
                content[page] = prefix
            compute(pool, sequence)
        users = [page for sequence in alive for page in sequence.pages]
        assert pool.used == len(set(users))
        assert all(len(set(sequence.pages)) == len(sequence.pages) for sequence in alive)
    assert hits > 100
    while alive:
        pool.free(alive.pop())
    assert pool.used == 0
