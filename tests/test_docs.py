"""The programs of the README and of the pages on real models run and print what is shown; each route has a page."""

from __future__ import annotations

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

import pytest
from tests.conftest import ROOT, LiveServer
from tests.test_readme import parsers

from veneer.server.cli import build_parser

pytestmark = pytest.mark.model

PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES["README.md"]
# Their programs run on a toy engine (tests/server), train and evaluate for minutes, or need a server of their own.
ELSEWHERE = {
    *("blends.md", "embeddings.md", "fine-tuning.md", "responses.md"),
    *("evaluation.md", "plan.md", "training.md"),
    "hot-adapters.md",
}
EXAMPLES = ROOT / "examples"
DEMOS = sorted(path.parent.name for path in EXAMPLES.glob("*/adapter_config.json"))
BIN = Path(sys.executable).parent


def blocks(language: str, pages: set[str]) -> list[str]:
    found = [
        re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
        for page in sorted(pages)
    ]
    return [block for each in found for block in each]


SHELL = blocks("bash", PAGES.keys() - ELSEWHERE)
PYTHON = blocks("python", PAGES.keys() - ELSEWHERE)


@pytest.fixture(scope="module")
def server(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """Started with the command that `make serve` runs."""
    options = f"--store {tmp_path_factory.mktemp('store')} --device cpu --threads 1 --adapter-dir examples"
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


def run(server: LiveServer, command: list[str], block: str, home: Path) -> str:
    """Run a block's program from the repository's root; returns what it prints."""
    (home / ".curlrc").write_text('fail-with-body\nshow-error\nwrite-out = "\\n"\n')
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "CURL_HOME": str(home)}
    assert "http://127.0.0.1:8000" in block
    block = block.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run(
        [*command, block], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answers(printed: str) -> Iterator[str]:
    """What the commands of a block printed, one after the other: a chat's words, a JSON text or a line."""
    while printed := printed.lstrip():
        try:
            reply, end = json.JSONDecoder().raw_decode(printed)
        except ValueError:
            end = printed.find("\n") + 1 or len(printed)
            reply = None
        is_chat = isinstance(reply, dict) and reply.get("object") == "chat.completion"
        yield reply["choices"][0]["message"]["content"] or "" if is_chat else printed[:end].rstrip()
        printed = printed[end:]


def assert_shown(block: str, printed: list[str]) -> None:
    """Each `# → …` of the block is printed, in this order; its `…` stand for anything."""
    rest = iter(printed)
    for shown in re.findall(r"^# → (.*)$", block, re.MULTILINE):
        pattern = ".*".join(map(re.escape, shown.split("…")))
        assert any(re.fullmatch(pattern, each, re.DOTALL) for each in rest), (shown, printed)


# ---- programs ------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("block", SHELL)
def test_the_shell_commands(server: LiveServer, tmp_path: Path, block: str) -> None:
    """What changes something runs twice: it must work for a reader who tries it again."""
    for _ in range(2 if "DELETE" in block else 1):
        found = list(answers(run(server, ["bash", "-euo", "pipefail", "-c"], block, tmp_path)))
        assert_shown(block, found)
        assert not any(each.startswith('{"error"') for each in found)


@pytest.mark.parametrize("block", PYTHON)
def test_the_python_programs(server: LiveServer, tmp_path: Path, block: str) -> None:
    printed = run(server, ["python", "-c"], block, tmp_path).splitlines()
    assert printed
    assert_shown(block, printed)
    for line in re.findall(r"^# (\S+ → .*)$", block, re.MULTILINE):  # of a model in turn
        assert line in printed


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_adapter_is_shown_and_as_good_as_its_report(server: LiveServer, name: str) -> None:
    """Ten held-out rows, at once, on the base as `make serve` quantizes it."""
    assert any(f'"model": "{name}"' in block for block in blocks("bash", {"README.md"}))
    score = json.loads((EXAMPLES / name / "report.json").read_text())["after"]["exact_match"]
    lines = (EXAMPLES / "data" / f"{name}.test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:10]]

    def ask(prompt: str) -> str:
        body = {"model": name, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        reply = server.http.post("/v1/chat/completions", json=body | {"max_tokens": 48})
        return str(reply.json()["choices"][0]["message"]["content"]).strip()

    with ThreadPoolExecutor(len(rows)) as pool:
        given = list(pool.map(ask, [each["prompt"] for each in rows]))
    wrong = [answer for answer, each in zip(given, rows, strict=True) if answer != each["completion"]]
    assert len(wrong) <= 10 * (1 - score) + 1, wrong  # one more: these ten are few, and kernels differ


# ---- pages ---------------------------------------------------------------------------------------


def test_every_route_has_one_page(server: LiveServer) -> None:
    """And the README's index leads to it."""
    document = server.http.get("/openapi.json").json()["paths"]
    routes = sorted(f"{method.upper()} {path}" for path, methods in document.items() for method in methods)
    told = {page: re.findall(r"^\| `([A-Z]+ /\S+)` \|", text, re.MULTILINE) for page, text in PAGES.items()}
    assert sorted(route for found in told.values() for route in found) == routes
    for page, found in told.items():
        line = re.search(rf"^\| \[.*\]\(docs/{page}\) \|.*$", README, re.MULTILINE)
        paths = {route.split()[1].partition("/{")[0] for route in found}
        assert paths <= set(re.findall(r"`(/[^`]*)`", line[0] if line else "")), page


def test_the_index_names_every_page() -> None:
    indexed = re.findall(r"^\| \[[^]]*\]\(docs/(\S+\.md)\) \|", README, re.MULTILINE)
    assert sorted(indexed) == sorted(PAGES.keys() - {"README.md"})


def test_links_between_pages_lead_somewhere() -> None:
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            assert link.startswith("http") or (folder / link).exists(), (page, link)


def test_options_that_are_named_exist() -> None:
    found = [action for _, parser in parsers(build_parser()) for action in parser._actions]
    known = {option for action in found for option in action.option_strings}
    for page, text in PAGES.items():
        assert set(re.findall(r"`(--[a-z][a-z0-9-]*)", text)) <= known, page
