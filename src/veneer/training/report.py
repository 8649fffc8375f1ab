"""What a training run leaves behind besides the adapter: the loss curve and the numbers."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from veneer import __version__
from veneer.training.evaluation import ExactMatch


class Step(NamedTuple):
    """One optimizer step. `loss` is the mean cross-entropy over the answer's tokens, in nats."""

    step: int
    loss: float
    learning_rate: float
    tokens: int  # seen so far, prompts included, padding not
    seconds: float  # since the first step began


def write_losses(steps: Sequence[Step], folder: Path) -> None:
    """Write loss.csv and loss.png."""
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Step._fields)
        for step in steps:
            writer.writerow(
                [
                    step.step,
                    f"{step.loss:.6f}",
                    f"{step.learning_rate:.3e}",
                    step.tokens,
                    f"{step.seconds:.2f}",
                ]
            )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=80, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    axes.plot([step.step for step in steps], [step.loss for step in steps], linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss on the answer (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png")


def versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("torch", "transformers", "peft")}
    return {"python": platform.python_version(), "veneer": __version__, **packages}


def match_report(match: ExactMatch) -> dict[str, Any]:
    return {
        "exact_match": round(match.share, 4),
        "correct": match.correct,
        "rows": match.rows,
        "mistakes": list(match.mistakes),
    }
