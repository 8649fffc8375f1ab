"""The programs of docs/responses.md and docs/embeddings.md run, on a toy engine; what the pages name exists."""

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
from veneer.server.wire import NOT_HONOURED, ChatRequest, CompletionRequest, EmbeddingRequest, anything

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


def test_the_fields_of_chat_and_completions_are_all_told() -> None:
    page = (ROOT / "docs" / "chat.md").read_text()
    fields = page[page.index("## Fields") : page.index("## Errors")]
    rows = [line.split(" | ")[0] for line in fields.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} | {"include_stop_str_in_output"}
    assert named == ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    (labels,) = re.findall(r"^(`user`.*) are labels", fields, re.MULTILINE)
    taken = {name for name, rule in NOT_HONOURED.items() if rule.harmless is anything}
    assert set(re.findall(r"`(\w+)`", labels)) == taken


def test_metrics_that_are_named_exist(served: Server) -> None:
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("server", "gateways", "chat")]
    named = {name for page in pages for name in re.findall(r"`((?:veneer_|vllm:)\w+)`", page)}
    served.until(lambda: served.state.engine.stats)
    assert named <= set(re.findall(r"^# TYPE (\S+)", served.http.get("/metrics").text, re.MULTILINE))
