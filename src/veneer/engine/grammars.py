"""Grammars that outputs must follow: compiled beside the steps, one matcher for each sequence, one mask a step.

The work is llguidance's: a lexer of lazy automata and an Earley parser over the bytes of tokens. A grammar is
compiled in a thread, with its first mask, while its sequence waits; nothing here runs a model, and nothing imports
torch. What a grammar may cost is bounded by `_LIMITS`, in which a unit of work takes about the same time whatever
the grammar is; one that goes beyond them is an error of its request, at the start or at the token where it happens.

Which tokens: a mask covers the ids of the tokenizer that writes the text. Ids it has no token for (padding, tokens
that an adapter adds to the vocabulary without a tokenizer that knows them) and special tokens are never allowed;
the end tokens are, exactly where the text may end.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from veneer.engine.messages import Constraint
from veneer.errors import InvalidRequest, VeneerError

logger = logging.getLogger(__name__)

GRAMMAR_LIMIT = 256 << 10  # characters of a grammar; a schema's are part of them
_KEPT_CHARACTERS = 4 << 20  # of the grammars that are kept compiled
_KEPT = 256  # grammars
_KEPT_TOKENIZERS = 8
_THREADS = 2  # that compile
_LIMITS = LLParserLimits(  # some 10 ms a mask at worst, and 1 s to compile
    max_items_in_row=2000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)

Words = NDArray[np.int32]  # one bit for each token id, the lowest first


class Compiled(NamedTuple):
    matcher: LLMatcher  # at the start of a text; never moved
    words: int  # of its masks
    ends: frozenset[int]  # tokens


class Matcher:
    """Where the output of one sequence stands in its grammar."""

    def __init__(self, param: str, compiling: Future[Compiled]) -> None:
        self._param = param
        self._compiling = compiling
        self._state: LLMatcher | None = None
        self._taken = 0  # tokens of the output
        self._ends = frozenset[int]()
        self.words = 0

    @property
    def is_ready(self) -> bool:
        """Whether the grammar is compiled, or found wrong."""
        return self._compiling.done()

    @property
    def error(self) -> InvalidRequest | None:
        """Why the sequence cannot go on, as far as known."""
        if not self.is_ready:
            return None
        if failed := self._compiling.exception():
            if isinstance(failed, VeneerError):
                return self._named(failed.message)
            logger.error("compiling a grammar failed", exc_info=failed)
            return self._named("the grammar cannot be compiled; simplify it")
        if self._state is not None and self._state.is_error():
            return self._named(_reason(self._state))
        return None

    def advance(self, output: Sequence[int]) -> LLMatcher | None:
        """The state after all the tokens generated so far; None after an end token, and when there is an error."""
        if self._state is None:
            if self.error is not None:
                return None
            compiled, self.words, self._ends = self._compiling.result()
            self._state = compiled.deep_copy()
        new, self._taken = output[self._taken :], max(self._taken, len(output))
        if self._ends.intersection(new):  # nothing follows, and some states do not take them
            return None
        return self._state if self._state.consume_tokens(list(new)) else None

    def follow(self, output: Sequence[int], draft: Sequence[int]) -> Iterator[LLMatcher]:
        """The states after the output and after each token of the draft, up to the first that it does not allow."""
        state = self.advance(output)
        if state is not None:
            yield state
            for token in draft[: state.validate_tokens(list(draft))]:
                if token in self._ends:
                    return
                state = state.deep_copy()
                state.consume_token(token)
                yield state

    def _named(self, reason: str) -> InvalidRequest:
        return InvalidRequest(f"{self._param}: {reason}.", param=self._param, code="invalid_grammar")


class Grammars:
    """What is compiled, and the threads that do it. `matcher` and `masks` are called from one thread."""

    def __init__(
        self, model: Path, adapter: Callable[[str], Path], end_tokens: Sequence[int], wake: Callable[[], None]
    ) -> None:
        """model: the base's folder; adapter: from a digest to the folder of its files. Both have tokenizer.json.

        `wake` is called from a thread whenever a grammar is compiled or found wrong.
        """
        self._model, self._adapter, self._ends, self._wake = model, adapter, tuple(end_tokens), wake
        self._compiled: OrderedDict[Constraint, Future[Compiled]] = OrderedDict()
        self._tokenizers: OrderedDict[tuple[str | None, tuple[int, ...]], LLTokenizer] = OrderedDict()
        self._loading = Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "grammar")
        self._filling = ThreadPoolExecutor(1, "grammar-mask")
        self._executor: LLExecutor | None = None

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._filling.shutdown()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the start of its text, ready at once or when its grammar is compiled.

        Raises InvalidRequest for a grammar that is too long.
        """
        if len(constraint.grammar) > GRAMMAR_LIMIT:
            raise InvalidRequest(
                f"{constraint.param}: it makes a grammar of {len(constraint.grammar):,} characters and at most "
                f"{GRAMMAR_LIMIT:,} are taken; make it smaller.",
                param=constraint.param,
                code="invalid_grammar",
            )
        compiled = self._compiled.get(constraint)
        if compiled is None:
            compiled = self._compiled[constraint] = self._threads.submit(self._compile, constraint)
            compiled.add_done_callback(lambda _: self._wake())
            while len(self._compiled) > 1 and self._is_full():
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(constraint)
        return Matcher(constraint.param, compiled)

    def masks(
        self,
        matchers: Mapping[str, Matcher],
        outputs: Callable[[], Sequence[Sequence[int]]],
        drafts: Sequence[Sequence[int]],
    ) -> Future[dict[str, list[Words | None]]]:
        """The tokens that each matcher, by its name, allows after its output; worked out beside the caller.

        First right after the output, then after each token of its draft, up to the last that it allows.
        `outputs` is called in the other thread, and may wait. None for a matcher that does not go on.
        """
        names, states = list(matchers), list(matchers.values())
        return self._filling.submit(
            lambda: dict(zip(names, self._fill(states, outputs(), drafts), strict=True))
        )

    def _is_full(self) -> bool:
        taken = sum(len(constraint.grammar) for constraint in self._compiled)
        return len(self._compiled) > _KEPT or taken > _KEPT_CHARACTERS

    def _fill(
        self,
        matchers: Sequence[Matcher],
        outputs: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
    ) -> list[list[Words | None]]:
        self._executor = self._executor or LLExecutor()
        states = [
            (index, place, state)
            for index, (matcher, output, draft) in enumerate(zip(matchers, outputs, drafts, strict=True))
            for place, state in enumerate(matcher.follow(output, draft))
        ]
        found: list[list[Words | None]] = [[] for _ in matchers]
        for words in {matchers[index].words for index, *_ in states}:  # of masks of one tokenizer
            rows = [each for each in states if matchers[each[0]].words == words]
            masks = np.zeros((len(rows), words), np.int32)
            places = [(state, row) for row, (*_, state) in enumerate(rows)]
            self._executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, words * 4, len(rows))
            for (index, place, state), mask in zip(rows, masks, strict=True):
                if not state.is_error() and place == len(found[index]):
                    found[index].append(mask)
        return [masks or [None] for masks in found]

    def _compile(self, constraint: Constraint) -> Compiled:
        """Raises InvalidRequest for a grammar that is wrong, too costly or that no text follows."""
        tokenizer = self._tokenizer(constraint)
        matcher = LLMatcher(tokenizer, constraint.grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(_reason(matcher))
        return Compiled(matcher, -(-tokenizer.vocab_size // 32), frozenset(tokenizer.eos_tokens))

    def _tokenizer(self, constraint: Constraint) -> LLTokenizer:
        ends = tuple(dict.fromkeys([*self._ends, *constraint.end_tokens]))
        key = constraint.tokenizer, ends
        with self._loading:
            if key not in self._tokenizers:
                folder = self._model if key[0] is None else self._adapter(key[0])
                file = folder / "tokenizer.json"
                if not file.is_file():
                    raise InvalidRequest(
                        "the base has no tokenizer.json, without which no text can be constrained"
                    )
                try:
                    text = file.read_text(encoding="utf-8")
                    self._tokenizers[key] = LLTokenizer(text, eos_token=list(ends))
                except ValueError as error:
                    raise InvalidRequest(f"the model's tokenizer cannot be constrained: {error}") from error
            self._tokenizers.move_to_end(key)
            while len(self._tokenizers) > _KEPT_TOKENIZERS:
                self._tokenizers.popitem(last=False)
            return self._tokenizers[key]


def _reason(matcher: LLMatcher) -> str:
    """Its error, without the grammar, which is ours, and positions in it."""
    message = re.split(r"\n +\d+ \| |\n?<(?:state|non-verbose)", matcher.get_error())[0]
    message = re.sub(r"^(?:at )?\d+\(\d+\): ", "", message)
    if message.startswith("NoExtension"):
        return "no text can follow this grammar"
    return message.removeprefix("failed to compile JSON schema: ").strip().rstrip(".")[:500]
