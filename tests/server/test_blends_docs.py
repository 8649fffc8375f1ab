"""The programs of docs/blends.md run, on a toy engine; its tables are complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT
from tests.server.adapters import made
from tests.server.conftest import BASE, MakeServer, Server

from veneer.adapters.recipes import METHODS, PARTS_LIMIT, WEIGHT_LIMIT
from veneer.server.merge_api import MergeBody

PAGE = (ROOT / "docs" / "blends.md").read_text()


def run(make_server: MakeServer, language: str, program: list[str], home: Path) -> tuple[str, Server]:
    """The program as on the page, but for where the server is and what it serves."""
    server = make_server().until_ready()
    for name in ("negate", "past-tense"):
        made(server, name, name.encode())
    (home / ".curlrc").write_text("fail-with-body\nshow-error\n")
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    text = text.replace("http://127.0.0.1:8000", server.url).replace("SmolLM2-135M-Instruct", BASE)
    environment = os.environ | {"CURL_HOME": str(home)}
    done = subprocess.run(
        [*program, text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, server


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_shell_commands(make_server: MakeServer, tmp_path: Path) -> None:
    printed, server = run(make_server, "bash", ["bash", "-euo", "pipefail", "-c"], tmp_path)
    answers = []
    while printed := printed.lstrip():
        answer, end = json.JSONDecoder().raw_decode(printed)
        answers.append(answer)
        printed = printed[end:]
    chat, saved, merged = answers
    assert chat["usage"]["blend"]["rank"] == 16
    assert saved["id"] == "negated-past"
    assert merged["recipe"]["rank"] == 8
    (asked,) = server.received("Generate")
    assert asked["adapter"].startswith("linear(")


def test_the_python_program(make_server: MakeServer, tmp_path: Path) -> None:
    printed, _ = run(make_server, "python", [sys.executable, "-c"], tmp_path)
    assert printed.splitlines()[-1] == "{'rank': 8, 'error': 0.1}"


def test_its_numbers_and_methods_are_those_of_the_code() -> None:
    assert f"from -{WEIGHT_LIMIT:g} to {WEIGHT_LIMIT:g}" in PAGE
    assert f"At most {PARTS_LIMIT}." in PAGE
    named = set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE))
    assert named == {*METHODS, "cat", "svd"}
    schema = MergeBody.model_json_schema()["properties"]["method"]["enum"]
    assert set(schema) == named | {f"{name}_svd" for name in METHODS if name != "linear"}
