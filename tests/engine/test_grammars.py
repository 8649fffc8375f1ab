"""Constrained output: a random model is the fuzzer, and jsonschema, re and plain engines say what is right."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tests.engine.adapters import save_lora
from tests.text_model import END, VOCABULARY, write_tokenizer
from tokenizers import Tokenizer

from veneer.engine import grammars
from veneer.engine.grammar_text import (
    choice_body,
    given_grammar,
    json_body,
    lark,
    regex_body,
    text_body,
)
from veneer.engine.messages import Cancel, Constraint, SamplingParams
from veneer.engine.sampling import SamplingRow, sample
from veneer.errors import InvalidRequest

PROMPT = [5, 9, 40, 77]


@pytest.fixture(scope="module")
def model(text_model: Path) -> Path:
    return text_model


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture
def engine(make_engine: Callable[..., Any], model: Path) -> Any:
    return make_engine(model)


def submit(engine: Any, grammar: str, **sampling: Any) -> str:
    given = {"max_tokens": 200, "ignore_eos": False, "temperature": 1.0} | sampling
    constraint = Constraint(grammar=grammar, param="here")
    return str(engine.submit(PROMPT, constraint=constraint, **given))


def reason(engine: Any, identifier: str) -> str | None:
    return engine.outputs[identifier][-1].finish_reason  # type: ignore[no-any-return]


def error(engine: Any, identifier: str) -> Any:
    engine.run(identifier)
    return engine.outputs[identifier][-1].error


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return str(tokenizer.decode([token for token in tokens if token != END], skip_special_tokens=False))


OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}
SCHEMAS: dict[str, Any] = {
    "object": {
        **OBJECT,
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
    "optional": {
        **OBJECT,
        "properties": {key: {"type": "boolean"} for key in "abc"},
        "required": ["b"],
    },
    "open": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "typed map": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "some of them": {**OBJECT, "properties": {key: {"const": key} for key in "abcd"}, "required": ["a", "b"]},
    "types": {"type": ["string", "null", "boolean"]},
    "enum": {"enum": ["red", 7, None, {"a": [1, 2.5]}, '\n"quoted"']},
    "const": {"const": {"deep": [{"x": "y"}, []]}},
    "string bounds": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-f]{2}-[0-9]+$"},
    "loose pattern": {"type": "string", "pattern": "ab|cd", "maxLength": 8},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "integer bounds": {"type": "integer", "minimum": -12, "exclusiveMaximum": 31},
    "number bounds": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"const": "x"}],
        "items": False,
        "minItems": 2,
    },
    "any of": {
        "anyOf": [{"type": "integer"}, {**OBJECT, "properties": {"k": {"const": 1}}, "required": ["k"]}]
    },
    "one of": {
        "oneOf": [
            {**OBJECT, "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in ("a", "b")
        ]
    },
    "all of": {
        "allOf": [
            {"type": "string", "minLength": 2},
            {"type": "string", "maxLength": 4, "pattern": "^[a-z]*$"},
        ]
    },
    "references": {
        "$defs": {"item": {**OBJECT, "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
        "type": "array",
        "items": {"$ref": "#/$defs/item"},
        "maxItems": 3,
    },
    "recursive": {
        "$defs": {
            "tree": {
                **OBJECT,
                "properties": {
                    "leaf": {"type": "boolean"},
                    "below": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["leaf", "below"],
            }
        },
        "$ref": "#/$defs/tree",
    },
    "sibling": {"$defs": {"s": {"type": "string"}}, "$ref": "#/$defs/s", "minLength": 1, "maxLength": 3},
    "odd keys": {
        **OBJECT,
        "properties": {'"\\ \n/#~': {"const": 1}, "": {"const": 2}},
        "required": ["", '"\\ \n/#~'],
    },
    "anything": True,
}


def test_all_that_is_generated_is_valid(engine: Any, tokenizer: Tokenizer) -> None:
    """Every schema, several seeds and temperatures, all in one batch; a tenth at least end by themselves."""
    asked = {}
    for name, schema in SCHEMAS.items():
        for seed in range(8):
            compact = seed % 2 == 1
            temperature = (0.3, 1.0, 2.0)[seed % 3]
            grammar = lark(json_body(schema, "here", compact=compact))
            asked[submit(engine, grammar, seed=seed, temperature=temperature)] = name
    engine.run(*asked)
    ended: dict[str, int] = dict.fromkeys(SCHEMAS, 0)
    for identifier, name in asked.items():
        assert engine.outputs[identifier][-1].error is None, (name, engine.outputs[identifier][-1].error)
        if reason(engine, identifier) == "stop":
            ended[name] += 1
            value = json.loads(text_of(tokenizer, engine.tokens(identifier)), strict=False)
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=checker).validate(value)
    never = [name for name, count in ended.items() if not count]
    assert len(never) <= 6, never  # of those that may go on for long


@pytest.mark.parametrize(
    "regex", ["[ab]+c", "(foo|ba[rz])/\\d{3}", 'a"b', "x{2,4}\\n", "[^a-z]{3}", "(ab)*?", "\\/+"]
)
def test_text_matches_its_regular_expression(engine: Any, tokenizer: Tokenizer, regex: str) -> None:
    asked = [submit(engine, lark(regex_body(regex)), seed=seed, max_tokens=40) for seed in range(6)]
    for tokens in engine.run(*asked):
        if END in tokens:
            assert re.fullmatch(regex, text_of(tokenizer, tokens))
    assert any(reason(engine, each) == "stop" for each in asked)


def test_text_is_one_of_the_choices(engine: Any, tokenizer: Tokenizer) -> None:
    choices = ["yes", "no", "yes, but", 'a "quoted" one', "back\\slash", "two\nlines", "1", ""]
    asked = [submit(engine, lark(choice_body(choices)), seed=seed, temperature=2.0) for seed in range(40)]
    found = {text_of(tokenizer, tokens) for tokens in engine.run(*asked)}
    assert found <= set(choices)
    assert len(found) > 3


@pytest.mark.parametrize(
    "grammar",
    ['start: "(" start ")" | /[0-9]/', 'root ::= "(" root ")" | [0-9]'],
    ids=["lark", "gbnf"],
)
def test_text_follows_a_grammar(engine: Any, tokenizer: Tokenizer, grammar: str) -> None:
    asked = [submit(engine, given_grammar(grammar, "here"), seed=seed) for seed in range(6)]
    for tokens in engine.run(*asked):
        text = text_of(tokenizer, tokens)
        depth = text.count("(")
        if END in tokens:
            assert re.fullmatch(rf"\({{{depth}}}\d\){{{depth}}}", text)
    assert any(reason(engine, each) == "stop" for each in asked)


def test_rows_without_a_constraint_are_untouched() -> None:
    """To the bit, in a batch with constrained ones of any width of mask."""
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    ways: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}, {"min_p": 0.05}]
    params = [SamplingParams(max_tokens=9, logprobs=4, seed=i, **ways[i % 3]) for i in range(6)]
    rows = [SamplingRow(each, [1, 2], 2, 0) for each in params]
    masks = [
        np.array([1 << 7, 0, 0, 1 << 2], np.int32),
        np.array([0, 1 << 5], np.int32),
        np.full(9, -1, np.int32),
    ]
    mixed = [*rows[:3], *(replace(row, allowed=mask) for row, mask in zip(rows[3:], masks, strict=True))]
    before = logits.clone()
    plain, found = sample(logits, rows).results(), sample(logits, mixed).results()
    assert found[:3] == plain[:3]
    assert found[3][0] in (7, 98)
    assert found[4][0] == 37  # bits that the mask has not are tokens that are not allowed
    assert found[5] == plain[5]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lookahead_changes_no_token(make_engine: Callable[..., Any], model: Path, temperature: float) -> None:
    """Nor do preemption, chunks and the prefix cache: the same requests, one engine with each."""
    ways: list[dict[str, Any]] = [
        {"lookahead": False},
        {"lookahead": True},
        {"lookahead": True, "kv_cache_memory": 60_000},  # too little for all: some are preempted
        {"max_num_batched_tokens": 8, "prefix_caching": False},
    ]
    found = []
    for way in ways:
        engine = make_engine(model, **way)
        asked = [
            submit(
                engine, lark(json_body(SCHEMAS[name], "here")), temperature=temperature, seed=7, max_tokens=60
            )
            for name in ("object", "array", "recursive", "enum", "open", "pattern")
        ]
        asked.append(engine.submit(PROMPT, max_tokens=60, temperature=temperature, seed=7))
        found.append(engine.run(*asked))
        if "kv_cache_memory" in way:
            assert engine.engine.scheduler.preemptions > 0
    assert found[1:] == found[:1] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_no_token(make_engine: Callable[..., Any], model: Path, temperature: float) -> None:
    """Nor what is refused: drafts are held to the grammar token by token."""
    names = ("object", "array", "recursive", "enum", "open", "pattern")
    grammars = [lark(json_body(SCHEMAS[name], "here")) for name in names]
    fields = {"temperature": temperature, "seed": 7, "max_tokens": 60}
    engine = make_engine(model)
    expected = engine.run(*(submit(engine, grammar, **fields) for grammar in grammars))
    for lookahead in (False, True):
        engine = make_engine(model, lookahead=lookahead)
        asked = [
            submit(
                engine, grammar, draft_tokens=4, prediction=[*tokens[:9], 5, *tokens[9:], END, 7], **fields
            )
            for grammar, tokens in zip(grammars, expected, strict=True)
        ]
        assert engine.run(*asked) == expected
        assert engine.engine.accepted_draft_tokens > 20
        assert [reason(engine, each) for each in asked] == [
            "stop" if tokens[-1] == END else "length" for tokens in expected
        ]


def test_the_length_may_cut_it(engine: Any) -> None:
    asked = submit(engine, lark(regex_body("a{50}")), max_tokens=9)
    tokens = engine.run(asked)[0]
    assert (len(tokens), reason(engine, asked)) == (9, "length")


def test_stop_tokens_bias_and_penalties_stay_inside(engine: Any, tokenizer: Tokenizer) -> None:
    b, c = (tokenizer.token_to_id(letter) for letter in "bc")
    grammar = lark(regex_body("[ab]{6}"))
    biased = submit(engine, grammar, temperature=0.0, logit_bias={c: 100.0, b: -100.0})
    penalized = submit(engine, grammar, temperature=0.0, presence_penalty=2.0, repetition_penalty=5.0)
    stopped = submit(engine, grammar, stop_token_ids=[b], logit_bias={b: 100.0})
    end = submit(engine, grammar, logit_bias={END: 100.0})
    found = [text_of(tokenizer, tokens) for tokens in engine.run(biased, penalized, stopped, end)]
    assert found[0] == "aaaaaa"
    assert re.fullmatch("[ab]{6}", found[1])
    assert found[2] == "b"
    assert re.fullmatch("[ab]{6}", found[3])  # the end waits until the text may end
    assert engine.outputs[stopped][-1].stop_token == b


def test_penalties_and_logprobs_are_of_the_raw_logits(engine: Any) -> None:
    asked = submit(engine, lark(text_body("ab")), logprobs=2, temperature=0.0)
    free = engine.submit(PROMPT, max_tokens=1, logprobs=2)
    engine.run(asked, free)
    constrained, plain = engine.outputs[asked][0].logprobs[0], engine.outputs[free][0].logprobs[0]
    assert constrained.top_ids == plain.top_ids
    assert constrained.top_logprobs == pytest.approx(plain.top_logprobs, abs=1e-4)
    assert constrained.logprob <= plain.logprob


# ---- adapters ------------------------------------------------------------------------------------


def test_adapters_write_with_their_own_tokenizer(
    make_engine: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    """An added token without a row in the adapter is never chosen; its other text is, and its end tokens."""
    digest = f"{1:064x}"
    blobs = tmp_path / "store" / "blobs"
    save_lora(blobs / digest, model, 4, target_modules="all-linear")
    write_tokenizer(blobs / digest / "tokenizer.json", added=("word",))
    engine = make_engine(model)
    known = Tokenizer.from_file(str(blobs / digest / "tokenizer.json"))
    assert known.token_to_id("word") == VOCABULARY
    for tokenizer in (None, digest):
        constraint = Constraint(grammar=lark(regex_body("(word)+")), tokenizer=tokenizer, end_tokens=(6,))
        fields: dict[str, Any] = {"temperature": 1.0, "ignore_eos": False, "max_tokens": 30}
        asked = [
            engine.submit(PROMPT, digest, constraint=constraint, stop_token_ids=[6], seed=seed, **fields)
            for seed in range(4)
        ]
        for tokens in engine.run(*asked):
            assert VOCABULARY not in tokens  # this adapter has no row for it
            text = known.decode([token for token in tokens if token not in (END, 6)])
            assert re.fullmatch("(word)*(w|wo|wor)?", text)
        assert all(reason(engine, each) in ("stop", "length") for each in asked)


# ---- compiling -----------------------------------------------------------------------------------


def test_others_go_on_while_a_grammar_is_compiled(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    release = threading.Event()
    compile_ = grammars.Grammars._compile

    def slow(self: Any, constraint: Constraint) -> Any:
        assert release.wait(30)
        return compile_(self, constraint)

    monkeypatch.setattr(grammars.Grammars, "_compile", slow)
    first = submit(engine, lark(text_body("held")))
    cancelled = submit(engine, lark(text_body("never")))
    free = engine.submit(PROMPT, max_tokens=5)
    engine.run(free)
    assert engine.outputs[first] == []
    engine.engine.handle(Cancel(cancelled))
    release.set()
    assert text_of(tokenizer, engine.run(first)[0]) == "held"
    assert engine.outputs[cancelled] == []
    assert not engine.engine.has_work


def test_a_grammar_is_compiled_once(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_ = grammars.Grammars._compile

    def counted(self: Any, constraint: Constraint) -> Any:
        compiled.append(constraint.grammar)
        return compile_(self, constraint)

    monkeypatch.setattr(grammars.Grammars, "_compile", counted)
    same = [submit(engine, lark(regex_body("[a-z]{5}")), seed=seed) for seed in range(5)]
    assert len({tuple(tokens) for tokens in engine.run(*same)}) == 5  # each its own matcher
    assert len(compiled) == 1
    monkeypatch.setattr(grammars, "_KEPT", 2)
    for letter in "abcd":
        engine.run(submit(engine, lark(text_body(letter))))
    assert len(engine.engine.grammars._compiled) == 2


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "exponential rules": "start: a0\n"
    + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40))
    + '\na40: "x"',
    "exponential terminals": "start: A0\n"
    + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40))
    + '\nA40: "x"',
    "deep": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "deep regex": lark(regex_body("(" * 5000 + "a" + ")" * 5000)),
    "look-around": lark(regex_body("(?=a)b")),
    "many items": lark(regex_body("((((((.{0,30}){0,30}){0,30}){0,30}x){0,30}){0,30})")),
    "nothing": "start: start",
    "unknown rule": "start: nowhere",
    "huge enum": lark(json_body({"enum": [f"{i}" * 3 for i in range(40_000)]}, "here")),
    "many optional keys": lark(
        json_body({**OBJECT, "properties": {f"k{i}": {} for i in range(4000)}}, "here")
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused(engine: Any, name: str) -> None:
    failed = error(engine, submit(engine, HOSTILE[name]))
    assert failed is not None
    assert (failed.status, failed.param, failed.code) == (400, "here", "invalid_grammar")
    assert failed.message.startswith("here: ")
    assert len(failed.message) < 600
    assert "%llguidance" not in failed.message
    assert len(engine.generate(PROMPT, max_tokens=3)) == 3  # and the engine goes on


COSTLY = [
    "((a{1000}){1000}){1000}",
    "a{100000000}",
    "(x(y{300}z){300}){300}",
    "([a-z]{1,1000} ){1000}",
    "[01]*1[01]{40}x|.*y.{90}z",
    "(([a-z]{0,300}b){0,300}c){0,300}",
]


def test_costly_regular_expressions_keep_steps_short(engine: Any) -> None:
    """Each is served, or refused where it gets too costly; no step takes long."""
    asked = [submit(engine, lark(regex_body(regex)), max_tokens=30) for regex in COSTLY]
    worst, steps = 0.0, 0
    while not all(map(engine.finished, asked)):
        before = time.process_time()
        engine.step()
        worst, steps = max(worst, time.process_time() - before), steps + 1
        assert steps < 2000
    assert worst < 1.0
    for each in asked:
        last = engine.outputs[each][-1]
        assert last.finish_reason == "length" or last.error.code == "invalid_grammar"


def test_a_grammar_that_gets_too_costly_ends_its_sequence_alone(
    make_engine: Callable[..., Any], model: Path
) -> None:
    """Its cost is met after some tokens; the others do not notice."""
    late = HOSTILE["exponential rules"].replace("start: a0", "start: /[a-z]{8}/ a0")
    for lookahead in (False, True):
        engine = make_engine(model, lookahead=lookahead)
        alone = engine.generate(PROMPT, max_tokens=60)
        costly, free = submit(engine, late), engine.submit(PROMPT, max_tokens=60)
        assert engine.run(free)[0] == alone
        assert error(engine, costly).code == "invalid_grammar"
        assert 0 < len(engine.tokens(costly)) < 10
        assert not engine.engine.has_work


def test_a_base_without_a_tokenizer_refuses(make_engine: Callable[..., Any], tiny_model: Any) -> None:
    engine = make_engine(tiny_model("llama"))
    assert "no tokenizer.json" in error(engine, submit(engine, lark(text_body("a")))).message


def test_too_long_a_grammar_is_refused(engine: Any) -> None:
    failed = error(engine, submit(engine, lark(text_body("a" * 300_000))))
    assert "262,144" in failed.message


# ---- schemas that would be weakened ---------------------------------------------------------------

REFUSED: dict[str, Any] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"properties": {"a": {"if": {"type": "object"}}}},
    "contains": {"items": {"contains": {}}},
    "nullable": {"type": "string", "nullable": True},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "propertyNames": {"propertyNames": {"maxLength": 3}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "x-guidance": {"x-guidance": {"lenient": True}},
    "frobnicate": {"anyOf": [{"frobnicate": 1}]},
    "exclusiveMinimum": {"minimum": 1, "exclusiveMinimum": True},
    "$schema": {"$schema": "http://json-schema.org/draft-04/schema#"},
    "minProperties": {"type": "object", "minProperties": 2},
    "items": {"items": [{"type": "string"}]},
    "nested deeper": nested(100),
    "is false": False,
    "must be an object": "string",
}


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_schema_that_would_be_weakened_is_refused(keyword: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(keyword)) as caught:
        json_body(REFUSED[keyword], "schema")
    assert (caught.value.param or "").startswith("schema")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "string", "format": "password"}, "password"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]}, "oneOf"),
        ({"$ref": "http://example.com/x"}, "example.com"),
        ({"type": "strin"}, "strin"),
        ({**OBJECT, "required": ["b"]}, "'b'"),
        ({"type": "string", "pattern": "(?!a)b"}, "look-ahead"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    ],
)
def test_what_the_library_cannot_do_is_named(engine: Any, schema: Any, named: str) -> None:
    failed = error(engine, submit(engine, lark(json_body(schema, "here"))))
    assert failed is not None
    assert named in failed.message


def test_keywords_that_only_describe_are_taken() -> None:
    schema = {"type": "object", "title": "T", "description": "d", "examples": [{"not": 1}], "x-order": 3}
    assert "x-order" in json_body(schema, "schema")


@pytest.mark.parametrize(
    "grammar",
    [
        'start[temperature=0.5]: "a"',
        '%llguidance {"no_forcing": false}\nstart: "a"',
        "a ::= b",
        "root ::= " + "(" * 3000,
    ],
)
def test_grammars_that_cannot_be_honoured_are_refused(grammar: str) -> None:
    with pytest.raises(InvalidRequest):
        given_grammar(grammar, "here")
