"""The README's commands run, its answers are what the server says, and what it names exists."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT, LiveServer

from veneer.adapters.methods.lora_config import Honoured
from veneer.engine.base import PROVEN
from veneer.server.cli import build_parser
from veneer.server.wire import ChatRequest

pytestmark = pytest.mark.model

README = (ROOT / "README.md").read_text()
LIKELIHOODS = (ROOT / "docs" / "likelihoods.md").read_text()
STRUCTURE = [(ROOT / "docs" / name).read_text() for name in ("structured-output.md", "tools.md")]
EXAMPLES = ROOT / "examples"
DEMOS = sorted(path.parent.name for path in EXAMPLES.glob("*/adapter_config.json"))
BIN = Path(sys.executable).parent


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def spans() -> list[str]:
    """Inline code and the lines of code blocks."""
    inline = re.findall(r"`([^`\n]+)`", README)
    return inline + [line for block in blocks(r"\w*") for line in block.splitlines()]


def row(title: str) -> str:
    """A row of the table of what is supported."""
    return next(line for line in README.splitlines() if line.startswith(f"| {title} |"))


@pytest.fixture(scope="module")
def server(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """Started with the command that `make serve` runs."""
    options = f"--store {tmp_path_factory.mktemp('store')} --device cpu --threads 1"
    # What `make test` exports to its children is no part of what a user types.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    arguments = ["make", "--dry-run", "serve", "HOST=127.0.0.1", "PORT=0", f"ARGS={options}"]
    printed = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = printed.stdout.replace("\\\n", " ").splitlines()
    program, *rest = shlex.split(next(line for line in lines if "veneer serve" in line))
    assert Path(program).name == "veneer"
    return live_server(command=[str(BIN / "veneer"), *rest])


def run(server: LiveServer, command: list[str], home: Path) -> str:
    """Run a block's program from the repository's root; returns what it prints."""
    (home / ".curlrc").write_text("fail-with-body\nshow-error\n")
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "CURL_HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def at(server: LiveServer, block: str) -> str:
    assert "http://127.0.0.1:8000" in block
    return block.replace("http://127.0.0.1:8000", server.url)


def replies(output: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that one curl after the other printed."""
    while output := output.lstrip():
        reply, end = json.JSONDecoder().raw_decode(output)
        output = output[end:]
        yield reply


# ---- commands ------------------------------------------------------------------------------------


SHELL = [block for page in (README, LIKELIHOODS, *STRUCTURE) for block in blocks("bash", page)]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("block", SHELL)
def test_the_shell_commands(server: LiveServer, tmp_path: Path, block: str) -> None:
    """What changes something twice: it must work for a reader who tries it again."""
    documented = re.findall(r"^# → (.*)$", block, re.MULTILINE)
    for _ in range(2 if "DELETE" in block else 1):
        answers = list(replies(run(server, ["bash", "-euo", "pipefail", "-c", at(server, block)], tmp_path)))
        assert len(answers) == len(re.findall(r"^curl ", block, re.MULTILINE))
        assert not any("error" in answer for answer in answers)
        if documented:
            assert [answer["choices"][0]["message"]["content"] for answer in answers] == documented


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_program(server: LiveServer, tmp_path: Path, block: str) -> None:
    printed = run(server, ["python", "-c", at(server, block)], tmp_path)
    for line in re.findall(r"^# (.* → .*)$", block, re.MULTILINE):
        assert line in printed.splitlines()
    for model in server.http.get("/v1/models").json()["data"]:
        assert re.search(rf"^{model['id']} → \S", printed, re.MULTILINE)


@pytest.mark.parametrize("block", [block for page in STRUCTURE for block in blocks("python", page)])
def test_the_programs_about_structure_and_tools(server: LiveServer, tmp_path: Path, block: str) -> None:
    assert run(server, ["python", "-c", at(server, block)], tmp_path).strip()


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_adapter_is_shown_and_as_good_as_its_report(server: LiveServer, name: str) -> None:
    """Ten held-out rows, at once, on the base as `make serve` quantizes it."""
    assert any(f'"model": "{name}"' in block for block in blocks("bash"))
    score = json.loads((EXAMPLES / name / "report.json").read_text())["after"]["exact_match"]
    lines = (EXAMPLES / "data" / f"{name}.test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:10]]

    def ask(prompt: str) -> str:
        body = {"model": name, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        reply = server.http.post("/v1/chat/completions", json=body | {"max_tokens": 48})
        return str(reply.json()["choices"][0]["message"]["content"]).strip()

    with ThreadPoolExecutor(len(rows)) as pool:
        answers = list(pool.map(ask, [each["prompt"] for each in rows]))
    wrong = [answer for answer, each in zip(answers, rows, strict=True) if answer != each["completion"]]
    assert len(wrong) <= 10 * (1 - score) + 1, wrong  # one more: these ten are few, and kernels differ


def test_the_table_names_every_route(server: LiveServer) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert set(re.findall(r"`(/[^`]*)`", row("Routes"))) == {path.partition("/{")[0] for path in paths}


# ---- names ---------------------------------------------------------------------------------------


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
            for action in " ".join(words[2:]).split(" | "):
                assert f"veneer adapters {action}" in known
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
