"""What a data set is, before anything is trained on it: counts, duplicates, lengths, what truncation will do.

    lengths = [Length(row.length, row.learnt) for row in encoded]      # or rough_lengths(rows, count_tokens)
    report = describe(rows, lengths, max_length=512, policy="keep_end", after=lengths_of(fitted.rows))
    print(report)             # a few lines of text
    report.to_dict()          # JSON
    plot_lengths(report, path)

Without torch, so that an upload can be described where it arrives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from veneer.training.data.encoding import Encoded, EncodedPair
from veneer.training.data.formats import Example, Row, Text
from veneer.training.data.truncation import Policy

_BINS = 20
_PERCENTILES = (50, 90, 95, 99, 100)


class Length(NamedTuple):
    """Tokens of one sequence, and how many of them are learnt."""

    tokens: int
    learnt: int


def lengths_of(rows: Sequence[Encoded] | Sequence[EncodedPair]) -> list[Length]:
    """The lengths of encoded rows; a pair has two."""
    flat = [part for row in rows for part in ([row] if isinstance(row, Encoded) else row)]
    return [Length(row.length, row.learnt) for row in flat]


def rough_lengths(rows: Sequence[Example], count: Callable[[str], int]) -> list[Length]:
    """Lengths without a chat template: the tokens that `count` finds in the contents alone."""
    found = []
    for row in rows:
        if isinstance(row, Text):
            found.append(Length(tokens := count(row.text), tokens))
            continue
        turns = [count(turn.content) for turn in row.prompt]
        answers = (row.answer,) if isinstance(row, Row) else (row.chosen, row.rejected)
        learnt = zip(turns, row.prompt, strict=True)
        earlier = sum(tokens for tokens, turn in learnt if turn.role == "assistant" and turn.weight)
        earlier = earlier if isinstance(row, Row) else 0
        for answer in map(count, answers):
            found.append(Length(sum(turns) + answer, earlier + answer))
    return found


class Histogram(NamedTuple):
    """`counts[i]` sequences have at least `edges[i]` and fewer than `edges[i + 1]` tokens."""

    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class DataReport:
    rows: int
    formats: dict[str, int]
    exact_duplicates: int  # rows that an earlier row equals
    repeated_questions: int  # rows that ask what an earlier row asks, exact duplicates among them
    empty_answers: int  # rows that reading left out for that
    with_system_prompt: int
    system_prompts: int  # different ones
    multi_turn: int  # rows with earlier answers
    sequences: int  # a pair has two
    mean_length: float
    percentiles: dict[str, int]  # of the length in tokens, before truncation
    histogram: Histogram
    max_length: int | None
    policy: Policy
    too_long: int  # sequences over max_length
    tokens_per_epoch: int  # after truncation
    learnt_tokens: int  # of these

    @property
    def learnt_share(self) -> float:
        return self.learnt_tokens / self.tokens_per_epoch if self.tokens_per_epoch else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = asdict(self)
        found["histogram"] = self.histogram._asdict()
        return {
            **found,
            "mean_length": round(self.mean_length, 2),
            "learnt_share": round(self.learnt_share, 4),
        }

    def __str__(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        lengths = ", ".join(f"{name} {tokens}" for name, tokens in self.percentiles.items())
        lines = [
            f"{self.rows} rows ({formats}): {self.exact_duplicates} exact duplicates, {self.repeated_questions} "
            f"repeated questions, {self.empty_answers} empty answers, {self.multi_turn} with several answers",
            f"{self.with_system_prompt} rows with a system prompt ({self.system_prompts} different)",
            f"length in tokens: mean {self.mean_length:.1f}, {lengths}",
            f"{self.tokens_per_epoch} tokens an epoch, {self.learnt_tokens} of them learnt "
            f"({self.learnt_share:.1%})",
        ]
        if self.max_length is not None:
            share = self.too_long / self.sequences if self.sequences else 0.0
            lines.append(
                f"{self.too_long} sequences ({share:.1%}) are longer than max_length {self.max_length}; "
                f"policy: {self.policy}"
            )
        return "\n".join(lines)


def describe(
    rows: Sequence[Example],
    lengths: Sequence[Length],
    *,
    max_length: int | None = None,
    policy: Policy = "refuse",
    after: Sequence[Length] | None = None,
    empty_answers: int = 0,
) -> DataReport:
    """Describe rows by the lengths of their sequences before truncation and, where it happened, `after` it."""
    asked = Counter(row.key for row in rows)
    whole = Counter(row._replace(where="") for row in rows)
    prompts = [() if isinstance(row, Text) else row.prompt for row in rows]
    system = [prompt[0].content for prompt in prompts if prompt and prompt[0].role in ("system", "developer")]
    tokens = sorted(length.tokens for length in lengths)
    trained = lengths if after is None else after
    return DataReport(
        rows=len(rows),
        formats=dict(Counter(str(row.format) for row in rows)),
        exact_duplicates=len(rows) - len(whole),
        repeated_questions=len(rows) - len(asked),
        empty_answers=empty_answers,
        with_system_prompt=len(system),
        system_prompts=len(set(system)),
        multi_turn=sum(any(turn.role == "assistant" for turn in prompt) for prompt in prompts),
        sequences=len(lengths),
        mean_length=sum(tokens) / len(tokens) if tokens else 0.0,
        percentiles={_percentile_name(share): _percentile(tokens, share) for share in _PERCENTILES},
        histogram=_histogram(tokens),
        max_length=max_length,
        policy=policy,
        too_long=sum(length > max_length for length in tokens) if max_length is not None else 0,
        tokens_per_epoch=sum(length.tokens for length in trained),
        learnt_tokens=sum(length.learnt for length in trained),
    )


def _percentile_name(share: int) -> str:
    return "max" if share == 100 else f"p{share}"


def _percentile(ordered: Sequence[int], share: int) -> int:
    """By nearest rank: the least length that `share` percent of the sequences do not exceed."""
    return ordered[max(0, ceil(len(ordered) * share / 100) - 1)] if ordered else 0


def _histogram(tokens: Sequence[int]) -> Histogram:
    width = max(1, ceil((max(tokens, default=0) + 1) / _BINS))
    bins = Counter(length // width for length in tokens)
    counts = [bins[place] for place in range(max(bins, default=0) + 1)]
    return Histogram([place * width for place in range(len(counts) + 1)], counts)


def plot_lengths(report: DataReport, path: Path) -> None:
    """Draw the histogram of lengths as PNG, with max_length as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edges, counts = report.histogram
    figure = Figure(figsize=(6, 3.5), dpi=80, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    axes.bar(
        edges[:-1],
        counts,
        width=[high - low for low, high in pairwise(edges)],
        align="edge",
    )
    if report.max_length is not None:
        axes.axvline(report.max_length, color="tab:red", label=f"max_length {report.max_length}")
        axes.legend()
    axes.set(xlabel="length (tokens)", ylabel="sequences")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")
