"""The programs of docs/fine-tuning.md run, on a toy engine; what it names exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from tests.conftest import ROOT
from tests.server.conftest import BASE, MakeServer, Server

from veneer.server.cli import build_parser
from veneer.training.jobs.hyperparameters import BATCH_SIZE, BETA, EPOCHS, LEARNING_RATE
from veneer.training.jobs.job_events import MOST_STEPS
from veneer.training.jobs.job_schema import Status
from veneer.training.recipe import Adapter, Training

PAGE = (ROOT / "docs" / "fine-tuning.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def run(server: Server, program: list[str], text: str, home: Path) -> str:
    """The program as on the page, but for where the server is and what it serves."""
    (home / ".curlrc").write_text("fail-with-body\nshow-error\n")
    text = text.replace("http://127.0.0.1:8000", server.url).replace("SmolLM2-135M-Instruct", BASE)
    environment = os.environ | {"CURL_HOME": str(home)}
    done = subprocess.run(
        [*program, text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_shell_commands(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server("--step-seconds", "0.1").until_ready()  # so that it is not over before it is paused
    printed = run(server, ["bash", "-euo", "pipefail", "-c"], block("bash"), tmp_path)
    answers = []
    while printed := printed.lstrip():
        answer, end = json.JSONDecoder().raw_decode(printed)
        answers.append(answer)
        printed = printed[end:]
    created, events, paused, resumed, cancelled, deleted = answers
    assert created["training"]["adapter"]["rank"] == 4
    assert events["object"] == "list"
    assert [paused["status"], resumed["status"], cancelled["status"]] == ["paused", "queued", "cancelled"]
    assert deleted["deleted"]


def test_the_python_program(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server().until_ready()
    lines = run(server, [sys.executable, "-c"], block("python"), tmp_path).splitlines()
    assert lines[2] == "The job has successfully completed"
    assert lines[3] == "step,train_loss,valid_loss"
    assert len(lines) >= 5
    (job,) = server.openai.fine_tuning.jobs.list()
    assert (
        server.received("Generate")[-1]["adapter"]
        == (server.http.get(f"/v1/adapters/{job.fine_tuned_model}").json()["digest"])
    )


def test_the_tables_are_true() -> None:
    def row(title: str) -> str:
        return next(line for line in PAGE.splitlines() if line.startswith(f"| `{title}`"))

    assert f"| {EPOCHS} |" in row("n_epochs")
    assert f"| {BATCH_SIZE} |" in row("batch_size")
    assert f"| {BETA} |" in row("beta")
    shown = row("learning_rate_multiplier")
    assert str(LEARNING_RATE["supervised"]) in shown
    assert f"{LEARNING_RATE['dpo']:.5f}" in shown
    assert all(row(status) for status in get_args(Status))
    assert f"{MOST_STEPS:,} steps" in PAGE
    (serve,) = (
        action.choices["serve"]
        for action in build_parser()._actions
        if isinstance(action.choices, dict) and "serve" in action.choices
    )
    options = {option for action in serve._actions for option in action.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)`", PAGE)) <= options
    named = re.search(r"`adapter` says what is trained \((.*?)…\), `training` the rest \((.*?)…\)", PAGE)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) <= set(Adapter.model_fields)
    assert set(re.findall(r"`(\w+)`", named[2])) - {"gate"} <= set(Training.model_fields)
