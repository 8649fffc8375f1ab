"""One training from its files to its adapter, on a base that is resident: what a job and `veneer train` share.

Read from the top: rows → splits → tokens → data report → adapter on a view of the base → steps → report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from veneer.engine.view import Resident, trainable_view
from veneer.errors import InvalidRequest
from veneer.training.control import Control, turns
from veneer.training.data.collation import collate
from veneer.training.data.encoding import Encoded, Encoder
from veneer.training.data.formats import Pair, Row, Text
from veneer.training.data.report import DataReport, describe, lengths_of, plot_lengths
from veneer.training.data.rows import read_pairs, read_rows, read_texts
from veneer.training.data.splitting import check_apart, split
from veneer.training.data.truncation import fit, fit_pairs, pieces
from veneer.training.kinds import Setting, make_trainable
from veneer.training.recipe import HELD_OUT, Training
from veneer.training.report import training_report, write_losses
from veneer.training.trainer import Result, Rows, Trainer, total_steps

_EXAMPLES = 32  # batches for initialisations that look at the data


class Examples(NamedTuple):
    """Rows of one method, before and after they became tokens."""

    training: list[Any]
    validation: list[Any]
    test: list[Any]


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first step."""

    examples: Examples
    tokenizer: Any
    stops: list[int]
    rows: Rows
    validation: Rows
    report: DataReport
    encode: Callable[[Sequence[Any]], Sequence[Any]]  # further examples, at any length


def prepare(
    training: Training,
    resident: Resident,
    files: dict[str, Path],
    test_fraction: float | None = None,
    chat_template: str | None = None,
) -> Prepared:
    """Read and encode the rows in `files`: "training", perhaps "validation" and "test".

    `chat_template` takes the place of the base's.

    Raises:
        InvalidRequest: the rows are wrong, or the base cannot be trained on them; row or field is named.
    """
    tokenizer = AutoTokenizer.from_pretrained(resident.folder, trust_remote_code=False)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    stops = stops_of(tokenizer, resident)
    examples = _read(training, files, test_fraction)
    encoder = Encoder(tokenizer, stops, training.template, training.loss_on)
    rows, report = _encode(training, encoder, examples.training)
    validation = _encode(training, encoder, examples.validation)[0] if examples.validation else []
    return Prepared(
        examples, tokenizer, stops, rows, validation, report, lambda each: _whole(training, encoder, each)
    )


def stops_of(tokenizer: Any, resident: Resident) -> list[int]:
    """The tokens that end the model's turn, the tokenizer's own first. Raises InvalidRequest."""
    found = [tokenizer.eos_token_id, *resident.base.eos_token_ids]
    stops = [int(stop) for stop in dict.fromkeys(found) if stop is not None]
    if not stops:
        raise InvalidRequest(f"base {resident.name!r} has no end-of-text token, so answers cannot end")
    return stops


def run(
    training: Training, resident: Resident, prepared: Prepared, folder: Path, control: Control
) -> tuple[Result, dict[str, Any]]:
    """Train, and leave loss.csv, loss.png and data.png beside the checkpoints. Returns the result and its report.

    Raises:
        Stopped, InvalidRequest: as `Trainer.run`; or the adapter's fields do not fit the base.
    """
    control.report("validated", **prepared.report.to_dict())
    plot_lengths(prepared.report, folder / "data.png")
    view = trainable_view(resident.base)
    if training.gradient_checkpointing:
        view.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    setting = Setting(
        view=view,
        total_steps=total_steps(training, prepared.rows),
        base_name=resident.name,
        weights=resident.folder,
        examples=lambda: _examples(prepared, training, view.device),
    )
    trainable = make_trainable(training, setting)
    padding = prepared.stops[0]
    with turns(view, control):
        result = Trainer(
            training, trainable, prepared.rows, prepared.validation, padding, folder, control
        ).run()
    write_losses(result.steps, folder, result.validations)
    return result, training_report(result.steps, trainable)


def _read(training: Training, files: dict[str, Path], test_fraction: float | None) -> Examples:
    read: Any = {"supervised": read_rows, "self_supervised": read_texts, "dpo": read_pairs}[training.method]
    found: dict[str, list[Any]] = {name: read(path) for name, path in files.items()}
    rows = found["training"]
    for name in ("validation", "test"):
        if name in found:
            check_apart(rows, found[name])
    fraction = training.validation_fraction if "validation" not in found else None
    parts = split(
        rows,
        seed=training.seed,
        validation=fraction or 0.0,
        test=(test_fraction or 0.0) if "test" not in found else 0.0,
    )
    return Examples(parts.training, found.get("validation", parts.validation), found.get("test", parts.test))


def _encode(training: Training, encoder: Encoder, examples: Sequence[Any]) -> tuple[Rows, DataReport]:
    longest, policy = training.max_length, training.overlong
    whole = _whole(training, encoder, examples)
    fitted: Any
    if training.method == "self_supervised":
        fitted = pieces(whole, longest)
    elif training.method == "dpo":
        fitted = fit_pairs(whole, longest, policy, header=encoder.header)
    else:
        fitted = fit(whole, longest, policy, header=encoder.header)
    report = describe(
        examples, lengths_of(whole), max_length=longest, policy=policy, after=lengths_of(fitted.rows)
    )
    return fitted.rows, report


def _whole(training: Training, encoder: Encoder, examples: Sequence[Any]) -> list[Any]:
    one: Any = {"supervised": encoder.row, "self_supervised": encoder.text, "dpo": encoder.pair}[
        training.method
    ]
    return [one(example) for example in examples]


def _examples(prepared: Prepared, training: Training, device: torch.device) -> list[dict[str, torch.Tensor]]:
    size = training.batch_size
    rows: list[Encoded] = [row if isinstance(row, Encoded) else row.chosen for row in prepared.rows]
    starts = range(0, min(len(rows), _EXAMPLES * size), size)
    found = [collate(rows[start : start + size], prepared.stops[0]).to(device).inputs() for start in starts]
    return [{name: each for name, each in batch.items() if name != "labels"} for batch in found]


def write_held_out(folder: Path, examples: Sequence[Row | Text | Pair]) -> None:
    """Leave the validation rows for an evaluation (`recipe.HELD_OUT`). Of a pair it is the chosen answer."""
    lines = []
    for example in examples:
        if isinstance(example, Text):
            lines.append(json.dumps({"text": example.text}))
            continue
        turns = [{"role": turn.role, "content": turn.content} for turn in example.prompt]
        answer = example.answer if isinstance(example, Row) else example.chosen
        lines.append(json.dumps({"messages": [*turns, {"role": "assistant", "content": answer}]}))
    if lines:
        (folder / HELD_OUT).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    (folder / "report.json").write_text(
        json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
