"""schemathesis: requests made of a document, sent to a server with a toy engine, and what comes back against it.

Of our own document, and of OpenAI's specification, a file that VENEER_OPENAI_SPEC names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.clients.openai_spec import cut
from tests.server.conftest import BASE, MakeServer, Server, write_model
from tests.server.test_auth import routes

COMMAND = shutil.which("schemathesis", path=Path(sys.executable).parent)
CONFIG = Path(__file__).parent / "schemathesis.toml"
SPEC = os.environ.get("VENEER_OPENAI_SPEC")
MODELS = [BASE, "sql", "team/poet"]
EXAMPLES = os.environ.get("VENEER_SCHEMATHESIS_EXAMPLES", "3")  # random ones of each operation

pytestmark = [
    pytest.mark.skipif(COMMAND is None, reason="schemathesis is not installed"),
    pytest.mark.timeout(600),  # thousands of requests
]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server for each test, since they delete and add what they like."""
    make = MakeServer(tmp_path, write_model(tmp_path / "model"))
    yield make(adapters=tuple(MODELS[1:])).until_ready()
    make.stop()


def run(document: dict[str, Any], url: str, folder: Path, *options: str) -> None:
    assert COMMAND is not None
    (folder / "document.json").write_text(json.dumps(document))
    command = [COMMAND, "--config-file", str(CONFIG), "run", str(folder / "document.json"), "--url", url]
    command += ["--max-examples", EXAMPLES, "--generation-deterministic", "--no-color", *options]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=570, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_our_document(own: Server, tmp_path: Path) -> None:
    """It names the models that there are, so that made-up requests get further than to a 404."""
    document = own.http.get("/openapi.json").json()
    for schema in document["components"]["schemas"].values():
        if model := schema.get("properties", {}).get("model"):
            absent = [] if "model" in schema.get("required", []) else [None]
            model.clear()
            model["enum"] = [*MODELS, *absent]
    run(document, own.url, tmp_path)


@pytest.mark.skipif(SPEC is None, reason="VENEER_OPENAI_SPEC names no file")
def test_openais_specification(own: Server, tmp_path: Path) -> None:
    assert SPEC is not None
    spec = yaml.load(Path(SPEC).read_text(), yaml.CSafeLoader)  # its own loader takes a minute
    known = {(method, plain(path)) for method, path in routes(own)}
    served = {
        (method.upper(), path)
        for path, operations in spec["paths"].items()
        for method in operations
        if (method.upper(), plain(f"/v1{path}")) in known
    }
    run(cut(spec, served, MODELS), f"{own.url}/v1", tmp_path, "--mode", "positive")


def plain(path: str) -> str:
    """A path whose parameters have no names."""
    return re.sub(r"{.*?}", "{}", path)
