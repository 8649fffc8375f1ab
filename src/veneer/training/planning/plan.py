"""`veneer plan --data FILE`: what to set, what it will take, and a recipe that `veneer train` takes.

Read from the top: rows → lengths → choices (advice.py) → footprints (footprint.py) → what does not fit → text. The
text is the recipe itself, everything else is in its comments: `veneer plan … > recipe.yaml` is ready to train.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer

from veneer.engine.base import PROVEN
from veneer.engine.source import describe as describe_base
from veneer.engine.weight_sizes import empty_model, quantized_linears
from veneer.errors import InvalidRequest
from veneer.training.data.encoding import Encoder
from veneer.training.data.report import DataReport, describe, lengths_of
from veneer.training.data.rows import read_pairs, read_rows, read_texts, validate
from veneer.training.jobs.hyperparameters import Method
from veneer.training.planning.advice import Choice, Facts, advise
from veneer.training.planning.footprint import Footprint, Load, Machine, Work, predict
from veneer.training.recipe import Recipe, faults

_GIB = 1 << 30
_CALIBRATION = 2.0  # seconds


class Rate(NamedTuple):
    """What the device does in a second: operations of matrix products, bytes; no bytes if that is not known."""

    products: float
    moved: float | None

    def seconds(self, work: Work) -> float:
        return work.products / self.products + (work.moved / self.moved if self.moved else 0.0)


class Data(NamedTuple):
    method: Method
    report: DataReport
    lengths: list[int]  # of each row; of a pair the longer one


@dataclass(frozen=True)
class Way:
    """One way to train, and what it takes."""

    name: str
    gradient_checkpointing: bool
    footprint: Footprint
    seconds: float | None  # of all steps


def main(arguments: argparse.Namespace) -> int:
    """Raises InvalidRequest for data, base or options that cannot be planned for."""
    config, folder = _config(arguments.base)
    data = _read(arguments.data, arguments.method, folder)
    machine = Machine(_device(arguments.device), arguments.quantization or "none")
    choices = advise(_facts(config, data), data.method, arguments.kind)
    choices |= {
        field: Choice(value, "as asked for")
        for field in ("adapter.rank", "batch_size", "max_length")
        if (value := getattr(arguments, field.removeprefix("adapter."))) is not None
    }
    fields = _fields(arguments, data.method, choices)
    memory = arguments.memory or _memory(machine.device)
    machine, changes = _fitted(fields, config, data, machine, memory, arguments.quantization is None)
    rate = _rate(machine.device, arguments.tflops, arguments.bandwidth)
    ways = _ways(fields, config, data, machine, rate)
    fields["quantization"] = machine.quantization
    recipe = _recipe(fields)
    if arguments.json:
        print(json.dumps(_as_json(data, choices, ways, changes, recipe, machine, memory), indent=2))
    else:
        print(_text(data, choices, ways, changes, fields, machine, memory, rate))
    return 0


# ---- what there is ------------------------------------------------------------------------------


def _config(base: str | None) -> tuple[Any, Path]:
    folder = describe_base(base)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type not in PROVEN:
        raise InvalidRequest(
            f"architecture {config.model_type!r} is not trained here; choose a base of {', '.join(PROVEN)}",
            param="base",
        )
    return config, folder


def _read(path: Path, method: Method | None, folder: Path) -> Data:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise InvalidRequest(
            "the base's tokenizer has no end-of-text token, so answers cannot end", param="base"
        )
    by_format: Mapping[str | None, Method] = {"text": "self_supervised", "preference": "dpo"}
    method = method or by_format.get(validate(path).format, "supervised")
    template: Literal["chat", "none"] = (
        "none" if method == "self_supervised" or not tokenizer.chat_template else "chat"
    )
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id], template)
    encoded: list[Any]
    examples: Sequence[Any]
    if method == "self_supervised":
        examples = read_texts(path)
        encoded = [encoder.text(each) for each in examples]
    elif method == "dpo":
        examples = read_pairs(path)
        encoded = [encoder.pair(each) for each in examples]
    else:
        examples = read_rows(path)
        encoded = [encoder.row(each) for each in examples]
    return Data(method, describe(examples, lengths_of(encoded)), [each.length for each in encoded])


def _facts(config: Any, data: Data) -> Facts:
    linears = dict(quantized_linears(empty_model(config, torch.float32))).values()
    per_rank = sum(each.in_features + each.out_features for each in linears)
    positions = int(config.max_position_embeddings)
    return Facts(data.report, data.lengths, int(config.hidden_size), positions, per_rank)


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _memory(device: str) -> int | None:
    """Bytes of this machine's device; None for a GPU that is not here."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _rate(device: str, tflops: float | None, bandwidth: float | None) -> Rate | None:
    """As told, or measured on this device in two seconds."""
    if tflops is not None:
        return Rate(tflops * 1e12, None if bandwidth is None else bandwidth * 1e9)
    if device == "cuda" and not torch.cuda.is_available():
        return None
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    square = torch.ones(side, side, dtype=dtype, device=device)
    out, copied = torch.empty_like(square), torch.empty(1 << 24, device=device)
    products = _per_second(lambda: torch.mm(square, square, out=out), device)
    return Rate(2 * side**3 * products, 2 * copied.nbytes * _per_second(lambda: copied.mul_(1.0), device))


