"""One server with the toy engine for all clients; what they say does not matter, only that they understand it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.conftest import MakeServer, Server, write_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its library is imported
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no look at the network
os.environ.setdefault("LLM_LOAD_PLUGINS", "")  # of llm, just what it comes with
os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "1")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the adapters `sql` and `team/poet`."""
    folder: Path = tmp_path_factory.mktemp("clients")
    make = MakeServer(folder, write_model(folder / "model"))
    yield make("--context", "4096", adapters=("sql", "team/poet")).until_ready()
    make.stop()
    gc.collect()  # what clients left open is told of here, where warnings are theirs


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    """What clients call the base URL."""
    return f"{server.url}/v1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of clients are theirs."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
