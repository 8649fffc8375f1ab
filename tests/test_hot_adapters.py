"""docs/hot-adapters.md against a real server: its program runs, and traffic for one adapter gets it a copy."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, LiveServer
from tests.engine.adapters import save_lora

from veneer.engine.messages import HotAdapter
from veneer.server.cli import build_parser

PAGE = (ROOT / "docs" / "hot-adapters.md").read_text()


def test_traffic_for_one_adapter_gets_it_a_copy(
    live_server: Callable[..., LiveServer], text_model: Path, tmp_path: Path
) -> None:
    save_lora(tmp_path / "adapter", text_model, 4)
    options = ["--store", str(tmp_path / "store"), "--quantization", "none", "--threads", "1"]
    options += ["--kv-cache-memory", "64MiB", "--lora-modules", f"own={tmp_path / 'adapter'}"]
    server = live_server(str(text_model), *options, "--hot-adapter-memory", "64MiB")

    def hot() -> Any:
        return server.http.get("/health").json()["hot_adapter"]

    def ask() -> str:
        body = {"model": "own", "prompt": "hello", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        return str(server.http.post("/v1/completions", json=body).json()["choices"][0]["text"])

    expected, deadline = ask(), time.monotonic() + 200
    assert hot() == {"state": "watching", "format": "full", "adapter": None, "bytes": 0} | {
        name: getattr(HotAdapter(state="", format=""), name) for name in HotAdapter.__struct_fields__[4:]
    }
    while not hot()["made"]:
        assert time.monotonic() < deadline, hot()
        ask()
    assert ask() == expected
    assert server.metric("veneer_hot_adapter_copies_made_total") == 1
    assert server.metric("veneer_hot_adapter_steps_total") >= 1
    assert "of its weights relative error 0" in server.log
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    program = program.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split()[0] in ("checking", "serving", "leaving", "watching")


def test_the_page_names_its_flag_and_all_that_health_shows() -> None:
    (command,) = re.findall(r"^```bash\nveneer (.*?)\n```", PAGE, re.MULTILINE)
    assert build_parser().parse_args(command.split()).hot_adapter_memory == 2 << 30
    for name in HotAdapter.__struct_fields__:
        assert f"`{name}`" in PAGE or f'["{name}"]' in PAGE, name
