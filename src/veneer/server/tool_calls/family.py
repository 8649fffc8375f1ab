"""How a family of models writes function calls. A family is data: one file each, chosen in registry.py.

The text of an answer with calls is

    opening  before(name) ARGUMENTS after  (between  before(name) ARGUMENTS after)…  closing

with ARGUMENTS as JSON. reader.py reads it, and what models write nearly like it; grammar.py makes a grammar of it.
Families with another notation bring a function that reads it; a grammar for their calls is the generic form's.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Offered = Mapping[str, dict[str, Any] | None]  # functions by name, with their parameters' schema
Calls = list[tuple[str, str]]  # names, and arguments as JSON


def openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str
    before: Callable[[str], str]  # from a function's name
    after: str
    opening: str = ""
    between: str = "\n"
    closing: str = ""
    begin: str = ""  # where calls begin in a text; "": only at its start, with JSON
    end: str = ""  # what ends a call that `begin` began
    skipped: tuple[str, ...] = ()  # that may stand around calls and mean nothing
    specials: tuple[str, ...] = ()  # of the above, those that may be special tokens
    takes_names: bool = False  # the name may stand before its arguments, which are JSON: name{...}
    # For calls in a notation of their own: reads what stands between `begin` and `end`, or, where these are "", an
    # answer that begins with [ and a function's name. None when it is no call.
    read: Callable[[str, Offered], Calls | None] | None = None
    call_id: Callable[[], str] = openai_id

    def example(self) -> str:
        """One call, for the words of a prompt."""
        return f'{self.opening}{self.before("NAME")}{{"ARGUMENT": VALUE}}{self.after}{self.closing}'


def json_before(name_key: str, arguments_key: str) -> Callable[[str], str]:
    return lambda name: f'{{"{name_key}": "{name}", "{arguments_key}": '
