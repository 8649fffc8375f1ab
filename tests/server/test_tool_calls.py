"""Function calls: read out of text however it is cut, and held by grammars that the reader understands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.text_model import VOCABULARY, write_tokenizer

from veneer.errors import InvalidRequest
from veneer.server.fields import Function
from veneer.server.text import TextTokenizer
from veneer.server.tool_calls.gemma import FUNCTION_GEMMA
from veneer.server.tool_calls.grammar import calls_grammar
from veneer.server.tool_calls.hermes import HERMES
from veneer.server.tool_calls.llama3 import LLAMA3
from veneer.server.tool_calls.message import Message
from veneer.server.tool_calls.mistral import MISTRAL, MISTRAL_NAMED
from veneer.server.tool_calls.plain_json import JSON
from veneer.server.tool_calls.pythonic import PYTHONIC
from veneer.server.tool_calls.qwen3_coder import QWEN3_CODER
from veneer.server.tool_calls.reader import CallArguments, CallStart, Reader, Words
from veneer.server.tool_calls.registry import family_of
from veneer.server.tool_calls.request import grammar_of, tools_of
from veneer.server.wire import ChatRequest, check_body

OFFERED: dict[str, Any] = {
    "get_weather": {"properties": {"city": {"type": "string"}, "days": {"type": "array"}}},
    "add": {"properties": {"a": {"type": ["string", "null"]}, "b": {"type": "object"}}},
}
FAMILIES = (HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, JSON)
WEATHER = '{"city": "Paris", "days": [1, 2]}'


def read(family: Any, text: str, size: int = 1000) -> tuple[str, list[tuple[str, str]]]:
    """Words and calls, from text in pieces of some size."""
    reader = Reader(family, OFFERED)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    events = [event for piece in pieces for event in reader.push(piece)] + reader.push("", final=True)
    words, calls = "", []
    for event in events:
        if isinstance(event, Words):
            words += event.text
        elif isinstance(event, CallStart):
            calls.append([event.name, ""])
        else:
            assert isinstance(event, CallArguments)
            calls[-1][1] += event.text
    return words, [(name, arguments) for name, arguments in calls]


def written(family: Any, *calls: tuple[str, str]) -> str:
    bodies = [family.before(name) + arguments + family.after for name, arguments in calls]
    return str(family.opening + family.between.join(bodies) + family.closing)


ONE = [("get_weather", WEATHER)]
TWO = [*ONE, ("add", '{"a": "}\\"{", "b": {"c": {}}}')]
ADDED = [("add", "{}"), ("add", '{"a": 1}')]
CASES: list[tuple[Any, str, str | None, list[tuple[str, str]] | None]] = [
    *((family, written(family, *calls), "", calls) for family in FAMILIES for calls in (ONE, TWO)),
    *((family, "Just words, {} and all.\n", "Just words, {} and all.\n", []) for family in FAMILIES),
    *((family, f"Look: {written(family, *TWO)}", "Look:", TWO) for family in FAMILIES if family.begin),
    (HERMES, '<tool_call>{"name":"add","arguments":{}}</tool_call>', "", [("add", "{}")]),
    (HERMES, '<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>', "", [("add", '{"a": 1}')]),
    (HERMES, '<tool_call>\n{"name": "add"}\n</tool_call> bye', " bye", [("add", "{}")]),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": [', "", [("add", '{"a": [')]),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, None),
    (HERMES, "a <tool_call>no JSON</tool_call> b", None, None),
    (HERMES, "a < b <tool", None, None),
    (LLAMA3, f'<|python_tag|>{{"name": "get_weather", "parameters": {WEATHER}}}', "", ONE),
    (LLAMA3, '{"name": "add", "parameters": {}} and words', "and words", [("add", "{}")]),
    (LLAMA3, '{"a": {"name": "add"}}', None, None),
    (
        JSON,
        '[{"name": "add", "arguments": {}}, {"name": "add", "arguments": {"a": 1}}]',
        "",
        [("add", "{}"), ("add", '{"a": 1}')],
    ),
    (JSON, "[1, 2]", None, None),
    (JSON, '{"name": "nobody", "arguments": {}}', None, None),
    (MISTRAL, f"[TOOL_CALLS]get_weather{WEATHER}[TOOL_CALLS]add[ARGS]{{}}", "", [*ONE, ("add", "{}")]),
    (MISTRAL, "[TOOL_CALLS]nobody{}", None, None),
    (
        FUNCTION_GEMMA,
        '<start_function_call>call:get_weather{city:<escape>Paris, "x"<escape>,days:[1,-2.5e3],ok:true,n:{k:null}}'
        "<end_function_call><start_function_call>call:add{}<end_function_call>",
        "",
        [
            ("get_weather", '{"city":"Paris, \\"x\\"","days":[1,-2.5e3],"ok":true,"n":{"k":null}}'),
            ("add", "{}"),
        ],
    ),
    (FUNCTION_GEMMA, "<start_function_call>call:add{a:[}<end_function_call>", None, None),
    (
        QWEN3_CODER,
        "Look:\n<tool_call>\n<function=get_weather>\n<parameter=city>\n007\n</parameter>\n<parameter=days>\n"
        "[1, 2]\n</parameter>\n<parameter=more>\nTrue\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n"
        "<function=add>\n<parameter=a>\nnull\n</parameter>\n<parameter=b>\n{x\ny\n</parameter>\n</function>\n</tool_call>",
        "Look:",
        [
            ("get_weather", '{"city": "007", "days": [1, 2], "more": true}'),
            ("add", '{"a": null, "b": "{x\\ny"}'),
        ],
    ),
    (QWEN3_CODER, "<tool_call><function=add></function></tool_call> bye", " bye", [("add", "{}")]),
    *(
        (QWEN3_CODER, f"<tool_call>{text}</tool_call>", None, None)
        for text in (
            "<function=nobody></function>",
            "<function=add>words</function>",
            "<function=add><parameter=c>NaN</parameter></function>",
            '{"name": "add"}',
        )
    ),
    (
        PYTHONIC,
        r'[get_weather(city="Paris (x)]\ud800", days=[1, -2.5]), add(a=null, b={"c": (True, None)})]',
        "",
        [
            ("get_weather", r'{"city": "Paris (x)]\ud800", "days": [1, -2.5]}'),
            ("add", '{"a": null, "b": {"c": [true, null]}}'),
        ],
    ),
    (PYTHONIC, "<|python_start|>[add()]<|python_end|>", "", [("add", "{}")]),
    *(
        (PYTHONIC, text, None, None)
        for text in (
            "[1] is a source (see there)",
            "add(a=1)",
            "[add(1)]",
            "[add(**{})]",
            "[add(a=1e999)]",
            "[add(a=b)]",
            "[add(a=1",
            "[nobody(a=1)]",
            "[add(a=1), nobody()]",
            "[add(a=" + "(" * 500,
        )
    ),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("case", CASES, ids=[f"{case[0].name}-{index}" for index, case in enumerate(CASES)])
def test_calls_are_read_however_the_text_is_cut(case: Any, size: int) -> None:
    """Where words and calls are None, the text is all words."""
    family, text, words, calls = case
    assert read(family, text, size) == ((text, []) if words is None else (words, calls))


def test_arguments_come_in_pieces() -> None:
    reader = Reader(HERMES, OFFERED)
    assert reader.push('Yes. <tool_call>{"name": "add", "arg') == [Words("Yes."), CallStart("add")]
    assert reader.push('uments": {"a": ') == [CallArguments('{"a": ')]
    assert reader.push("1}") == [CallArguments("1}")]
    assert reader.push("}</tool_call>") == []


def test_a_message_has_openais_deltas() -> None:
    body = request({"tools": [tool("add")]})
    message = Message(tools_of(body, "tools <tool_call>", None))
    deltas = message.take('<tool_call>{"name": "add", "arguments": {"a"', final=False)
    deltas += message.take(": 1}}</tool_call>", final=True)
    assert deltas[0] == {"role": "assistant", "content": None}
    call = deltas[1]["tool_calls"][0]
    assert (call["index"], call["type"], call["function"]) == (
        0,
        "function",
        {"name": "add", "arguments": ""},
    )
    assert call["id"].startswith("call_")
    rest = [delta["tool_calls"] for delta in deltas[2:]]
    assert rest == [[{"index": 0, "function": {"arguments": text}}] for text in ('{"a"', ": 1}")]
    whole = message.whole()
    assert whole["content"] is None
    assert whole["tool_calls"] == [
        {"id": call["id"], "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    ]


def test_mistral_takes_ids_of_nine_letters() -> None:
    assert all(len(each) == 9 and each.isalnum() for each in (MISTRAL.call_id() for _ in range(20)))


# ---- which family ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "parser", "family"),
    [
        ("{{ tools }} <tool_call>", None, HERMES),
        ("{{ tools }} [TOOL_CALLS]", None, MISTRAL),
        ("{{ tools }} [TOOL_CALLS] [ARGS]", None, MISTRAL_NAMED),
        ("{{ tools }} <|python_tag|>", None, LLAMA3),
        ('{{ tools }} {"name": ..., "parameters": ...}', None, LLAMA3),
        ("{{ tools }} <start_function_call>", None, FUNCTION_GEMMA),
        ("{{ tools }} <tool_call>\n<function=name>", None, QWEN3_CODER),
        ("{{ tools }} <|python_start|>", None, PYTHONIC),
        ("{{ tools }}", "pythonic", PYTHONIC),
        ("no such word", "pythonic", JSON),
        ("{{ tools }}", None, JSON),
        ("nothing of <tool_call>s", None, JSON),
        ("{{ tools }} <tool_call>", "mistral", MISTRAL),
        ("", "hermes", HERMES),
    ],
)
def test_the_family_is_seen_from_the_template(template: str, parser: str | None, family: Any) -> None:
    assert family_of(template, parser) is family


# ---- grammars ------------------------------------------------------------------------------------


class Tokens:
    """The tiny models' tokenizer, with the specials of a family as special tokens or as plain text."""

    def __init__(self, folder: Any, specials: tuple[str, ...]) -> None:
        file = folder / "tokenizer.json"
        write_tokenizer(file)
        self.text = TextTokenizer.load(folder)
        if specials:
            given = json.loads(file.read_text())
            entry = given["added_tokens"][0]
            given["added_tokens"] += [
                entry | {"id": VOCABULARY + i, "content": text} for i, text in enumerate(specials)
            ]
            file.write_text(json.dumps(given))
            self.text = TextTokenizer.load(folder)
        self.constrained = LLTokenizer(file.read_text(), eos_token=[2])

    def special(self, text: str) -> int | None:
        found = self.text.token_id(text)
        return found if found in self.text.special_ids else None

    def accepts(self, grammar: str, text: str) -> bool:
        matcher = LLMatcher(self.constrained, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return (
            matcher.consume_tokens(self.text.encode(text, add_special_tokens=False))
            and matcher.is_accepting()
        )


FUNCTIONS = [
    Function(
        name="get_weather",
        strict=True,
        parameters={
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/city"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string"}},
        },
    ),
    Function(
        name="add", parameters={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    ),
]


