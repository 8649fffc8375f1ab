"""One sequence of tokens that the engine extends. Pure state: scheduler.py and pages.py change it."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.engine.messages import SamplingParams


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A prompt and what was generated after it. Compared by identity."""

    id: str
    tokens: list[int]  # the prompt, then the output; tokens are only ever appended
    sampling: SamplingParams
    adapter: str | None = None  # content digest; None = the base
    arrival: float = 0.0  # seconds on the scheduler's clock
    deadline: float | None = None  # seconds on the scheduler's clock
    num_prompt_tokens: int = field(init=False)

    # Set by the scheduler.
    order: int = -1  # place in the order of arrival, kept through preemptions
    slot: int = -1  # device slot of the adapter; -1 = none held, or the base
    num_computed: int = 0  # tokens whose keys and values are in the pages
    preemptions: int = 0

    # Set by the page pool.
    pages: list[int] = field(default_factory=list)  # block table; empty unless running
    page_keys: list[bytes] = field(default_factory=list)  # of its full pages, as far as known
    num_cached: int = 0  # prompt tokens that the prefix cache held at the first admission

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    @property
    def is_running(self) -> bool:
        return bool(self.pages)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens
