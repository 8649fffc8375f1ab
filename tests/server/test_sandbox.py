"""Templates of adapters in their processes: the same text as in this one, and what hostile ones cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import InvalidRequest
from veneer.server import sandbox as module
from veneer.server.sandbox import Sandbox, SandboxedTemplate
from veneer.server.template import ChatTemplate

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}{{ mood }}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "user", "content": " héllo <b> "}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(1)
    yield made
    made.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variables": {"mood": "calm", "deep": [{"a": None}]}},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
)
def test_the_text_is_the_same(sandbox: Sandbox, options: dict[str, Any]) -> None:
    here = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    there = SandboxedTemplate(TEMPLATE, {"bos_token": "<s>"}, sandbox)
    for _ in range(2):
        assert there.render(MESSAGES, **options) == here.render(MESSAGES, **options)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ 'a' * 10**11 }}", "MemoryError"),  # folded when it is compiled
        ("{{ messages[0].content * 10**9 }}", "MemoryError"),
        ("{{ messages[0].content * 3 * 10**6 }}", "at most 16,777,216 are taken"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{% for m in", "TemplateSyntaxError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception(messages[0].content * 10**5) }}", "llo <b>  h"),
    ],
)
def test_a_template_that_fails_is_a_bad_request(sandbox: Sandbox, source: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SandboxedTemplate(source, {}, sandbox).render(MESSAGES)
    assert says in refused.value.message
    assert len(refused.value.message) <= 2000
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_what_is_nested_too_deep_is_a_bad_request(sandbox: Sandbox) -> None:
    template = SandboxedTemplate("{{ deep }}", {}, sandbox)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deep"):
        template.render(MESSAGES, variables={"deep": deep})


def test_a_template_that_does_not_end_is_ended(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "{% if messages[0].content == 'stay' %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}fine"
    )
    template = SandboxedTemplate(source, {}, sandbox)
    other = SandboxedTemplate("other", {}, sandbox)
    with pytest.raises(InvalidRequest, match="did not finish within 2 s") as refused:
        template.render([{"role": "user", "content": "stay"}])
    assert refused.value.code == "template_limit"
    with pytest.raises(InvalidRequest, match="less than 60 s ago"):
        template.render(MESSAGES)
    assert other.render(MESSAGES) == "other", "a new process has taken its place"
    monkeypatch.setattr(template, "_refused_until", 0.0)
    assert template.render(MESSAGES) == "fine"


def test_a_process_that_was_killed_is_replaced(sandbox: Sandbox) -> None:
    template = SandboxedTemplate("fine", {}, sandbox)
    child = sandbox._free.get()
    assert child is not None
    child.kill()
    child.wait()
    sandbox._free.put(child)
    with pytest.raises(InvalidRequest, match="ended its process"):
        template.render(MESSAGES)
    assert SandboxedTemplate("fine", {}, sandbox).render(MESSAGES) == "fine"


def test_a_process_has_no_secrets(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_API_KEY", "secret")
    SandboxedTemplate("fine", {}, sandbox)
    child = sandbox._free.get()
    sandbox._free.put(child)
    assert child is not None
    environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    names = {entry.partition(b"=")[0].decode() for entry in environment.split(b"\0") if entry}
    assert names <= set(module._KEPT)