@pytest.mark.parametrize("as_special", [True, False])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_grammar_takes_what_the_family_writes(tmp_path: Any, family: Any, as_special: bool) -> None:
    tokens = Tokens(tmp_path, family.specials if as_special else ())
    valid, wrong, loose = ("get_weather", WEATHER), ("get_weather", '{"city": 1}'), ("add", '{"b": 1}')

    def accepts(text: str, **how: Any) -> bool:
        options = {"must": True, "several": True} | how
        return tokens.accepts(calls_grammar(family, FUNCTIONS, tokens.special, **options), text)

    one, two = written(family, valid), written(family, valid, ("add", '{"a": 7}'))
    assert read(family, two) == ("", [valid, ("add", '{"a": 7}')])
    assert accepts(one)
    assert accepts(two)
    assert not accepts(two, several=False)
    assert not accepts("words")
    assert not accepts(written(family, wrong))
    assert not accepts(written(family, loose))
    for text in (one, two, written(family, loose), "Only words.", ""):
        assert accepts(text, must=False), text
    assert not accepts(written(family, wrong), must=False)
    assert not accepts(written(family, ("nobody", "{}")), must=False)
    if family.begin:
        assert accepts(f"Words. {one}", must=False)
        assert not accepts(f"Words. {written(family, wrong)}", must=False)
    answer = '%json {"const": {"x": 1}}'
    if not family.begin:
        with pytest.raises(InvalidRequest, match="without a mark"):
            accepts("", must=False, answer=answer)
        return
    assert accepts('{"x": 1}', must=False, answer=answer)
    assert accepts(one, must=False, answer=answer)
    assert not accepts("Only words.", must=False, answer=answer)


