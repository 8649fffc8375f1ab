"""Exact match: does the model give the answer, word for word?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.training.formats import Row


@dataclass(frozen=True)
class ExactMatch:
    """How many rows were answered exactly (surrounding white space aside), and some that were not."""

    correct: int
    rows: int
    mistakes: tuple[dict[str, str], ...]

    @property
    def share(self) -> float:
        return self.correct / self.rows if self.rows else 0.0


def exact_match(rows: Sequence[Row], answers: Sequence[str], shown: int = 5) -> ExactMatch:
    """Compare answers with the rows' own; the first `shown` mistakes are kept."""
    wrong = [
        {"prompt": row.prompt[-1].content, "expected": row.answer, "got": answer}
        for row, answer in zip(rows, answers, strict=True)
        if answer.strip() != row.answer.strip()
    ]
    return ExactMatch(len(rows) - len(wrong), len(rows), tuple(wrong[:shown]))
