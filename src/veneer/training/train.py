"""`veneer train RECIPE.yaml`: makes an adapter and measures it on held-out rows.

Read from the top: recipe → base → rows → answers before → steps → answers after → files. The steps are those of a
fine-tuning job (job.py), on a base of this process; answers come from an engine on the same base. The output folder
gets

    adapter_config.json  adapter_model.safetensors  loss.csv  loss.png  data.png  report.json  evaluation.html

and while it trains `.training`, from which an interrupted run goes on. From Python: `main(Path("recipe.yaml"))`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from veneer.adapters.names import CONFIG_FILE, FILES
from veneer.adapters.staging import sync
from veneer.engine.base import Base, load_base, resolve_device, resolve_dtype, resolve_nf4_kernels
from veneer.engine.source import resolve, served_name
from veneer.engine.view import Resident
from veneer.errors import Conflict, InvalidRequest, VeneerError
from veneer.training.control import Control
from veneer.training.data.formats import Row
from veneer.training.evaluation.answers import Answers
from veneer.training.evaluation.evaluate import Answer, EvaluationResult, Generation, assess, metrics_for
from veneer.training.evaluation.gate import gate_passed
from veneer.training.evaluation.report import to_dict, to_html
from veneer.training.job import Prepared, prepare, run, write_report
from veneer.training.recipe import Recipe, read_recipe
from veneer.training.report import versions

WORK = ".training"
_TEMPLATE = "chat_template.jinja"
_EXTRA = ("loss.csv", "loss.png", "data.png", "report.json", "evaluation.html", _TEMPLATE)
_BASE, _TRAINED = "base", "trained"


def main(recipe_path: Path, *, overwrite: bool = False) -> Path:
    """Train what the recipe says and return the output folder.

    Raises:
        InvalidRequest: the recipe, the data or the base is wrong; no adapter has been written.
        Conflict: the output folder holds an adapter and `overwrite` is not set.
    """
    recipe = read_recipe(recipe_path)
    if (recipe.output / CONFIG_FILE).exists() and not overwrite:
        raise Conflict(
            f"{str(recipe.output)!r} already holds an adapter; choose another output or --overwrite"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for _deterministic; read at first use
    folder = resolve(recipe.base, revision=recipe.revision)
    resident = Resident(_load(recipe, folder), folder, served_name(recipe.base))
    files = {"training": recipe.data, "validation": recipe.validation_data, "test": recipe.test_data}
    prepared = prepare(
        recipe,
        resident,
        {name: path for name, path in files.items() if path is not None},
        recipe.test_fraction,
        _chat_template(recipe),
    )
    print(prepared.report)
    with _Measure(recipe, resident, prepared) as measure, _work_folder(recipe) as work:
        before = measure("before", None)
        with _deterministic(resident.base.device), _Bar() as control:
            result, trained = run(recipe, resident, prepared, work, control)
        after = measure("after", result.folder)
        evaluation = _evaluate(recipe, measure.rows, before, after)
        report = {
            "base": resident.name,
            "recipe": _public(recipe),
            "data": prepared.report.to_dict(),
            "training": {**trained, "result_step": result.step, "ended": result.why},
            **({} if evaluation is None else _measured(evaluation)),
            "device": _device_name(resident.base.device),
            "dtype": str(resident.base.dtype).removeprefix("torch."),
            "versions": versions(),
        }
        write_report(work, report)
        if evaluation is not None:
            (work / "evaluation.html").write_text(to_html(evaluation, {"recipe": recipe_path.name}), "utf-8")
        if recipe.chat_template is not None:
            shutil.copy(recipe.chat_template, work / _TEMPLATE)
        _put_in_place(work, result.folder, recipe.output)
    return recipe.output


def _evaluate(
    recipe: Recipe, rows: Sequence[Row], before: Sequence[Answer], after: Sequence[Answer]
) -> EvaluationResult | None:
    """Compare the base with the trained adapter on the held-out rows. Raises InvalidRequest for a missed gate."""
    gate = recipe.evaluation.gate
    if not rows:
        if gate is not None:
            raise InvalidRequest(
                "evaluation.gate: there are no held-out rows to measure it on; set test_fraction"
            )
        return None
    result = assess(rows, [_BASE, _TRAINED], metrics_for(rows), [before, after])
    shares = [result[name].metrics["exact_match"].value for name in (_BASE, _TRAINED)]
    print(f"exact match on {len(rows)} held-out rows: {shares[0]:.1%} before, {shares[1]:.1%} after")
    if gate is not None:
        decision = gate_passed(gate, result, new=_TRAINED, base=_BASE)
        if not decision.passed:
            raise InvalidRequest(f"the adapter is not kept: {decision.reason}", code="gate_not_passed")
    return result


def _measured(evaluation: EvaluationResult) -> dict[str, Any]:
    """The report's part on the held-out rows."""
    rows = len(evaluation.rows)
    correct = {
        model.model: sum(each.scores["exact_match"].value > 0 for each in model.outcomes)
        for model in evaluation.models
    }
    sides = {"before": _BASE, "after": _TRAINED}
    return {
        **{
            side: {"rows": rows, "correct": correct[model], "exact_match": round(correct[model] / rows, 4)}
            for side, model in sides.items()
        },
        "evaluation": to_dict(evaluation, {"rows": "held out"}),
    }


