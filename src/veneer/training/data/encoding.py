"""Examples to token ids, exactly as serving makes them, with the tokens marked that are learnt. No torch here.

    encoder = Encoder(tokenizer, stops, template="chat", loss_on="assistant")
    encoded = [encoder.row(row) for row in rows]  # or .text(text), .pair(pair); of any length

`tokenizer` is transformers' (the base's, or an adapter's own), `stops` the tokens that end the model's turn, first
the one to add where the template adds none. What is too long is `truncation.py`'s.

Which tokens are learnt (`loss_on`): `answer` the row's answer, the last turn of weight 1; `assistant` all turns of
the assistant of weight 1; `all` every token but those of turns of weight 0. A turn ends with the first stop token
after it. Turns are found by rendering what comes before them, never by looking for a template's words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from veneer.errors import InvalidRequest
from veneer.training.data.formats import Message, Pair, Row, Text

IGNORED = -100  # the label that cross-entropy skips

LossOn = Literal["answer", "assistant", "all"]


class Encoded(NamedTuple):
    """A row as tokens. `answer` is learnt, and the prompt's tokens that `mask` has a 1 for."""

    prompt: list[int]  # what the server would send; empty for plain text
    answer: list[int]  # ends with the token that ends the model's turn
    mask: bytes = b""  # one byte for each of the prompt's tokens; empty: none is learnt
    where: str = ""

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer

    @property
    def labels(self) -> list[int]:
        """The ids that are learnt, elsewhere IGNORED; not shifted. The first is never: nothing predicts it."""
        learnt = zip(self.prompt, self.mask or bytes(len(self.prompt)), strict=True)
        labels = [token if is_learnt else IGNORED for token, is_learnt in learnt] + self.answer
        labels[0] = IGNORED
        return labels

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return sum(label != IGNORED for label in self.labels)


class EncodedPair(NamedTuple):
    """Two answers to one prompt; `chosen.prompt` is `rejected.prompt`."""

    chosen: Encoded
    rejected: Encoded

    @property
    def length(self) -> int:
        """Of the longer one."""
        return max(self.chosen.length, self.rejected.length)


@dataclass(frozen=True)
class Encoder:
    """How rows become tokens: `template` "chat" puts a prompt as a conversation, "none" as it is."""

    tokenizer: Any
    stops: Sequence[int]
    template: Literal["chat", "none"] = "chat"
    loss_on: LossOn = "answer"

    @cached_property
    def header(self) -> int:
        """How many tokens a prompt ends with whatever was asked: they close the question and open the answer."""
        if self.template == "none":
            return 0
        first, second = (
            self._ids(self._render([Message("user", asked)], "a question", opens=True)) for asked in "?!"
        )
        return _shared(first[::-1], second[::-1])

    def row(self, row: Row) -> Encoded:
        """Tokenize a row; the prompt's ids are what the server would send.

        Raises:
            InvalidRequest: there is no chat template, or it does not fit this row.
        """
        prompt, answer, text = self._answered(row.prompt, row.answer, row.where)
        mask = self._mask(row, text, prompt)
        return Encoded(prompt, answer, mask if any(mask) else b"", row.where)

    def pair(self, pair: Pair) -> EncodedPair:
        """Tokenize both answers to the prompt; only they are learnt. Raises as `row`."""
        prompt, chosen, _ = self._answered(pair.prompt, pair.chosen, pair.where)
        _, rejected, _ = self._answered(pair.prompt, pair.rejected, pair.where)
        return EncodedPair(
            Encoded(prompt, chosen, b"", pair.where), Encoded(prompt, rejected, b"", pair.where)
        )

    def text(self, text: Text) -> Encoded:
        """Tokenize a text as a completion's prompt is, with a stop token at its end; all of it is learnt."""
        ids = list(self.tokenizer(text.text, add_special_tokens=True)["input_ids"])
        ended = ids if ids and ids[-1] == self.stops[0] else [*ids, self.stops[0]]
        return Encoded([], ended, b"", text.where)

    def _answered(
        self, turns: Sequence[Message], answer: str, where: str
    ) -> tuple[list[int], list[int], str]:
        """The tokens of prompt and answer, and the prompt's text."""
        special = self.template == "none"
        if special:
            if len(turns) != 1:
                raise InvalidRequest(f"{where}: conversations need `template: chat`")
            text, written = turns[0].content, answer + self.tokenizer.eos_token
        else:
            text = self._render(turns, where, opens=True)
            full = self._render([*turns, Message("assistant", answer)], where)
            if not full.startswith(text):
                raise InvalidRequest(f"{where}: the chat template does not put the answer after the prompt")
            written = full[len(text) :]
        prompt = self._ids(text, special)
        both = self._ids(text + written, special)
        # Where a token would span the border, the answer is cut apart from the prompt, as in serving.
        ids = both[len(prompt) :] if both[: len(prompt)] == prompt else self._ids(written)
        end = self._end(ids)
        return prompt, ids[:end] if end is not None else [*ids, self.stops[0]], text

    def _mask(self, row: Row, text: str, prompt: list[int]) -> bytes:
        """One byte for each token of the prompt, 1 for those that are learnt."""
        mask = bytearray(b"\1" if self.loss_on == "all" else b"\0") * len(prompt)
        for place, turn in enumerate(row.prompt):
            wanted = {"assistant": turn.weight == 1, "answer": False, "all": turn.weight == 0}[self.loss_on]
            if turn.role == "assistant" and wanted:
                start, end = self._span(row, place, text, prompt)
                mask[start:end] = (b"\1" if turn.weight else b"\0") * (end - start)
        return bytes(mask)

    def _span(self, row: Row, place: int, text: str, prompt: list[int]) -> tuple[int, int]:
        """Where the tokens of an earlier turn of the assistant are in the prompt.

        A token that the turn shares with what is before it belongs to the turn.
        """
        if place == 0 and row.prompt[0].weight:
            raise InvalidRequest(
                f"{row.where}: messages[0] is the assistant's, but a model only answers; give it weight 0, or use "
                "`loss_on: answer`"
            )
        before = self._render(row.prompt[:place], row.where, opens=True) if place else ""
        after = self._render(row.prompt[: place + 1], row.where)
        if not (after.startswith(before) and text.startswith(after)):
            raise InvalidRequest(
                f"{row.where}: the chat template writes messages[{place}] otherwise once others follow, so it "
                "cannot be learnt as it is generated; use `loss_on: answer`, or give earlier answers weight 0"
            )
        start, end = (_shared(self._ids(part), prompt) for part in (before, after))
        stop = self._end(prompt[start:end])
        return start, end if stop is None else start + stop

    def _end(self, ids: Sequence[int]) -> int | None:
        """The place after the first stop token."""
        return next((place + 1 for place, token in enumerate(ids) if token in self.stops), None)

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _render(self, turns: Sequence[Message], where: str, *, opens: bool = False) -> str:
        source = str(self.tokenizer.chat_template)
        # As in serving: templates that never mention a role would print it as it is.
        developer = "developer" if "developer" in source else "system"
        chat = [
            {"role": developer if turn.role == "developer" else turn.role, "content": turn.content}
            for turn in turns
        ]
        if not self.tokenizer.chat_template:
            raise InvalidRequest("the base has no chat template; set `template: none` in the recipe")
        try:
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens))
        except Exception as error:  # a template raises whatever it likes
            raise InvalidRequest(f"{where}: the chat template refuses it: {error}") from error


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    return next((place for place in range(length) if first[place] != second[place]), length)
