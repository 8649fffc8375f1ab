"""What the README names exists: options, commands, make targets, fields, files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from tests.conftest import ROOT

from veneer.adapters.methods.lora_config import Honoured
from veneer.engine.base import PROVEN
from veneer.server.cli import build_parser
from veneer.server.wire import ChatRequest

README = (ROOT / "README.md").read_text()


def spans() -> list[str]:
    """Inline code and the lines of code blocks."""
    inline = re.findall(r"`([^`\n]+)`", README)
    code = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return inline + [line for block in code for line in block.splitlines()]


def row(title: str) -> str:
    """A row of the table of what is supported."""
    return next(line for line in README.splitlines() if line.startswith(f"| {title} |"))


def parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and those of its subcommands, with the words that select them."""
    yield parser.prog, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


def test_every_option_and_subcommand_exists() -> None:
    known = dict(parsers(build_parser()))
    options = {
        option for parser in known.values() for action in parser._actions for option in action.option_strings
    }
    ours = [span for span in spans() if not span.startswith(("docker ", "curl "))]
    assert {option for span in ours for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span)} <= options
    commands = [span.split() for span in ours if span.startswith("veneer ")]
    assert ["veneer", "serve"] in [words[:2] for words in commands]
    for words in commands:
        assert " ".join(words[:2]) in known
        if words[1] == "adapters":
            for action in filter(None, " ".join(words[2:]).split(" | ")):
                assert f"veneer adapters {action}" in known
    assert {name for name in known if name.count(" ") == 1} == {" ".join(words[:2]) for words in commands}
    serve = known["veneer serve"]
    for option, listed in re.findall(r"`(--[a-z-]+) ([a-z0-9]+(?: \| [a-z0-9]+)+)`", README):
        choices = next(each.choices for each in serve._actions if option in each.option_strings)
        assert listed.split(" | ") == list(choices or ())


def test_every_make_target_and_variable_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = [span.split() for span in spans() if span.startswith("make ")]
    assert {words[1] for words in commands} >= {"serve", "test", "bench"}
    for words in commands:
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
    for variable in re.findall(r"\b([A-Z]+)=", " ".join(spans())):
        assert f"$({variable})" in makefile


def test_the_table_is_true() -> None:
    titles = {"gemma3_text": "Gemma 3 (text)", "phi3": "Phi-3"}
    for architecture in PROVEN:
        assert titles.get(architecture, architecture.capitalize()) in row("Base")
    fields = set(re.findall(r"`(\w+)`", row("Adapters"))) - {"lm_head", "embed_tokens"}
    assert fields
    assert fields <= set(Honoured.__struct_fields__)
    sampling = set(re.findall(r"`(\w+)`", row("Sampling")))
    assert sampling
    assert sampling <= set(ChatRequest.model_fields)


def test_links_and_paths_lead_somewhere() -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README)]
    assert links
    paths = [span for span in spans() if re.fullmatch(r"(?:examples|docs|src|tests|benchmarks)/\S*", span)]
    for path in [link for link in links if not link.startswith("http")] + paths:
        assert list(ROOT.glob(path)), path


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z]+@|TODO|TBD", README)
