"""One sequence of tokens that the engine extends. Pure state: scheduler.py and pages.py change it."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.engine.messages import SamplingParams

NEVER = 1 << 62  # a position that no sequence reaches
VIRTUAL = -1  # stands for a virtual token: its keys and values are the adapter's, it has no id


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A prompt and what was generated after it. Compared by identity."""

    id: str
    tokens: list[int]  # virtual ones, the prompt, then the output; tokens are only ever appended
    sampling: SamplingParams
    adapter: str | None = None  # key of adapters/names.py; None = the base
    arrival: float = 0.0  # seconds on the scheduler's clock
    deadline: float | None = None  # seconds on the scheduler's clock
    num_prompt_tokens: int = field(init=False)  # virtual ones included

    # Set by the scheduler.
    order: int = -1  # place in the order of arrival, kept through preemptions
    slot: int = -1  # device slot of the adapter; -1 = none held, or the base
    num_virtual: int | None = None  # virtual tokens; None until the adapter was first on the device
    active_from: int = 0  # the position of the first token on which the adapter acts, or NEVER
    num_computed: int = 0  # tokens whose keys and values are in the pages
    preemptions: int = 0

    # Set by the page pool.
    pages: list[int] = field(default_factory=list)  # block table; empty unless running
    page_keys: list[bytes] = field(default_factory=list)  # of its full pages, as far as known
    num_cached: int = 0  # prompt tokens, virtual ones not counted, that the prefix cache held at first

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    def lead_with(self, num_virtual: int) -> None:
        """Put virtual tokens in front: they have positions and keys and values as any token has.

        Comes once, before the sequence has pages.
        """
        self.num_virtual = num_virtual
        self.tokens[:0] = [VIRTUAL] * num_virtual
        self.num_prompt_tokens += num_virtual

    def invoke_by(self, invocation: tuple[int, ...]) -> None:
        """Let the adapter act from the last place on where the prompt has these tokens.

        Comes once, before the sequence has pages or output; what is generated changes nothing.
        """
        prompt, wanted, size = self.tokens, list(invocation), len(invocation)
        starts = range(len(prompt) - size, -1, -1)
        found = (at for at in starts if prompt[at] == wanted[0] and prompt[at : at + size] == wanted)
        self.active_from = next(found, NEVER)

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
