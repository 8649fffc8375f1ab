"""Which fields are honoured, refused by name, or accepted and counted."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from veneer.errors import InvalidRequest
from veneer.server.wire import (
    NOT_HONOURED,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    anything,
    check_body,
    parse_object,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "x"}

# Every property of CreateChatCompletionRequest and CreateCompletionRequest in OpenAI's specification.
OPENAI_CHAT = re.findall(
    r"\w+",
    """messages model metadata top_logprobs temperature top_p user safety_identifier prompt_cache_key
    prompt_cache_retention prompt_cache_options service_tier modalities verbosity reasoning_effort
    max_completion_tokens frequency_penalty presence_penalty web_search_options response_format audio store
    moderation stream stop logit_bias logprobs max_tokens n prediction seed stream_options tools tool_choice
    parallel_tool_calls function_call functions""",
)
OPENAI_COMPLETION = re.findall(
    r"\w+",
    """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
    stream stream_options suffix temperature top_p user""",
)


def parse(
    body: dict[str, Any], kind: type[GenerationRequest] = ChatRequest
) -> tuple[GenerationRequest, list[str]]:
    unknown: list[str] = []
    return check_body(parse_object(json.dumps(body).encode()), kind, unknown.append), unknown


@pytest.mark.parametrize(
    ("kind", "fields"), [(ChatRequest, OPENAI_CHAT), (CompletionRequest, OPENAI_COMPLETION)]
)
def test_every_field_of_openai_is_known(kind: type[GenerationRequest], fields: list[str]) -> None:
    assert [name for name in fields if name not in kind.model_fields and name not in NOT_HONOURED] == []


def test_no_field_is_both_honoured_and_refused() -> None:
    honoured = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert honoured & NOT_HONOURED.keys() == set()


@pytest.mark.parametrize(
    "name", [name for name, rule in NOT_HONOURED.items() if rule.harmless is not anything]
)
@pytest.mark.parametrize(("kind", "base"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)])
def test_what_is_not_honoured_is_refused_by_name(
    name: str, kind: type[GenerationRequest], base: dict[str, Any]
) -> None:
    value = {"asks": "something"}
    fields: dict[str, Any] = {name: value}
    if "." in name:
        outer, inner = name.split(".")
        fields = {"stream": True, outer: {inner: value}}
    with pytest.raises(InvalidRequest) as refused:
        parse(base | fields, kind)
    assert refused.value.param == name
    assert refused.value.code == "unsupported_parameter"
    assert name in refused.value.message
    assert "something" in refused.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("store", False),
        ("modalities", ["text"]),
        ("response_format", {"type": "text"}),
        ("tools", []),
        ("tool_choice", "none"),
        ("parallel_tool_calls", True),
        ("best_of", 1),
        ("suffix", ""),
        ("use_beam_search", False),
        ("length_penalty", 1.0),
        ("priority", 0),
        ("echo", False),
    ],
)
def test_values_that_ask_for_nothing_are_accepted(name: str, value: Any) -> None:
    assert parse(CHAT | {name: value})[1] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", True),
        ("store", 0),
        ("best_of", True),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("guided_json", {"type": "object"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("use_beam_search", True),
        ("priority", 1),
    ],
)
def test_values_that_ask_for_something_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(CHAT | {name: value})
    assert refused.value.param == name


def test_every_field_may_be_null() -> None:
    fields = [*ChatRequest.model_fields, *NOT_HONOURED, "some_new_field"]
    body, unknown = parse(dict.fromkeys(fields) | CHAT)
    assert unknown == []
    assert body == ChatRequest.model_validate(CHAT)
    nulls = {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}}
    assert parse(CHAT | nulls)[1] == []


def test_other_fields_are_reported_each_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert parse(CHAT | {"a_field_nobody_knows": 1})[1] == ["a_field_nobody_knows"]
    assert sum("a_field_nobody_knows" in record.message for record in caplog.records) == 1


def test_values_keep_jsons_types() -> None:
    for fields in ({"n": "1"}, {"n": 1.0}, {"n": True}, {"stream": 1}, {"top_p": "1"}, {"stop": 5}):
        with pytest.raises(InvalidRequest) as refused:
            parse(CHAT | fields)
        assert refused.value.param == next(iter(fields))
    assert parse(CHAT | {"temperature": 1})[0].temperature == 1.0


def test_a_message_names_field_value_and_rule() -> None:
    with pytest.raises(InvalidRequest, match=r"n: .*less than or equal to 128 \(got 500\)"):
        parse(CHAT | {"n": 500})
    with pytest.raises(InvalidRequest, match="prompt must be text, a list"):
        parse(COMPLETION | {"prompt": [1, "x"]}, CompletionRequest)
    with pytest.raises(InvalidRequest) as refused:
        parse(CHAT | {"messages": "x" * 1_000_000})
    assert len(refused.value.message) < 500
