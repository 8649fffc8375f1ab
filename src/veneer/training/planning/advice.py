"""What to set for a training, from the size of its data and of the base. No torch; sources are in docs/plan.md.

    choices = advise(facts, "supervised", "lora")      # by field of a recipe, each with a reason

Rules of thumb: where to begin, no replacement for validation rows, which every recipe of more than a few rows gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from veneer.training.data.report import DataReport
from veneer.training.jobs.hyperparameters import LEARNING_RATE, Method

RANKED = ("lora", "rslora", "dora", "lora+", "adalora")
_BITS_PER_PARAMETER, _MARGIN = 2, 4
_LEAST_RANK, _MOST_RANK = 4, 256
_HIDDEN, _EXPONENT = 576, 0.82
_ALPHA = 16
_OWN_RATES = {"ia3": 3e-3, "prompt": 3e-2, "prefix": 1e-2, "p-tuning": 1e-3}
_LEAST_STEPS, _MOST_EPOCHS = 100, 15
_PIECE = 1024  # tokens of a sequence of plain text
_FEW_ROWS = 20
_OUTLIER = 4  # times the 95th percentile of the lengths


class Choice(NamedTuple):
    value: Any
    why: str


class Facts(NamedTuple):
    report: DataReport  # of the rows before any truncation
    lengths: Sequence[int]  # of each row in tokens; of a pair the longer one
    hidden_size: int
    context: int  # most tokens that the base takes
    numbers_per_rank: int  # of LoRA on all linear layers


def advise(facts: Facts, method: Method, kind: str) -> dict[str, Choice]:
    """Fields of a recipe; those of the adapter as `adapter.rank` and so on."""
    found = {"adapter.kind": Choice(kind, "as asked for")}
    if kind in RANKED:
        found["adapter.rank"] = _rank(facts)
        found["adapter.alpha"] = Choice(_ALPHA, "as in the runs that learning_rate is from")
        found["adapter.targets"] = Choice(
            "all-linear", "LoRA on all linear layers matches full tuning where attention alone does not"
        )
    batch = _batch_size(facts.report.rows)
    found["max_length"], found["overlong"] = _length(facts, method)
    found["learning_rate"] = _learning_rate(facts.hidden_size, method, kind)
    found["batch_size"] = batch
    found["epochs"] = _epochs(facts.report.rows, batch.value, method)
    found["schedule"] = Choice("cosine", "ends in small steps")
    if facts.report.rows >= _FEW_ROWS:
        found["validation_fraction"] = Choice(0.1, "the checkpoint of the least validation loss is kept")
    return found


def _rank(facts: Facts) -> Choice:
    tokens = facts.report.learnt_tokens
    needed = _MARGIN * tokens / (_BITS_PER_PARAMETER * facts.numbers_per_rank)
    rank = min(_MOST_RANK, max(_LEAST_RANK, 1 << math.ceil(math.log2(max(needed, 1)))))
    return Choice(
        rank,
        f"{tokens} learnt tokens of about 1 bit; a rank holds {_BITS_PER_PARAMETER * facts.numbers_per_rank} bits; "
        f"{_MARGIN} times that, from {_LEAST_RANK} to {_MOST_RANK}",
    )


def _learning_rate(hidden: int, method: Method, kind: str) -> Choice:
    if kind in _OWN_RATES:
        return Choice(_OWN_RATES[kind], f"what {kind} is usually trained with")
    rate = LEARNING_RATE[method] * (_HIDDEN / hidden) ** _EXPONENT
    why = f"LoRA's {LEARNING_RATE[method]:g} at hidden size {_HIDDEN}, less for wider bases (here {hidden})"
    if kind == "layers":
        rate, why = rate / 10, f"a tenth of {why}"
    elif kind not in RANKED:
        why += f"; {kind} has no rule of its own, so try its neighbours too"
    return Choice(float(f"{rate:.1e}"), why)


def _batch_size(rows: int) -> Choice:
    size = 8 if rows < 2000 else 16 if rows < 20_000 else 32
    return Choice(size, f"{rows} rows; adapters bear large batches badly")


def _epochs(rows: int, batch: int, method: Method) -> Choice:
    usual = 1 if method != "supervised" else 3 if rows < 100_000 else 2
    steps = max(1, rows // batch)
    if usual * steps >= _LEAST_STEPS:
        return Choice(float(usual), f"usual for {method} with {rows} rows")
    epochs = min(_MOST_EPOCHS, math.ceil(_LEAST_STEPS / steps))
    return Choice(
        float(epochs), f"so that {rows} rows give {epochs * steps} steps; at most {_MOST_EPOCHS} passes"
    )


def _length(facts: Facts, method: Method) -> tuple[Choice, Choice]:
    longest, p95 = max(facts.lengths), facts.report.percentiles["p95"]
    if method == "self_supervised":
        length = min(_PIECE, facts.context, _up(longest))
        return Choice(length, "texts are cut into pieces"), Choice("refuse", "no piece is too long")
    length = min(facts.context, _up(longest if longest <= _OUTLIER * p95 else _OUTLIER * p95))
    over = sum(each > length for each in facts.lengths)
    return (
        Choice(
            length,
            f"the longest row has {longest} tokens, 95 % at most {p95}; the base takes {facts.context}",
        ),
        Choice("drop", f"{over} rows would set the memory of all")
        if over
        else Choice("refuse", "none is longer"),
    )


def _up(length: int) -> int:
    return -(-length // 8) * 8
