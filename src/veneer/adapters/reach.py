"""What an adapter puts in front of a prompt and on which tokens it acts, as the scheduler must know it.

Imports no torch.
"""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """An adapter that acts on the ends of the prompt, and on nothing that is generated.

    In a prompt with fewer tokens the two ends overlap, and there the last tokens count as such.
    """

    first: int  # tokens at the beginning of the prompt
    last: int  # tokens at its end
    has_tail: bool  # the last tokens use the adapter's tail (`Program.tail`), not its main primitives


class Reach(NamedTuple):
    """Without any of these an adapter acts on every token."""

    virtual: int = 0  # virtual tokens in front of the prompt, on which nothing acts
    virtual_positions: bool = True  # whether they take positions; if not, the prompt begins at position 0
    invocation: tuple[int, ...] = ()  # it acts from the last place on where the prompt has these tokens
    span: Span | None = None


EVERYWHERE = Reach()
