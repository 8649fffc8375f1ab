"""Chat templates, rendered as transformers' `apply_chat_template` renders them, without transformers.

A template comes with the model and is untrusted: it runs in jinja2's sandbox and sees plain JSON data only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.utils
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from veneer.errors import InvalidRequest
from veneer.server.text import read_json

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where a continued message ends in the rendered text


class ChatTemplate:
    """One compiled template. `source` tells what it knows: `"tool" in template.source`."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """The default template of a model folder; None when it has none."""
        source = read_source(folder)
        return None if source is None else cls(source, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt's text. Raises InvalidRequest when the template refuses the messages."""
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_final_message:
            if not isinstance(chat[-1].get("content"), str):
                raise _cannot_continue("the final message has no text content")
            chat[-1]["content"] += _CONTINUE
        given = {**self._special_tokens, **(variables or {})}
        given |= {"messages": chat, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._template.render(**{"tools": list(tools) or None, "documents": None} | given)
        except jinja2.TemplateError as error:
            message = f"messages: the model's chat template refuses this conversation: {error.message}"
            raise InvalidRequest(message, param="messages") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            message = f"messages: the model's chat template cannot render this conversation: {error}"
            raise InvalidRequest(message, param="messages") from error
        return _cut(text, messages[-1]["content"]) if continue_final_message else text


def _cut(text: str, final: str) -> str:
    """Everything before the mark; if the template trimmed the message's end, so does this."""
    if _CONTINUE.strip() not in text or final.strip() not in text:
        raise _cannot_continue("the model's chat template changes the final message")
    end = text.rindex(_CONTINUE.strip())
    kept = text[:end]
    return kept if text[end : end + len(_CONTINUE)] == _CONTINUE else kept.rstrip()


def _cannot_continue(reason: str) -> InvalidRequest:
    message = f"continue_final_message: {reason}, so it cannot be continued; set it to false."
    return InvalidRequest(message, param="continue_final_message")


def read_source(folder: Path) -> str | None:
    """The chat template of a folder, if it has one. Raises InvalidRequest.

    `chat_template.jinja` wins over tokenizer_config.json, as in transformers; of several, "default".
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{file.name} is not text in UTF-8: {error}.") from error
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        named = {str(entry.get("name")): entry.get("template") for entry in found}
        if "default" not in named:
            names = ", ".join(sorted(named))[:200]
            raise InvalidRequest(
                f"tokenizer_config.json has several chat templates ({names}) and none is named 'default'."
            )
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise InvalidRequest(
            "tokenizer_config.json: chat_template must be text or a list of named templates."
        )
    return found


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_inner"), [], [], body).set_lineno(line)

    def _inner(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict` without its attributes, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _SafeNamespace(jinja2.utils.Namespace):
    """`namespace()` that takes no underscore names: those could replace Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # jinja2's signature: `self` may be a key
        names = dict(*args[1:], **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the underscore name {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _SafeNamespace,
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
