"""The programs of docs/responses.md and docs/embeddings.md run, on a toy engine; what they name exists."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT
from tests.server.conftest import BASE, MakeServer, Server
from tests.server.test_fine_tuning_docs import run

from veneer.server.responses_wire import PASSED, ResponseRequest
from veneer.server.state import ServerConfig
from veneer.server.wire import ChatRequest, EmbeddingRequest

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("responses", "embeddings")}


def block(page: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def served(make_server: MakeServer) -> Server:
    return make_server(adapters=("negate",), config=ServerConfig()).until_ready()


@pytest.mark.parametrize("page", PAGES)
def test_the_python_program(served: Server, page: str, tmp_path: Path) -> None:
    printed = run(served, [sys.executable, "-c"], block(page, "python"), tmp_path)
    last = {"responses": r"\d+ response\.(completed|incomplete)", "embeddings": r"\d+ tokens"}
    assert re.fullmatch(last[page], printed.splitlines()[-1])


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("page", PAGES)
def test_the_shell_commands(served: Server, page: str, tmp_path: Path) -> None:
    printed = run(served, ["bash", "-euo", "pipefail", "-c"], block(page, "bash"), tmp_path)
    assert {"responses": '"deleted":true', "embeddings": '"object":"embedding"'}[page] in printed
    assert BASE not in printed


def test_fields_that_are_named_exist() -> None:
    table = [line.split("|")[1] for line in PAGES["responses"].splitlines() if line.startswith("| `")]
    named = {name for row in table for name in re.findall(r"`([a-z_]+)", row)}
    assert named - {"message"} <= set(ResponseRequest.model_fields)
    (others,) = re.findall(r"^\| others \| (.*) and what else", PAGES["responses"], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", others)) <= PASSED <= set(ChatRequest.model_fields)
    bullets = re.findall(r"^\* `(\w+)`|`(\w+): ", PAGES["embeddings"], re.MULTILINE)
    assert {name for pair in bullets for name in pair if name} <= set(EmbeddingRequest.model_fields)