def _per_second(call: Any, device: str) -> float:
    def done() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    call()
    start, count = done(), 0
    while (now := done()) - start < _CALIBRATION / 2:
        call()
        count += 1
    return count / (now - start)


# ---- what it takes ------------------------------------------------------------------------------


def _fields(arguments: argparse.Namespace, method: Method, choices: Mapping[str, Choice]) -> dict[str, Any]:
    """The recipe, as YAML will have it."""
    adapter = {
        name.removeprefix("adapter."): choice.value
        for name, choice in choices.items()
        if name.startswith("adapter.")
    }
    return {
        **({} if arguments.base is None else {"base": arguments.base}),
        "data": str(arguments.data),
        "output": f"{arguments.data.name.split('.')[0]}-adapter",
        "method": method,
        **({"template": "none", "loss_on": "all"} if method == "self_supervised" else {}),
        "device": _device(arguments.device),
        "adapter": adapter,
        **{name: choice.value for name, choice in choices.items() if not name.startswith("adapter.")},
    }


def _recipe(fields: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequest(f"the plan's recipe: {faults(Recipe, error)}") from error


def _lengths(recipe: Recipe, data: Data) -> list[int]:
    """Of the sequences that are trained on."""
    most = recipe.max_length
    if recipe.method != "self_supervised":
        kept = [each for each in data.lengths if each <= most or recipe.overlong != "drop"]
        return [min(each, most) for each in kept]
    pieces = [[most] * (each // most) + [each % most] for each in data.lengths]
    return [each for piece in pieces for each in piece if each]


def _largest(recipe: Recipe, data: Data) -> Load:
    """The micro-batch with the longest row."""
    lengths = _lengths(recipe, data)
    return Load(recipe.batch_size, max(lengths), recipe.batch_size > 1 and len(set(lengths)) > 1)


def _tokens(recipe: Recipe, data: Data) -> int:
    """Tokens of an epoch, padding of its micro-batches included."""
    lengths = _lengths(recipe, data)
    random.Random(0).shuffle(lengths)
    size = recipe.batch_size
    parts = [lengths[at : at + size] for at in range(0, len(lengths), size)]
    return sum(len(part) * max(part) for part in parts)


def _fitted(
    fields: dict[str, Any], config: Any, data: Data, machine: Machine, memory: int | None, free: bool
) -> tuple[Machine, list[str]]:
    """Change `fields` until the training fits; says what was changed. `free`: the base may be quantized."""
    changes: list[str] = []
    while True:
        recipe = _recipe(fields)
        needed = predict(recipe, config, machine, _largest(recipe, data)).total
        if memory is None or needed <= memory:
            return machine, changes
        short = f"{needed / _GIB:.2f} GiB do not fit into {memory / _GIB:.2f} GiB"
        if not recipe.gradient_checkpointing:
            fields["gradient_checkpointing"] = True
            changes.append(f"{short}: gradient_checkpointing is on")
        elif free and machine.quantization == "none":
            machine = machine._replace(quantization="nf4")
            changes.append(f"{short}: quantization none -> nf4")
        elif recipe.batch_size > 1:
            fields["batch_size"] = recipe.batch_size // 2
            fields["accumulation"] = -(-recipe.batch_size * recipe.accumulation // fields["batch_size"])
            changes.append(
                f"{short}: batch_size {recipe.batch_size} -> {fields['batch_size']}, "
                f"accumulation {fields['accumulation']}"
            )
        else:
            changes.append(f"{short}: {_shorter(recipe, config, data, machine, memory)}")
            return machine, changes


def _shorter(recipe: Recipe, config: Any, data: Data, machine: Machine, memory: int) -> str:
    """What to do when one row is too much."""
    length = _largest(recipe, data).length
    while length > 8:
        length //= 2
        if predict(recipe, config, machine, Load(1, length, padded=False)).total <= memory:
            return f"max_length must be {length} or less, with overlong: drop, keep_start or keep_end"
    return "not even short rows do; take a smaller base or more memory"


def _ways(fields: dict[str, Any], config: Any, data: Data, machine: Machine, rate: Rate | None) -> list[Way]:
    """The chosen kind on the plain and on the NF4 base, and full tuning; each with and without checkpointing."""
    recipe = _recipe(fields)
    layers = list(range(config.num_hidden_layers))
    full = recipe.model_copy(
        update={"adapter": type(recipe.adapter).model_validate({"kind": "layers", "layers": layers})}
    )
    kind = recipe.adapter.kind
    names = {"lora": ("LoRA", "QLoRA")}.get(kind, (kind, f"{kind} on NF4"))
    ways = [(names[0], recipe, "none"), (names[1], recipe, "nf4"), ("full", full, "none")]
    found, load = [], _largest(recipe, data)
    for name, training, quantization in ways:
        for checkpointing in (False, True):
            chosen = training.model_copy(update={"gradient_checkpointing": checkpointing})
            place = machine._replace(quantization=quantization)
            footprint = predict(chosen, config, place, load)
            seconds = None if rate is None else _seconds(chosen, data, rate, load, footprint)
            found.append(Way(name, checkpointing, footprint, seconds))
    return found


def _seconds(recipe: Recipe, data: Data, rate: Rate, load: Load, footprint: Footprint) -> float:
    """Of all steps, taking work for proportional to tokens."""
    share = (recipe.epochs or 1.0) * (1 - (recipe.validation_fraction or 0.0))
    batches = share * _tokens(recipe, data) / (load.rows * load.length)
    steps = share * len(_lengths(recipe, data)) / (recipe.batch_size * recipe.accumulation)
    return rate.seconds(footprint.micro_batch.times(batches) + footprint.optimizer.times(steps))


# ---- what is said -------------------------------------------------------------------------------


def _as_json(
    data: Data,
    choices: Mapping[str, Choice],
    ways: Sequence[Way],
    changes: Sequence[str],
    recipe: Recipe,
    machine: Machine,
    memory: int | None,
) -> dict[str, Any]:
    return {
        "data": data.report.to_dict(),
        "suggestions": {name: choice._asdict() for name, choice in choices.items()},
        "device": machine.device,
        "memory_bytes": memory,
        "changes": list(changes),
        "predictions": [
            {
                "way": way.name,
                "gradient_checkpointing": way.gradient_checkpointing,
                "peak_bytes": way.footprint.total,
                "fits": None if memory is None else way.footprint.total <= memory,
                "seconds": way.seconds,
                **asdict(way.footprint),
            }
            for way in ways
        ],
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
    }


def _text(
    data: Data,
    choices: Mapping[str, Choice],
    ways: Sequence[Way],
    changes: Sequence[str],
    fields: Mapping[str, Any],
    machine: Machine,
    memory: int | None,
    rate: Rate | None,
) -> str:
    limit = "" if memory is None else f", {memory / _GIB:.1f} GiB"
    lines = [*str(data.report).splitlines(), "", f"peak memory on {machine.device}{limit}:"]
    lines += [_line(way, memory) for way in ways]
    lines += [_about_time(rate), ""]
    lines += [f"{name}: {choice.value} - {choice.why}" for name, choice in choices.items()]
    lines += ["", *changes] if changes else []
    body = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return "\n".join(f"# {line}".rstrip() for line in lines) + f"\n{body}".rstrip()


def _line(way: Way, memory: int | None) -> str:
    footprint = way.footprint
    name = f"{way.name}{' + checkpointing' if way.gradient_checkpointing else ''}"
    parts = f"weights {footprint.weights / _GIB:.2f}, state {footprint.state / _GIB:.2f}"
    seconds = "" if way.seconds is None else f", about {way.seconds / 60:.1f} min"
    fits = "" if memory is None or footprint.total <= memory else "  DOES NOT FIT"
    return (
        f"  {name:26}{footprint.total / _GIB:8.2f} GiB ({parts}, step {footprint.step / _GIB:.2f}; "
        f"{footprint.parameters} trained numbers){seconds}{fits}"
    )


def _about_time(rate: Rate | None) -> str:
    if rate is None:
        return "no time: this device is not here; give its rate with --tflops"
    bytes_ = "products alone" if rate.moved is None else f"{rate.moved / 1e9:.1f} GB/s"
    return (
        f"times are estimates, by {rate.products / 1e12:.3f} TFLOP/s and {bytes_}; evaluation is not in them"
    )
