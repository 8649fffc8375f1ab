"""Shows that an adapter changes the output: the base and the adapter continue one fixed prompt.

The probe runs as ordinary sequences of the step loop, so an upload is accepted only after its adapter has
been loaded to the device and served once.
"""

from __future__ import annotations

import math

from veneer.adapters.program import EMBEDDING, Program
from veneer.engine.messages import Generate, SamplingParams, SequenceOutput, TokenLogprobs, WireError
from veneer.errors import AdapterRefused, from_wire

PROBE_LENGTH = 8  # tokens
PROBE_TOP = 20  # log probabilities compared
_PREFIX = "probe/"


def why_ineffective(program: Program, effect: float) -> str | None:
    """Why an adapter with this `effect` on the probe's prompt (`take`) does nothing; None when it acts."""
    if program.is_identity:
        return "the adapter changes nothing: its numbers cannot move any output, as before training"
    if effect == 0:
        return "the adapter changes nothing: with it a fixed prompt is answered exactly as by the base"
    return None


def ending_of(program: Program) -> tuple[int, ...]:
    """With what a prompt must end so that the adapter acts on it: its invocation, or one of its tokens."""
    embedding = program.sites.get(EMBEDDING)
    if program.invocation or embedding is None or embedding.tokens is None:
        return program.invocation
    return (int(embedding.tokens.ids[0]),)


class EffectProbe:
    """Probes under way, by the call that asked for them."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        # Spread over the vocabulary, the same for every adapter of this base.
        self._prompt = [(i + 1) * 7919 % vocabulary for i in range(PROBE_LENGTH)]
        self._results: dict[str, dict[str, TokenLogprobs]] = {}  # call -> "base" | "adapter" -> result
        self._errors: dict[str, WireError] = {}

    def start(self, call: str) -> bool:
        """True the first time it is asked for this call."""
        if call in self._results:
            return False
        self._results[call] = {}
        return True

    def requests(self, call: str, digest: str, ending: tuple[int, ...] = ()) -> list[Generate]:
        """The two sequences to run; `ending` is the end of their prompt, where the base may lack a token."""
        known = tuple(token if token < self.vocabulary else 0 for token in ending)
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=PROBE_TOP, ignore_eos=True)
        return [
            Generate(
                id=f"{_PREFIX}{call}/{who}",
                prompt=[*self._prompt, *end],
                sampling=params,
                adapter=adapter,
            )
            for who, adapter, end in (("base", None, known), ("adapter", digest, ending))
        ]

    def owns(self, identifier: str) -> bool:
        return identifier.startswith(_PREFIX)

    def observe(self, items: list[SequenceOutput]) -> None:
        """Take the probes' own outputs out of a step's outputs."""
        for item in items:
            if not self.owns(item.id):
                continue
            call, _, who = item.id.removeprefix(_PREFIX).rpartition("/")
            if call not in self._results:
                continue
            if item.error is not None:
                self._errors[call] = item.error
            else:
                self._results[call][who] = item.logprobs[0]

    def done(self, call: str) -> bool:
        return call in self._errors or len(self._results[call]) == 2

    def take(self, call: str) -> float:
        """The largest change of a log probability among the tokens both rank highest.

        Raises its error, and `AdapterRefused` when the adapter's log probabilities are no numbers.
        """
        result, error = self._results.pop(call), self._errors.pop(call, None)
        if error is not None:
            raise from_wire(error.status, error.code, error.message, error.param)
        if any(map(math.isnan, result["adapter"].top_logprobs)):
            raise AdapterRefused(
                "with the adapter a fixed prompt is answered with NaN: its finite values overflow in the base's "
                "layers; they are too large."
            )
        base, adapter = (
            dict(zip(result[who].top_ids, result[who].top_logprobs, strict=True))
            for who in ("base", "adapter")
        )
        shared = base.keys() & adapter.keys()
        # With no common token among the 20 likeliest the outputs have nothing in common.
        return max((abs(base[i] - adapter[i]) for i in shared), default=float("inf"))

    def discard(self, call: str) -> None:
        self._results.pop(call, None)
        self._errors.pop(call, None)
