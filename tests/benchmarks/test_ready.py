"""The start benchmark: a real engine process on the CPU, its log as a timeline, and the refusal without a GPU."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from benchmarks.models import random_checkpoint
from benchmarks.ready import start, timeline

from veneer.engine.config import EngineConfig
from veneer.errors import EngineUnavailable

ROOT = Path(__file__).parents[2]
LOG = """a warning of a library
2026-01-02 03:04:05,500 engine INFO packed base: reading 5.30 GiB from /cache/x.safetensors
2026-01-02 03:04:07,750 engine WARNING captured 22 decode graphs in 1.2 s
Loading weights: 100%
"""


def test_the_timeline_has_the_lines_of_the_engine_alone() -> None:
    begun = datetime(2026, 1, 2, 3, 4, 0).timestamp()
    assert timeline(LOG, begun) == [
        (5.5, "packed base: reading 5.30 GiB from /cache/x.safetensors"),
        (7.75, "captured 22 decode graphs in 1.2 s"),
    ]


def config(model: Path, tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        store=str(tmp_path / "store"),
        quantization="none",
        device="cpu",
        kv_cache_memory=8 << 20,
        adapter_memory=16 << 20,
        host_adapter_memory=16 << 20,
    )


def test_a_real_engine_is_timed_until_it_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_checkpoint(tmp_path / "model", shapes="tiny")
    seconds, steps = asyncio.run(start(config(model, tmp_path), tmp_path / "log"))
    assert 0.1 < seconds < 200
    assert steps[-1] == (round(seconds, 3), "ready")
    assert [at for at, _ in steps] == sorted(at for at, _ in steps)
    assert "ready" in capsys.readouterr().out


def test_an_engine_that_fails_shows_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineUnavailable, match="dead"):
        asyncio.run(start(config(tmp_path / "missing", tmp_path), tmp_path / "log"))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would run")
def test_without_a_gpu_it_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ready", "--layers", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("benchmarks.ready needs the packed NF4 kernels")
