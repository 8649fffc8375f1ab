"""Reads function calls out of an answer's text as it comes: words, then calls with their arguments in pieces.

What looks like a call and is none (no JSON, no name, a function that was not offered) is part of the words. A call
that is cut ends where the text does. Calls in a notation of their own (`Family.read`) come whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import NamedTuple

from veneer.server.tool_calls.family import Calls, Family, Offered

_ARGUMENTS = ("arguments", "parameters")


class Words(NamedTuple):
    text: str


class CallStart(NamedTuple):
    name: str


class CallArguments(NamedTuple):
    text: str  # a piece of JSON


Event = Words | CallStart | CallArguments


class Reader:
    """The growing text of one answer."""

    def __init__(self, family: Family, offered: Offered) -> None:
        self._family, self._offered = family, offered
        self._held = ""  # text not yet understood
        self._seen = ""  # text since calls could begin that is words if none does
        self._call: _JsonCall | None = None
        self._in_words = bool(family.begin)  # otherwise a call may begin here
        self._called = False  # since calls could begin

    def push(self, text: str, *, final: bool = False) -> list[Event]:
        """What the next piece of text says; `final`: no more follows."""
        self._held += text
        events: list[Event] = []
        while self._step(events, final):
            pass
        return events

    def _step(self, events: list[Event], final: bool) -> bool:
        """Understand some of the held text; whether to go on."""
        if self._call is not None:
            return self._read_call(self._call, events, final)
        if self._in_words:
            return self._read_words(events, final)
        return self._find_call(events, final)

    def _read_words(self, events: list[Event], final: bool) -> bool:
        begin = self._family.begin
        before, mark, after = self._held.partition(begin) if begin else (self._held, "", "")
        if mark:
            words = before.rstrip()
            self._say(words, events)
            self._held, self._seen = after, before[len(words) :] + mark
            self._in_words = self._called = False
            return True
        keep = 0 if final else len(self._held) - len(_without_beginning(self._held, begin).rstrip())
        said = len(self._held) - keep
        self._say(self._held[:said], events)
        self._held = self._held[said:]
        return False

    def _find_call(self, events: list[Event], final: bool) -> bool:
        """After a mark, after a call, or at the start of a text that may be JSON."""
        family, held = self._family, self._held
        if family.end and held.startswith(family.end):
            self._held, self._seen, self._in_words = held[len(family.end) :], "", True
            return True
        if family.begin and self._called and held.startswith(family.begin):
            self._held, self._called = held[len(family.begin) :], False
            return True
        marks = (*family.skipped, family.end, family.begin if self._called else "")
        if not final and any(mark.startswith(held) and mark != held for mark in marks):
            return False
        if self._skip():
            return True
        if not held and not final:
            return False
        if family.read is not None:
            return self._find_whole(family.read, events, final)
        if held.startswith("{"):
            self._call = _JsonCall(self._offered)
            return True
        if family.takes_names and held and (held[0].isalpha() or held[0] == "_"):
            return self._find_named(events, final)
        self._give_up(held, "", events)
        return False

    def _skip(self) -> bool:
        """Pass over what means nothing."""
        for mark in (" ", "\n", "\t", "\r", *self._family.skipped):
            if self._held.startswith(mark):
                self._held, self._seen = self._held[len(mark) :], self._seen + mark
                return True
        return False

    def _find_whole(
        self, read: Callable[[str, Offered], Calls | None], events: list[Event], final: bool
    ) -> bool:
        """Calls that are known when their last character is."""
        if self._family.end:
            inside, mark, after = self._held.partition(self._family.end)
            may_be = not mark
        else:
            inside, mark, after = self._held, "", ""
            name, bracket, _ = inside.removeprefix("[").lstrip().partition("(")
            named = name in self._offered if bracket else any(each.startswith(name) for each in self._offered)
            may_be = inside.startswith("[") and named
        if may_be and not final:
            return False
        calls = read(inside, self._offered)
        if calls is None:
            self._give_up(inside + mark, after, events)
            return bool(after)
        for name, arguments in calls:
            events += [CallStart(name), CallArguments(arguments)]
        self._called, self._seen, self._held, self._in_words = True, "", after, True
        return True

    def _find_named(self, events: list[Event], final: bool) -> bool:
        """`name{...}` or `name[ARGS]{...}`."""
        name, brace, rest = self._held.partition("{")
        if not brace:
            if final or len(name) > 100:
                self._give_up(self._held, "", events)
            return False
        name = name.removesuffix("[ARGS]").strip()
        if name not in self._offered:
            self._give_up(self._held, "", events)
            return False
        events.append(CallStart(name))
        self._call, self._held = _JsonCall(self._offered, bare=True), brace + rest
        return True

    def _read_call(self, call: _JsonCall, events: list[Event], final: bool) -> bool:
        rest = call.push(self._held, events)
        self._held = "" if rest is None else rest
        if rest is None and not final:
            return False
        self._call = None
        if call.started:
            self._called, self._seen = True, ""
        else:
            self._give_up(call.text, rest or "", events)
        return rest is not None

    def _give_up(self, text: str, rest: str, events: list[Event]) -> None:
        """It is no call: what was held back is words, and calls begin again at the next mark only."""
        self._say(("" if self._called else self._seen) + text, events)
        self._held = rest
        self._seen, self._in_words = "", True

    def _say(self, text: str, events: list[Event]) -> None:
        if text:
            events.append(Words(text))


class _JsonCall:
    """A JSON object with a name and arguments that comes in pieces; `bare`: the arguments alone."""

    def __init__(self, offered: Collection[str], *, bare: bool = False) -> None:
        self._offered, self._bare = offered, bare
        self.started = bare
        self.text = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None
        self._string_from = self._value_from = -1
        self._arguments: tuple[int, int | None] | None = (0, None) if bare else None  # from, to
        self._sent = 0

    def push(self, text: str, events: list[Event]) -> str | None:
        """Take text; what follows the object, None before its end."""
        first = len(self.text)
        self.text += text
        for at in range(first, len(self.text)):
            if self._take(at, self.text[at], events):
                rest, self.text = self.text[at + 1 :], self.text[: at + 1]
                self._send(events, done=True)
                return rest
        self._send(events)
        return None

    def _take(self, at: int, character: str, events: list[Event]) -> bool:
        """Whether the object ends with this character."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                if self._depth == 1 and self._value_from < 0:
                    self._key = _loaded(self.text[self._string_from : at + 1])
            return False
        if character == '"':
            self._in_string, self._string_from = True, at
        if self._depth == 1 and self._key is not None and self._value_from == -1 and character == ":":
            self._value_from = -2  # what follows is the value
        elif self._value_from == -2 and not character.isspace():
            self._value_from = at
            if self._key in _ARGUMENTS and not self._bare:
                self._arguments = at, None
        if self._depth == 1 and character in ",}":
            self._end_value(at, events)
        if character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return self._depth == 0

    def _end_value(self, at: int, events: list[Event]) -> None:
        if self._value_from >= 0 and not self._bare:
            value = self.text[self._value_from : at].rstrip()
            if self._key == "name" and (name := _loaded(value)) in self._offered and not self.started:
                self.started = True
                events.append(CallStart(str(name)))
            elif self._key in _ARGUMENTS and self._arguments is not None:
                self._arguments = self._value_from, self._value_from + len(value)
        self._key, self._value_from = None, -1

    def _send(self, events: list[Event], *, done: bool = False) -> None:
        if not self.started:
            return
        if self._arguments is None:
            piece = "{}" if done else ""
        else:
            start, stop = self._arguments
            piece = self.text[start + self._sent : stop]
            if self.text[start : start + 1] not in ("{", ""):
                piece = _odd_arguments(self.text[start:stop]) if stop is not None and not self._sent else ""
        self._sent += len(piece)
        if piece:
            events.append(CallArguments(piece))


def _odd_arguments(text: str) -> str:
    """Arguments that are no object: JSON in a string, or nothing."""
    value = _loaded_any(text)
    return value if isinstance(value, str) and isinstance(_loaded_any(value), dict) else "{}"


def _loaded(text: str) -> str | None:
    value = _loaded_any(text)
    return value if isinstance(value, str) else None


def _loaded_any(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _without_beginning(text: str, mark: str) -> str:
    """The text without what may be the beginning of a mark at its end."""
    for start in range(max(0, len(text) - len(mark) + 1), len(text)):
        if mark.startswith(text[start:]):
            return text[:start]
    return text
