"""Jobs in the engine's process: their life, what goes wrong, and that a job stopped or killed ends the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer.adapters.names import WEIGHTS_FILE
from veneer.engine.base import Base, load_base
from veneer.engine.messages import JobReport, StartJob, StopJob
from veneer.engine.view import Resident
from veneer.training import trainer as trainer_module
from veneer.training.governor import Governor
from veneer.training.worker import TrainingWorker

ROWS = [
    {"prompt": question, "completion": answer}
    for question, answer in zip("abcdefgh", "12345678", strict=True)
]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(tiny_base, quantization="none", dtype=torch.float32, device=torch.device("cpu"))


class Jobs:
    """A worker, and what it reported."""

    def __init__(self, base: Base, folder: Path) -> None:
        self.governor = Governor(0.5)
        self.news = threading.Event()
        self.seen: list[JobReport] = []
        self.worker = TrainingWorker(Resident(base, folder, "tiny-base"), self.governor, self.news.set)

    def wait(self, *kinds: str, job: str = "one", at_least: int = 1) -> list[JobReport]:
        """Until so many reports of these kinds came for a job."""
        while True:
            self.news.clear()
            self.seen += self.worker.reports()
            found = [each for each in self.seen if each.id == job and each.kind in kinds]
            if len(found) >= at_least:
                return found
            assert self.news.wait(60)

    def wait_step(self, step: int) -> None:
        """Until this step was told, for the first time or again."""
        found = self.wait("progress")
        while found[-1].data["step"] < step:
            found = self.wait("progress", at_least=len(found) + 1)

    def life(self, job: str = "one") -> list[str]:
        return [each.kind for each in self.seen if each.id == job]


@pytest.fixture
def jobs(base: Base, tiny_base: Path) -> Jobs:
    return Jobs(base, tiny_base)


def write_job(folder: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any) -> str:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"steps": 12, "batch_size": 4, "checkpoint_every": 5, "adapter": {"dropout": 0.2}, **fields}
    (folder / "training.json").write_text(json.dumps(training))
    return str(folder)


def adapter(folder: str | Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(Path(folder) / WEIGHTS_FILE)
    return found


def assert_same(one: str | Path, other: str | Path) -> None:
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


def test_a_job_tells_its_life_and_leaves_its_checkpoints(jobs: Jobs, tmp_path: Path) -> None:
    jobs.worker.handle(StartJob("one", write_job(tmp_path / "job", validation_fraction=0.25)))
    (last,) = jobs.wait("succeeded", "failed")
    assert last.kind == "succeeded", last
    progress = [each.data for each in jobs.seen if each.kind == "progress"]
    assert [each["step"] for each in progress] == list(range(1, 13))
    assert all({"train_loss", "learning_rate", "tokens", "total_steps"} <= each.keys() for each in progress)
    assert [each["step"] for each in progress if "valid_loss" in each] == [5, 10, 12]
    checkpoints = [each.data for each in jobs.seen if each.kind == "checkpoint"]
    assert [each["step"] for each in checkpoints] == [5, 10, 12]
    assert all((Path(each["folder"]) / WEIGHTS_FILE).exists() for each in checkpoints)
    assert jobs.life()[0] == "validated"
    best = min((each for each in progress if "valid_loss" in each), key=lambda each: each["valid_loss"])
    assert last.data["step"] == best["step"]
    assert (Path(last.data["folder"]) / WEIGHTS_FILE).exists()
    assert json.loads((tmp_path / "job" / "report.json").read_text())["result"]["step"] == best["step"]


@pytest.mark.parametrize("fields", [{}, {"adapter": {"kind": "adalora"}}, {"packing": True}], ids=str)
def test_a_job_that_was_stopped_goes_on_and_ends_the_same(
    jobs: Jobs, tmp_path: Path, fields: dict[str, Any]
) -> None:
    jobs.worker.handle(StartJob("whole", write_job(tmp_path / "whole", **fields)))
    whole = jobs.wait("succeeded", "failed", job="whole")[0]
    folder = write_job(tmp_path / "job", **fields)
    jobs.worker.handle(StartJob("one", folder))
    for stop in (1, 2):
        jobs.wait_step(4 * stop)
        jobs.worker.handle(StopJob("one"))
        stopped = jobs.wait("stopped", at_least=stop)[-1]
        assert stopped.data["step"] >= 4 * stop
        jobs.worker.handle(StartJob("one", folder))
    last = jobs.wait("succeeded", "failed")[0]
    assert last.kind == whole.kind == "succeeded", last
    assert [each.kind for each in jobs.seen if each.kind == "notice"] == ["notice", "notice"]
    for kind, steps in (("progress", range(1, 13)), ("checkpoint", (5, 10, 12))):
        # From its last start on everything is told, in order: whoever missed reports before has them now.
        last_start = max(place for place, each in enumerate(jobs.seen) if each.kind == "validated")
        told = [each for each in jobs.seen[last_start:] if each.id == "one" and each.kind == kind]
        assert [each.data["step"] for each in told] == list(steps)
    assert_same(whole.data["folder"], last.data["folder"])


_KILLED = """
import os, signal, sys
from pathlib import Path
from veneer.training import train, trainer
trainer.STATE_SECONDS = 0.0
class Bar(train._Bar):
    def report(self, kind, message="", **data):
        super().report(kind, message, **data)
        if kind == "progress" and data["step"] == 7:
            os.kill(os.getpid(), signal.SIGKILL)
