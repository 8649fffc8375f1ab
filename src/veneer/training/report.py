"""What a training run leaves behind besides the adapter: the loss curve and the numbers."""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from veneer import __version__
from veneer.training.trainable import Trainable, parameters


class Step(NamedTuple):
    """One optimizer step. `loss` is the mean cross-entropy over the answer's tokens, in nats."""

    step: int
    loss: float
    learning_rate: float
    tokens: int  # seen so far, prompts included, padding not
    seconds: float  # since the first step began


def write_losses(steps: Sequence[Step], folder: Path, validations: Mapping[int, float] | None = None) -> None:
    """Write loss.csv and loss.png; `validations` are mean losses on the validation rows, by step."""
    validations = validations or {}
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Step._fields, *(["valid_loss"] if validations else [])])
        for step in steps:
            writer.writerow(
                [
                    step.step,
                    f"{step.loss:.6f}",
                    f"{step.learning_rate:.3e}",
                    step.tokens,
                    f"{step.seconds:.2f}",
                    *([_loss(validations.get(step.step))] if validations else []),
                ]
            )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=80, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    axes.plot([step.step for step in steps], [step.loss for step in steps], linewidth=1.2, label="training")
    if validations:
        axes.plot(
            list(validations), list(validations.values()), marker=".", linewidth=1.2, label="validation"
        )
        axes.legend()
    axes.set(xlabel="step", ylabel="loss on the answer (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png")


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def training_report(steps: Sequence[Step], trainable: Trainable) -> dict[str, Any]:
    last = steps[-1]
    return {
        "steps": last.step,
        "tokens": last.tokens,
        "seconds": round(last.seconds, 1),
        "tokens_per_second": round(last.tokens / last.seconds, 1),
        "first_loss": round(steps[0].loss, 4),
        "last_loss": round(last.loss, 4),
        "trainable_parameters": sum(each.numel() for each in parameters(trainable).values()),
    }


def versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("torch", "transformers", "peft")}
    return {"python": platform.python_version(), "veneer": __version__, **packages}