def _chat_template(recipe: Recipe) -> str | None:
    if recipe.chat_template is None:
        return None
    try:
        return recipe.chat_template.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"chat_template {str(recipe.chat_template)!r} cannot be read: {error}"
        ) from error


def _load(recipe: Recipe, folder: Path) -> Base:
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device)
    return load_base(
        folder,
        quantization=recipe.quantization,
        dtype=dtype,
        device=device,
        own_kernels=resolve_nf4_kernels("auto", recipe.quantization, dtype, device),
    )


@contextmanager
def _work_folder(recipe: Recipe) -> Iterator[Path]:
    """Where the training keeps its state: that of an interrupted run of the same recipe, or a new one.

    A training that fails leaves nothing, so that it can be tried again.
    """
    work = recipe.output / WORK
    mark = json.dumps({**_public(recipe), "data_bytes": recipe.data.stat().st_size}, sort_keys=True)
    if not (work / "recipe.json").exists() or (work / "recipe.json").read_text() != mark:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / "recipe.json").write_text(mark)
    try:
        yield work
    except VeneerError:
        shutil.rmtree(work)
        with suppress(OSError):
            recipe.output.rmdir()  # nothing else is in it
        raise


class _Measure:
    """Answers to the held-out rows, of the base or of an adapter's folder. A context manager."""

    def __init__(self, recipe: Recipe, resident: Resident, prepared: Prepared) -> None:
        self._settings = recipe.evaluation
        self._decode = prepared.tokenizer.decode
        is_answered = recipe.method == "supervised"
        self.rows: list[Row] = prepared.examples.test[: self._settings.rows] if is_answered else []
        self._prompts = [each.prompt for each in prepared.encode(self.rows)]
        longest = max(map(len, self._prompts), default=1) + self._settings.max_new_tokens
        self._answers = (
            Answers(resident.base, resident.folder, longest=longest, batch_size=self._settings.batch_size)
            if self.rows
            else None
        )

    def __enter__(self) -> _Measure:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._answers is not None:
            self._answers.__exit__(None, None, None)

    def __call__(self, title: str, adapter: Path | None) -> list[Answer]:
        if self._answers is None:
            return []
        key = None if adapter is None else self._answers.add(adapter)
        most = self._settings.max_new_tokens
        with tqdm(total=len(self.rows), desc=f"answers {title}", unit="row") as bar:
            found = self._answers.generate(self._prompts, key, most, bar.update)
        texts = [self._decode(tokens, skip_special_tokens=True) for tokens in found]
        return [
            Answer(Generation(text, "length" if len(tokens) == most else "stop"))
            for text, tokens in zip(texts, found, strict=True)
        ]


class _Bar:
    """A training's control that shows a progress bar and never waits. A context manager."""

    def __enter__(self) -> Control:
        self._bar = tqdm(desc="training", unit="step")
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def turn(self) -> None:
        pass

    def report(self, kind: str, message: str = "", **data: Any) -> None:
        if kind == "progress":
            self._bar.total = data["total_steps"]
            rate = data["tokens"] / max(data["seconds"], 1e-9)
            valid = f", validation {data['valid_loss']:.3f}" if "valid_loss" in data else ""
            text = f"loss {data['train_loss']:.3f}{valid}, {rate:.0f} tokens/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(data["step"] - self._bar.n)
        elif kind == "notice":
            self._bar.write(message)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA, take the kernels that add in a fixed order, so that a seed gives one adapter there too."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads"


def _public(recipe: Recipe) -> dict[str, Any]:
    """The recipe without this machine's paths."""
    fields = recipe.model_dump(mode="json", exclude={"output"}, exclude_unset=True)
    files = ("data", "validation_data", "test_data", "chat_template")
    names = {name: Path(fields[name]).name for name in files if fields.get(name) is not None}
    return {**fields, **names, "base": served_name(recipe.base)}


def _put_in_place(work: Path, adapter: Path, output: Path) -> None:
    """Move everything in; adapter_config.json goes first and comes last, so that an interruption never leaves
    one run's config beside another run's weights."""
    (output / CONFIG_FILE).unlink(missing_ok=True)
    extra = [work / name for name in _EXTRA if (work / name).exists()]
    sources = extra + [adapter / name for name in reversed(FILES)]
    for source in sources:
        source.chmod(0o644)
        sync(source)
        source.replace(output / source.name)
    shutil.rmtree(work)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), overwrite="--overwrite" in sys.argv[2:])
    except VeneerError as error:
        sys.exit(f"error: {error.message}")