train._Bar = Bar
train.main(Path(sys.argv[1]))
"""


def test_a_training_that_was_killed_goes_on_from_its_last_step(
    tmp_path: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from veneer.training.train import main

    recipes = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        recipe = {"base": str(tiny_base), "data": "rows.jsonl", "output": "out", "steps": 10, "batch_size": 4}
        recipe |= {"device": "cpu", "adapter": {"dropout": 0.2}}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        recipes.append(folder / "recipe.yaml")
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(recipes[1])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "out" / WEIGHTS_FILE).exists()
    whole, resumed = main(recipes[0]), main(recipes[1])
    assert "resumed after step 6" in "".join(capfd.readouterr())
    assert_same(whole, resumed)
    assert not (resumed / ".training").exists()


def test_a_queued_job_can_be_stopped_and_the_next_one_runs(jobs: Jobs, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        jobs.worker.handle(StartJob(name, write_job(tmp_path / name, steps=3)))
    jobs.worker.handle(StopJob("two"))
    assert jobs.wait("succeeded", job="three")
    assert jobs.life("two") == ["stopped"]
    assert jobs.life("one")[-1] == "succeeded"


@pytest.mark.parametrize(
    ("fields", "rows", "code", "message"),
    [
        ({}, [{"prompt": "a"}], "invalid_value", r"training\.jsonl:1"),
        ({"adapter": {"targets": ["nothing"]}}, ROWS, "invalid_value", "adapter.targets"),
        ({"optimizer": "adamw_8bit"}, ROWS, "invalid_value", "optimizer='adamw_8bit'.*use adamw"),
        ({"method": "dpo"}, ROWS, "invalid_value", "pairs|preference"),
        (
            {"learning_rate": 0.99, "max_grad_norm": 1e30, "steps": 60, "weight_decay": 1e8},
            ROWS,
            "loss_not_finite",
            "the loss is",
        ),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_job_runs(
    jobs: Jobs, tmp_path: Path, fields: dict[str, Any], rows: list[dict[str, Any]], code: str, message: str
) -> None:
    jobs.worker.handle(StartJob("one", write_job(tmp_path / "one", rows, **fields)))
    jobs.worker.handle(StartJob("two", write_job(tmp_path / "two", steps=1)))
    (failed,) = jobs.wait("failed")
    assert failed.error is not None
    assert failed.error.code == code
    with pytest.raises(ValueError, match=message):
        raise ValueError(failed.error.message)
    assert jobs.wait("succeeded", job="two")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), "storage_full"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("a bug"), "internal_error"),
    ],
)
def test_a_full_disk_or_memory_fails_the_job_alone(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(trainer_module, "save_adapter", fail)
    jobs.worker.handle(StartJob("one", write_job(tmp_path / "one")))
    (failed,) = jobs.wait("failed")
    assert failed.error is not None
    assert failed.error.code == code
    monkeypatch.undo()
    jobs.worker.handle(StartJob("one", str(tmp_path / "one")))
    assert jobs.wait("succeeded")


def test_early_stopping_and_the_best_checkpoint(jobs: Jobs, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "steps": 200,
        "evaluate_every": 2,
        "patience": 3,
        "validation_fraction": 0.3,
        "learning_rate": 0.05,
    }
    jobs.worker.handle(StartJob("one", write_job(tmp_path / "one", checkpoint_every=100, **fields)))
    (last,) = jobs.wait("succeeded", "failed")
    losses = {each.data["step"]: each.data["valid_loss"] for each in jobs.seen if "valid_loss" in each.data}
    assert max(losses) < 200
    assert last.data["step"] == min(losses, key=lambda step: losses[step])
    assert max(losses) - last.data["step"] == 2 * 3
    assert "no better" in last.message


PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "zz"} for row in ROWS]
TEXTS = [{"text": f"{row['prompt']} is {row['completion']}. " * 5} for row in ROWS]


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"method": "dpo", "adapter": {"kind": "dora"}}, PAIRS),
        ({"method": "self_supervised", "max_length": 32}, TEXTS),
        ({"packing": True, "max_length": 64}, ROWS),
        ({"gradient_checkpointing": True, "accumulation": 2, "neftune_alpha": 5.0}, ROWS),
        ({"loss_on": "all", "adapter": {"kind": "lora+"}, "schedule": "cosine", "warmup_steps": 3}, ROWS),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_methods_and_settings_learn(
    jobs: Jobs, tmp_path: Path, fields: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    jobs.worker.handle(
        StartJob("one", write_job(tmp_path / "one", rows, steps=16, learning_rate=0.01, **fields))
    )
    (last,) = jobs.wait("succeeded", "failed")
    assert last.kind == "succeeded", last
    losses = [each.data["train_loss"] for each in jobs.seen if each.kind == "progress"]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_accumulated_micro_batches_are_the_whole_batch(jobs: Jobs, tmp_path: Path) -> None:
    common: dict[str, Any] = {"steps": 4, "adapter": {"rank": 4}}
    jobs.worker.handle(StartJob("one", write_job(tmp_path / "one", **common, batch_size=8)))
    jobs.worker.handle(StartJob("two", write_job(tmp_path / "two", **common, batch_size=2, accumulation=4)))
    found = [jobs.wait("succeeded", "failed", job=job)[0].data["folder"] for job in ("one", "two")]
    assert_same(*found)
