"""guidellm's and aiperf's own commands against `veneer serve`: four requests of each kind, and their reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import LiveServer

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
REQUESTS, PROMPT, ANSWER = 4, 16, 8  # how many, and tokens of each
ENDLESS = ["--streaming", "--extra-inputs", "ignore_eos:true"]  # of aiperf; guidellm does so by itself

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def live(live_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    options = ["--store", str(tmp_path_factory.mktemp("store")), "--quantization", "none", "--threads", "1"]
    modules = ["--lora-modules", f"negate={EXAMPLES / 'negate'}"]
    return live_server(*options, "--kv-cache-memory", "256MiB", *modules)


def command(tool: str) -> str | None:
    """Of this environment."""
    return shutil.which(tool, path=Path(sys.executable).parent)


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(command(tool) is None, reason=f"{tool} is not installed")


def run(tool: str, *arguments: str) -> None:
    program = command(tool)
    assert program is not None
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def tokenizer() -> str:
    from veneer.engine.source import resolve

    return str(resolve(None))


@needs("guidellm")
@pytest.mark.parametrize(
    "route", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
)
def test_guidellm(live: LiveServer, route: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = {
        "--backend": f"kind=openai_http,target={live.url},model=negate,request_format={route}",
        "--profile": "kind=concurrent,streams=2",
        "--constraint": f"kind=max_requests,count={REQUESTS}",
        "--data": f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={ANSWER}",
        "--tokenizer": f"kind=huggingface_auto,model={tokenizer()}",
        "--output": f"kind=json,path={report}",
    }
    run("guidellm", "run", "--disable-console", *(word for option in options.items() for word in option))
    (found,) = json.loads(report.read_text())["benchmarks"]
    requests: dict[str, list[Any]] = found["requests"]
    assert requests["errored"] == requests["incomplete"] == []
    assert len(requests["successful"]) == REQUESTS
    for each in requests["successful"]:
        assert each["prompt_tokens"] >= PROMPT
        if route != "/v1/embeddings":
            assert each["output_tokens"] == ANSWER
            assert each["time_to_first_token_ms"] > 0


@needs("aiperf")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("chat", [*ENDLESS, "--use-server-token-count", "--per-chunk-usage"]),
        ("completions", [*ENDLESS, "--use-server-token-count"]),
        ("responses", ENDLESS),
        ("embeddings", []),
    ],
)
def test_aiperf(
    live: LiveServer, kind: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # with it, it takes no folder for a tokenizer
    asked = {
        "--model": "negate",
        "--url": live.url,
        "--endpoint-type": kind,
        "--tokenizer": tokenizer(),
        "--concurrency": "2",
        "--request-count": str(REQUESTS),
        "--synthetic-input-tokens-mean": str(PROMPT),
        "--output-tokens-mean": str(ANSWER),
        "--ui": "none",
        "--output-artifact-dir": str(tmp_path),
    }
    flags = ["--no-gpu-telemetry", "--no-server-metrics", *options]
    run("aiperf", "profile", *(word for option in asked.items() for word in option), *flags)
    found: dict[str, Any] = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == REQUESTS
    assert found["input_sequence_length"]["min"] >= PROMPT
    if "--streaming" in options:
        assert found["time_to_first_token"]["min"] > 0
    if "--use-server-token-count" in options:
        assert found["output_sequence_length"]["min"] == found["output_sequence_length"]["max"] == ANSWER
