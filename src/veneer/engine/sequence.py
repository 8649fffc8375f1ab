"""One sequence of tokens that the engine extends. Pure state: scheduler.py and pages.py change it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from veneer.adapters.reach import Reach, Span
from veneer.engine.grammars import Matcher
from veneer.engine.lookup import PromptLookup
from veneer.engine.messages import SamplingParams

VIRTUAL = -1  # stands for a virtual token: its keys and values are the adapter's, it has no id


class Change(NamedTuple):
    """From a token of a sequence on its rows use the adapter, its tail, or the base."""

    start: int  # index of the token
    offset: int | None  # from the adapter's slot: 0, 1 for the tail; None for the base


ALWAYS = (Change(0, 0),)
_NOTHING = range(0)


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A prompt and what was generated after it. Compared by identity."""

    id: str
    tokens: list[int]  # virtual ones, the prompt, then the output; tokens are only ever appended
    sampling: SamplingParams
    adapter: str | None = None  # key of adapters/names.py; None = the base
    arrival: float = 0.0  # seconds on the scheduler's clock
    deadline: float | None = None  # seconds on the scheduler's clock
    matcher: Matcher | None = None  # of the grammar that the output follows; the runner moves it
    lookup: PromptLookup | None = None  # makes drafts of the output; the scheduler moves it
    num_prompt_tokens: int = field(init=False)  # virtual ones included

    # Set by the scheduler.
    order: int = -1  # place in the order of arrival, kept through preemptions
    slot: int = -1  # device slot of the adapter; -1 = none held, or the base
    merged: bool = False  # it needs no slot: a merged copy of its adapter computes it (hot.py)
    num_virtual: int | None = None  # virtual tokens; None until the adapter was first on the device
    num_unplaced: int = 0  # virtual tokens that take no position: all that follow stand so many earlier
    changes: tuple[Change, ...] = ALWAYS  # by start; before the first the base alone acts
    num_computed: int = 0  # tokens whose keys and values are in the pages
    num_read: int = (
        0  # tokens that were computed at some time: what is wanted of their hidden states is known
    )
    preemptions: int = 0

    # Set by the engine.
    pooled: npt.NDArray[np.float64] | None = None  # [hidden]: the sum over what was read so far

    # Set by the page pool.
    pages: list[int] = field(default_factory=list)  # block table; empty unless running
    page_keys: list[bytes] = field(default_factory=list)  # of its full pages, as far as known
    num_cached: int = 0  # prompt tokens, virtual ones not counted, that the prefix cache held at first

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    def apply(self, reach: Reach) -> None:
        """Put the adapter's virtual tokens in front and settle on which tokens it acts.

        Comes once, before the sequence has pages or output: what is generated changes nothing. Virtual tokens have
        keys and values as any token has.
        """
        virtual = reach.virtual
        if reach.invocation:
            self.changes = _invoked(self.tokens, reach.invocation, virtual)
        elif reach.span is not None:
            self.changes = _at_ends(reach.span, virtual, virtual + len(self.tokens))
        self.num_virtual = virtual
        self.num_unplaced = 0 if reach.virtual_positions else virtual
        self.tokens[:0] = [VIRTUAL] * virtual
        self.num_prompt_tokens += virtual

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def is_running(self) -> bool:
        return bool(self.pages)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def unread(self) -> range:
        """Tokens of the prompt that are still to be computed for their hidden states.

        Wanted are those before a token whose log probability is wanted, or those that are pooled.
        """
        pooling, first = self.sampling.pooling, max(self.num_virtual or 0, self.num_read)
        if pooling is not None:
            return range(first if pooling == "mean" else self.num_prompt_tokens - 1, self.num_prompt_tokens)
        if self.sampling.prompt_logprobs is None:
            return _NOTHING
        return range(first, self.num_prompt_tokens - 1)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


def _invoked(prompt: list[int], invocation: tuple[int, ...], virtual: int) -> tuple[Change, ...]:
    """From the last place on where the prompt has these tokens."""
    wanted, size = list(invocation), len(invocation)
    starts = range(len(prompt) - size, -1, -1)
    found = (at for at in starts if prompt[at] == wanted[0] and prompt[at : at + size] == wanted)
    first = next(found, None)
    return () if first is None else (Change(virtual + first, 0),)


def _at_ends(span: Span, start: int, stop: int) -> tuple[Change, ...]:
    """At both ends of a prompt that stands at [start, stop)."""
    tail = max(stop - span.last, start)
    head = min(start + span.first, tail)
    steps = (
        (start, head, 0),
        (head, tail, None),
        (tail, stop, 1 if span.has_tail else 0),
        (stop, None, None),
    )
    changes: list[Change] = []
    for at, end, offset in steps:
        if at != end and (changes[-1].offset if changes else None) != offset:
            changes.append(Change(at, offset))
    return tuple(changes)