def tool(name: str, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | function}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def request(fields: dict[str, Any]) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return check_body(body, ChatRequest, pytest.fail)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return Tokens(tmp_path_factory.mktemp("tokens"), ()).text


@pytest.mark.parametrize(
    ("fields", "held"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "none"}, None),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": tool("add")}, True),
        ({"tool_choice": allowed("auto", "add")}, False),
        ({"tool_choice": allowed("required", "add")}, True),
        ({"parallel_tool_calls": False}, True),
        ({"tools": [tool("add", strict=True)]}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "text"}}, False),
        ({"tools": []}, None),
    ],
)
def test_when_a_grammar_holds_the_calls(tokenizer: TextTokenizer, fields: Any, held: bool | None) -> None:
    """None: there are no tools."""
    body = request({"tools": [tool("add"), tool("other")]} | fields)
    tools = tools_of(body, "tools <tool_call>", None)
    assert (tools is None) == (held is None)
    assert (grammar_of(body, tools, tokenizer) is not None) == bool(held)


def test_some_of_the_tools_may_be_called(tokenizer: TextTokenizer) -> None:
    body = request({"tools": [tool("add"), tool("other")], "tool_choice": allowed("required", "add")})
    tools = tools_of(body, "tools <tool_call>", None)
    assert tools is not None
    assert [each["function"]["name"] for each in tools.described] == ["add", "other"]
    assert [each.name for each in tools.functions] == ["add"]
    grammar = grammar_of(body, tools, tokenizer)
    assert grammar is not None
    assert "add" in grammar.text
    assert "other" not in grammar.text


def test_gemma_is_held_to_the_generic_form() -> None:
    tools = tools_of(request({"tools": [tool("add")], "tool_choice": "required"}), "", "functiongemma")
    assert tools is not None
    assert tools.family is JSON


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [tool("f"), tool("f")]}, "tools"),
        ({"tools": [tool("f", parameters={"type": "array"})]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": tool("g")}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": allowed("auto", "f", "g")}, "tool_choice"),
        ({"tools": [tool("f")], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": [tool("f", strict=True, parameters={"not": {}})]}, "tools.f.parameters"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"whitespace_pattern": "a"}}, "structured_outputs.whitespace_pattern"),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
    ],
)
def test_what_cannot_be_asked_is_named(tokenizer: TextTokenizer, fields: Any, param: str) -> None:
    def ask() -> None:
        body = request(fields)
        grammar_of(body, tools_of(body, "", None), tokenizer)

    with pytest.raises(InvalidRequest) as refused:
        ask()
    assert refused.value.param == param
