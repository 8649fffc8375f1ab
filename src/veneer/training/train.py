"""`veneer train RECIPE.yaml`: makes a LoRA adapter with PEFT and measures it on held-out rows.

Read from the top: recipe → rows → base → exact match before → steps → exact match after → files. The loop is
plain PyTorch over PEFT's model, reproducible from the recipe's seed on one machine. The output folder gets

    adapter_config.json  adapter_model.safetensors  loss.csv  loss.png  report.json
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from veneer.engine.source import resolve, served_name
from veneer.errors import Conflict, InvalidRequest, VeneerError
from veneer.training.data import Encoded, Row, check_apart, encode_all, read_rows, split_rows
from veneer.training.evaluation import ExactMatch, exact_match, pad
from veneer.training.recipe import Recipe, read_recipe
from veneer.training.report import Step, match_report, versions, write_losses

_IGNORED = -100  # the label that cross-entropy skips
_FILES = ("loss.csv", "loss.png", "report.json", "adapter_model.safetensors", "adapter_config.json")


def main(recipe_path: Path, *, overwrite: bool = False) -> Path:
    """Train what the recipe says and return the output folder.

    Raises:
        InvalidRequest: the recipe, the data or the base is wrong; nothing has been written.
        Conflict: the output folder holds an adapter and `overwrite` is not set.
    """
    recipe = read_recipe(recipe_path)
    if (recipe.output / "adapter_config.json").exists() and not overwrite:
        raise Conflict(
            f"{str(recipe.output)!r} already holds an adapter; choose another output or --overwrite"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for _deterministic; read at first use
    training_rows, test_rows = _rows(recipe)
    folder = resolve(recipe.base, revision=recipe.revision)
    tokenizer, base, stops = load_base(recipe, folder)
    training = encode_all(training_rows, tokenizer, recipe.template, stops, recipe.max_length)
    test = encode_all(test_rows, tokenizer, recipe.template, stops, recipe.max_length)
    model = add_lora(base, recipe)

    def measure(title: str) -> ExactMatch:
        settings = recipe.evaluation
        with tqdm(total=len(test), desc=title, unit="row", disable=not test) as bar:
            return exact_match(
                model,
                tokenizer,
                test_rows,
                test,
                stops,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                on_batch=bar.update,
            )

    with model.disable_adapter():
        before = measure("exact match before")
    with _deterministic(model.device):
        steps = _train(model, training, recipe, stops[0])
    _round_to(model, recipe.save_dtype)
    after = measure("exact match after")
    report = {
        "base": served_name(recipe.base),
        "recipe": _public(recipe),
        "data": {"training_rows": len(training), "held_out_rows": len(test)},
        "before": match_report(before),
        "after": match_report(after),
        "training": _training_report(steps, model),
        "device": _device_name(model.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    _write(model, recipe, steps, report)
    if test:
        print(
            f"exact match on {after.rows} held-out rows: {before.share:.1%} before, {after.share:.1%} after"
        )
    return recipe.output


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads"


def _rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    rows = read_rows(recipe.data)
    if recipe.test_data is not None:
        held_out = read_rows(recipe.test_data)
        check_apart(rows, held_out)
    elif recipe.test_fraction is not None:
        rows, held_out = split_rows(rows, recipe.test_fraction, recipe.seed)
    else:
        held_out = []
    return rows, held_out[: recipe.evaluation.rows]


def load_base(recipe: Recipe, folder: Path) -> tuple[Any, Any, list[int]]:
    """Tokenizer, frozen base on its device, and the tokens that end the model's turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veneer.engine.base import forbid_repacking, quantization_config, resolve_device, resolve_dtype

    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        base = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization_config(recipe.quantization, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise InvalidRequest(f"base {served_name(recipe.base)!r} cannot be loaded: {error}") from error
    forbid_repacking(base)
    configured = base.generation_config.eos_token_id
    stops = configured if isinstance(configured, list) else [configured]
    stops = [stop for stop in dict.fromkeys([tokenizer.eos_token_id, *stops]) if stop is not None]
    if not stops:
        raise InvalidRequest(
            f"base {served_name(recipe.base)!r} has no end-of-text token, so answers cannot end"
        )
    return tokenizer, base, stops


def add_lora(base: Any, recipe: Recipe) -> Any:
    """Wrap the base with PEFT; the same seed gives the same first weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    lora = recipe.adapter
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.kind == "rslora",
        target_modules=lora.targets,
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise InvalidRequest(f"adapter.targets {lora.targets!r}: {error}") from error
    config.target_modules = sorted(config.target_modules or ())  # a set's order changes from run to run
    # The file names the public base; a path of this machine means nothing elsewhere.
    config.base_model_name_or_path = served_name(recipe.base)
    return model


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


def _batches(count: int, recipe: Recipe) -> Iterator[list[int]]:
    """Batches of row numbers: every epoch is shuffled anew from the seed, the last batch may be short."""
    shuffle = random.Random(recipe.seed)
    while True:
        order = list(range(count))
        shuffle.shuffle(order)
        for start in range(0, count, recipe.batch_size):
            yield order[start : start + recipe.batch_size]


def _train(model: Any, rows: Sequence[Encoded], recipe: Recipe, padding: int) -> list[Step]:
    """Run the optimizer's steps with a progress bar; returns one record for each.

    Raises:
        InvalidRequest: the loss stopped being a number.
    """
    from transformers import get_scheduler

    total = recipe.steps or max(1, round((recipe.epochs or 0) * -(-len(rows) // recipe.batch_size)))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    kind = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
    schedule = get_scheduler(kind, optimizer, recipe.warmup_steps, total)
    torch.manual_seed(recipe.seed)  # for dropout
    model.train()
    steps: list[Step] = []
    tokens, begin = 0, time.monotonic()
    batches = _batches(len(rows), recipe)
    with tqdm(total=total, desc="training", unit="step") as bar:
        while len(steps) < total:
            rate = schedule.get_last_lr()[0]
            loss, count = _backward(model, [rows[place] for place in next(batches)], padding)
            if not math.isfinite(loss):
                raise InvalidRequest(
                    f"the loss is {loss} at step {len(steps) + 1}, so training has failed; lower "
                    f"learning_rate ({recipe.learning_rate}) or add warmup_steps"
                )
            torch.nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tokens += count
            seconds = time.monotonic() - begin
            steps.append(Step(len(steps) + 1, loss, rate, tokens, seconds))
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:.0f} tokens/s", refresh=False)
            bar.update()
    return steps


def _backward(model: Any, rows: Sequence[Encoded], padding: int) -> tuple[float, int]:
    """Add one batch's gradients; returns its loss and how many tokens it holds without padding."""
    ids, mask = pad([row.prompt + row.answer for row in rows], padding)
    labels, _ = pad([[_IGNORED] * len(row.prompt) + row.answer for row in rows], _IGNORED)
    device = model.device
    loss = model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
    loss.backward()
    return loss.item(), int(mask.sum())


def _round_to(model: Any, dtype: str) -> None:
    """Round the adapter to the precision of its file, so that what is measured is what is saved."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(getattr(torch, dtype)).to(weight.dtype)


def _public(recipe: Recipe) -> dict[str, Any]:
    """The recipe without this machine's paths."""
    fields = recipe.model_dump(mode="json", exclude={"output"}, exclude_unset=True)
    files = ("data", "validation_data", "test_data")
    names = {name: Path(fields[name]).name for name in files if fields.get(name) is not None}
    return {**fields, **names, "base": served_name(recipe.base)}


def _training_report(steps: Sequence[Step], model: Any) -> dict[str, Any]:
    last = steps[-1]
    return {
        "steps": last.step,
        "tokens": last.tokens,
        "seconds": round(last.seconds, 1),
        "tokens_per_second": round(last.tokens / last.seconds, 1),
        "first_loss": round(steps[0].loss, 4),
        "last_loss": round(last.loss, 4),
        "trainable_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad),
    }


def _write(model: Any, recipe: Recipe, steps: Sequence[Step], report: dict[str, Any]) -> None:
    """Write everything beside its place, then move it in; adapter_config.json goes first and comes last,
    so that an interruption never leaves one run's config beside another run's weights."""
    dtype = getattr(torch, recipe.save_dtype)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    recipe.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=recipe.output, prefix=".partial-") as name:
        partial = Path(name)
        model.save_pretrained(partial, save_embedding_layers=False)
        write_losses(steps, partial)
        (partial / "report.json").write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (recipe.output / "adapter_config.json").unlink(missing_ok=True)
        for file in _FILES:
            (partial / file).chmod(0o644)  # safetensors writes 0600
            with (partial / file).open("rb") as written:
                os.fsync(written.fileno())
            (partial / file).replace(recipe.output / file)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), overwrite="--overwrite" in sys.argv[2:])
    except VeneerError as error:
        sys.exit(f"error: {error.message}")
