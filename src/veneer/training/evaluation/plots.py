"""Plots of an evaluation as SVG: each metric with its interval, and what is wrong with the wrong answers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from veneer.training.evaluation.error_analysis import CATEGORIES, Category
from veneer.training.evaluation.evaluate import EvaluationResult
from veneer.training.evaluation.metrics import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart, and more of them lightened.
COLOURS: dict[Category | None, str] = {None: "#cfe8d8"} | dict(
    zip(
        CATEGORIES,
        (
            "#999999",
            "#000000",
            "#cc79a7",
            "#d55e00",
            "#56b4e9",
            "#e69f00",
            "#b35900",
            "#f0e442",
            "#009e73",
            "#0072b2",
            "#5d3a9b",
        ),
        strict=True,
    )
)


def metrics_plot(result: EvaluationResult) -> str:
    """One panel a metric, one line a model: the value and its 95 % interval."""
    metrics = list(result.models[0].metrics)

    def draw(figure: Figure) -> None:
        panels: Any = figure.subplots(1, len(metrics), sharey=True, squeeze=False)
        for axes, metric in zip(panels[0], metrics, strict=True):
            for line, model in enumerate(result.models):
                value, low, high, _ = model.metrics[metric]
                axes.hlines(line, low, high, color="#0072b2", linewidth=2)
                axes.plot(value, line, "o", color="#0072b2")
                axes.annotate(shown(metric, value), (0.02, line + 0.3), xycoords=("axes fraction", "data"))
            axes.set_title(metric)
            if metric != "perplexity":
                axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(len(result.models) - 0.4, -0.6)
            axes.grid(axis="x", alpha=0.3)
        panels[0][0].set_yticks(range(len(result.models)), [model.model for model in result.models])

    return _svg(draw, 2 + 2.6 * len(metrics), 1 + 0.6 * len(result.models))


def categories_plot(result: EvaluationResult) -> str:
    """A bar a model: the share of rows that are right, and of each category of wrong ones."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = [model.model for model in result.models]
        lefts = [0.0] * len(names)
        for category in (None, *CATEGORIES):
            counts = [sum(each.category == category for each in model.outcomes) for model in result.models]
            widths = [count / len(result.rows) for count in counts]
            if any(counts):
                label = category or "right"
                axes.barh(range(len(names)), widths, left=lefts, color=COLOURS[category], label=label)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="share of the rows")
        figure.legend(loc="outside right upper", frameon=False)

    return _svg(draw, 8, 1.4 + 0.5 * len(result.models))


def _svg(draw: Callable[[Figure], None], width: float, height: float) -> str:
    """What `draw` paints on a figure of this size (inches); the same picture is the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    # A model's name may have a $, which is not a formula.
    with matplotlib.rc_context({"svg.hashsalt": "veneer", "text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
