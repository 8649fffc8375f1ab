"""Each benchmark runs from end to end on a tiny model and writes its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tiny shapes are for the CPU")


def report(folder: Path, module: str, *options: str) -> dict[str, Any]:
    """The JSON that the script wrote."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--shapes", "tiny", "--output", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / f"cpu-{module}.png").stat().st_size > 1000
    found: dict[str, Any] = json.loads((folder / f"cpu-{module}.json").read_text())
    assert {"device", "commit", "versions", "rows"} <= found.keys()
    for row in found["rows"]:
        assert {"op", "case", "ours_us", "floor_us", "peers"} <= row.keys()
        assert row["ours_us"] > 0
        assert row["floor_us"] > 0
    return found


def rows(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["op"], row["case"]): row for row in found["rows"]}


def test_decode_with_peers(tmp_path: Path) -> None:
    options = ("--cases", "0/1,2/4", "--tokens", "16", "--prefill", "40", "--peers", "--peer-cases", "2/4")
    found = rows(report(tmp_path, "decode", *options))
    assert list(found) == [("decode_step", "0/1"), ("decode_step", "2/4"), ("prefill", "4x40")]
    assert found["decode_step", "2/4"]["peers"]["PEFT, bitsandbytes NF4"] > 0
    assert found["decode_step", "0/1"]["peers"] == {}
    step = found["decode_step", "2/4"]
    assert step["tokens_per_s"] == pytest.approx(4e6 / step["ours_us"])


def test_kinds(tmp_path: Path) -> None:
    found = rows(
        report(tmp_path, "kinds", "--batch", "8", "--tokens", "24", "--rounds", "1", "--layers", "1")
    )
    kinds = ("dora", "ia3", "oft32", "road", "vera256", "prefix", "prompt", "mixed8", "vera256x64")
    assert list(found) == [("kinds", kind) for kind in kinds]
    for row in found.values():
        assert row["ratio"] == pytest.approx(row["ours_us"] / row["peers"]["lora"])
    features = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256, "gate_proj": 512, "up_proj": 512}
    outputs = sum(features.values()) + 256
    assert found["kinds", "road"]["adapter_bytes"] == 2 * outputs * 4  # scales and crosses, float32
    assert found["kinds", "ia3"]["adapter_bytes"] == (128 + 128 + 512) * 4
    own = sum(-(-outputs // 128) * 128 + 256 for outputs in [*features.values(), 256])
    shared = 256 * (256 + 512) + 256 * (128 + 256 + 512)
    assert found["kinds", "vera256"]["adapter_bytes"] == 4 * (own + shared / 8)
    assert found["kinds", "vera256x64"]["adapter_bytes"] == 4 * (own + shared / 64)
    assert found["kinds", "prefix"]["adapter_bytes"] == 2 * 16 * 2 * 64 * 4  # tokens, heads, head_dim


@pytest.mark.model
def test_options(tmp_path: Path) -> None:
    sizes = ("--batch", "4", "--prompt", "8", "--tokens", "16", "--rounds", "2", "--layers", "1")
    cases = ("json", "choice", "blend2", "edit/1", "novel/4")
    found = rows(report(tmp_path, "options", *sizes, "--cases", ",".join(cases)))
    assert list(found) == [("options", case) for case in cases]
    for row in found.values():
        assert len(row["ratios"]) == 2
        assert row["tokens_per_s"] > 0
    assert list(found["options", "blend2"]["peers"]) == ["LoRA of rank 32"]
    assert found["options", "edit/1"]["accepted"] > 0.5
    assert found["options", "edit/1"]["same_answers"] == 1
    assert found["options", "novel/4"]["accepted"] < 0.5


def test_churn(tmp_path: Path) -> None:
    sizes = ("--adapters", "12", "--slots", "4", "--in-flight", "4", "--requests", "14", "--tokens", "6")
    (row,) = report(tmp_path, "churn", *sizes, "--rounds", "1")["rows"]
    assert (row["op"], row["case"]) == ("churn", "12")
    assert row["loads_per_s"] > 0
    assert 1 <= row["distinct_running"] <= 4
    assert row["share"] == pytest.approx(row["peers"]["all resident"] / row["ours_us"])


def test_swap(tmp_path: Path) -> None:
    found = rows(report(tmp_path, "swap", "--tokens", "12", "--rounds", "1"))
    assert found["swap", "r16"]["bytes"] == 2 * 16 * 4096 * 4  # layers, rank, features of the sites, float32
    assert found["swap", "r16"]["ours_us"] > found["swap", "r16"]["floor_us"]
    beside = found["swap", "r16-p99"]
    assert beside["swaps_per_s"] > 0
    assert beside["ratio"] == pytest.approx(beside["ours_us"] / beside["peers"]["without swaps"])


def test_serving(tmp_path: Path) -> None:
    sizes = ("--adapters", "2", "--clients", "3", "--http-tokens", "6", "--rounds", "1", "--prompt", "6")
    load = ("--rates", "4,8", "--seconds", "1", "--popularities", "zipf", "--tokens", "5", "--processes", "2")
    found = report(
        tmp_path,
        "serving",
        "--folder",
        str(tmp_path / "base"),
        "--serve=--device cpu --threads 1",
        *sizes,
        *load,
    )
    ((key, row),) = rows(found).items()
    assert key == ("http", "3/2")
    assert row["share"] == pytest.approx(row["peers"]["engine alone"] / row["ours_us"])
    assert [(curve["popularity"], curve["rate"]) for curve in found["curves"]] == [
        ("zipf", 4.0),
        ("zipf", 8.0),
    ]
    for curve in found["curves"]:
        assert (curve["errors"], curve["first_error"]) == (0, None)
        assert curve["tokens"] == 5 * curve["requests"]
        assert curve["ttft_ms"]["p50"] > 0
        assert 0 < curve["events_per_token"] <= 1.0  # what comes together travels together


def test_hot(tmp_path: Path) -> None:
    found = rows(report(tmp_path, "hot", "--rounds", "1", "--output-tokens", "4"))
    for row in found.values():
        assert row["ratio"] == pytest.approx(row["peers"]["slot"] / row["ours_us"])
        assert row["bytes"] > 0
    full, quantized = found["hot", "full"], found["hot", "nf4"]
    assert full["error"] == 0
    assert quantized["error"] > 0


def test_coserving(tmp_path: Path) -> None:
    found = rows(report(tmp_path, "coserving", "--seconds", "0.5", "--length", "16", "--batch", "1"))
    latency, training = found["coserving", "itl-p99"], found["coserving", "train"]
    assert latency["ratio"] == pytest.approx(latency["ours_us"] / latency["peers"]["without training"])
    assert training["kept"] == pytest.approx(training["peers"]["alone"] / training["ours_us"])
    assert training["share"] == 0.5
