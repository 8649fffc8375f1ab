"""Peak memory of short trainings beside what `veneer plan` predicts: op `memory`.

python -m benchmarks.memory [--cases lora,dpo] [--base MODEL] [--output benchmarks/results]

Each case is a training of two steps in a process of its own. Measured is, on CUDA,
`torch.cuda.max_memory_allocated`; on the CPU the weights and what PyTorch's allocator handed out beyond them at its
peak, as its profiler saw it: exact where a resident set is not. A row's times are of the second step: measured, and
as floor the estimate of `veneer plan`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.device import Ceilings, Row, measure_ceilings, write_report
from transformers import AutoConfig

from veneer.engine.base import Base, load_base, resolve_device, resolve_dtype, resolve_nf4_kernels
from veneer.engine.source import resolve, served_name
from veneer.engine.view import trainable_view
from veneer.training.data.encoding import Encoded, EncodedPair
from veneer.training.kinds import Setting, make_trainable
from veneer.training.planning.footprint import Load, Machine, predict
from veneer.training.recipe import Adapter, Training
from veneer.training.trainer import Rows, Trainer

STEPS = 2
GOAL = 0.15


class Case(NamedTuple):
    load: Load = Load(2, 192)
    quantization: str = "none"
    adapter: Mapping[str, Any] = {}
    fields: Mapping[str, Any] = {}
    all_layers: bool = False

    def training(self, layers: int) -> Training:
        chosen = {"layers": list(range(layers))} if self.all_layers else {}
        return Training(
            adapter=Adapter(**{**self.adapter, **chosen}),
            steps=STEPS,
            batch_size=self.load.rows,
            max_length=self.load.length,
            **self.fields,
        )


CKPT = {"gradient_checkpointing": True}
CASES: Mapping[str, Case] = {
    "lora": Case(),
    "rows-4": Case(Load(4, 192)),
    "length-384": Case(Load(1, 384, padded=False)),
    "rank-64": Case(adapter={"rank": 64}),
    "nf4": Case(quantization="nf4"),
    "checkpointing": Case(fields=CKPT),
    "nf4-short": Case(Load(1, 48, padded=False), quantization="nf4"),
    "nf4-checkpointing": Case(quantization="nf4", fields=CKPT),
    "accumulation": Case(fields={"accumulation": 2}),
    "packing": Case(fields={"packing": True}),
    "neftune-dropout": Case(adapter={"dropout": 0.1}, fields={"neftune_alpha": 5.0}),
    "dpo": Case(Load(1, 192), fields={"method": "dpo"}),
    "dpo-checkpointing": Case(Load(2, 192), fields={"method": "dpo", **CKPT}),
    "dora": Case(adapter={"kind": "dora"}),
    "ia3": Case(adapter={"kind": "ia3"}),
    "prefix": Case(adapter={"kind": "prefix"}),
    "bottleneck": Case(adapter={"kind": "bottleneck"}),
    "full": Case(Load(1, 192), adapter={"kind": "layers"}, all_layers=True),
    "full-checkpointing": Case(Load(1, 192), adapter={"kind": "layers"}, all_layers=True, fields=CKPT),
}


class Quiet:
    """A control that keeps nothing and never waits."""

    def report(self, kind: str, message: str = "", **data: Any) -> None:
        pass

    def turn(self) -> None:
        pass


def rows_of(case: Case, vocabulary: int) -> Rows:
    """Rows for all steps, the first of each batch as long as the load says and the others shorter, if padded."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    count = STEPS * case.load.rows * int(case.fields.get("accumulation", 1))
    lengths = [case.load.length - (3 if case.load.padded and place % 2 else 0) for place in range(count)]
    if case.fields.get("packing"):  # two rows a sequence
        halves = [half for length in lengths for half in (length // 2, length - length // 2)]
        return [Encoded([], tokens(half)) for half in halves]
    if case.fields.get("method") == "dpo":
        return [
            EncodedPair(Encoded([5], tokens(n - 1)), Encoded([5], tokens(n - 1 - 3 * case.load.padded)))
            for n in lengths
        ]
    return [Encoded([], tokens(length)) for length in lengths]


def measure(case: Case, model: str | None) -> dict[str, Any]:
    """Train in this process; `peak_bytes` and seconds of the last step."""
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    folder = resolve(model)
    own = resolve_nf4_kernels("auto", case.quantization, dtype, device)
    base = load_base(folder, quantization=case.quantization, dtype=dtype, device=device, own_kernels=own)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        seconds = train(case, base, folder)
        return {"peak_bytes": torch.cuda.max_memory_allocated(device), "seconds": seconds}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as found:
        seconds = train(case, base, folder)
    return {"peak_bytes": base.memory_bytes() + _allocated(found), "seconds": seconds}


def train(case: Case, base: Base, folder: Path) -> float:
    training = case.training(base.num_layers)
    view = trainable_view(base)
    if training.gradient_checkpointing:
        view.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = make_trainable(training, Setting(view, STEPS, "base", folder, list))
    with tempfile.TemporaryDirectory() as work:
        rows = rows_of(case, base.config.vocab_size)
        result = Trainer(training, trainable, rows, [], 0, Path(work), Quiet()).run()
    return result.steps[-1].seconds - result.steps[-2].seconds


def _allocated(found: Any) -> int:
    """The most bytes of the CPU's allocator that were alive at once, of those handed out under the profiler."""
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    alive = peak = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        alive += each.nbytes()
        peak = max(peak, alive)
    return peak


def measure_alone(name: str, model: str | None) -> dict[str, Any]:
    """What `measure` finds, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", name]
    done = subprocess.run(
        [*command, *(["--base", model] if model else [])], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(name: str, model: str | None, config: Any, rate: Ceilings) -> Row:
    """Measure one case and predict it here."""
    measured = measure_alone(name, model)
    case, peak = CASES[name], measured["peak_bytes"]
    machine = Machine(resolve_device("auto").type, case.quantization)
    footprint = predict(case.training(int(config.num_hidden_layers)), config, machine, case.load)
    work = footprint.micro_batch.times(case.fields.get("accumulation", 1)) + footprint.optimizer
    ratio = footprint.total / peak
    sizes = {
        "predicted_bytes": footprint.total,
        "measured_bytes": peak,
        "ratio": ratio,
        "weights_bytes": footprint.weights,
        "ratio_without_weights": (footprint.total - footprint.weights) / (peak - footprint.weights),
        "within_goal": abs(ratio - 1) <= GOAL,
    }
    estimate = work.products / rate.matmul + work.moved / rate.copy
    return Row("memory", name, measured["seconds"] * 1e6, estimate, extra=sizes)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Measured and predicted peaks side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.4 * len(rows)), dpi=100, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for place, name in enumerate(("measured", "predicted")):
        sizes = [row.extra[f"{name}_bytes"] / 2**30 for row in rows]
        axes.barh([at + 0.4 * place for at in range(len(rows))], sizes, 0.4, label=name)
    axes.set_yticks([at + 0.2 for at in range(len(rows))], [row.case for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("peak (GiB)")
    axes.legend()
    figure.savefig(path, format="png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--base", help="folder, hub id or GGUF file (the default base)")
    parser.add_argument("--measure", choices=CASES, help="train one case in this process and print its peak")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(CASES[arguments.measure], arguments.base)))
        return
    config = AutoConfig.from_pretrained(resolve(arguments.base), trust_remote_code=False)
    rate = measure_ceilings()
    rows = []
    print(
        "| case | predicted MiB | measured MiB | ratio | without weights |\n| --- | --- | --- | --- | --- |"
    )
    for name in arguments.cases.split(","):
        row = run(name, arguments.base, config, rate)
        rows.append(row)
        found = row.extra
        sizes = " | ".join(f"{found[part] / 2**20:.1f}" for part in ("predicted_bytes", "measured_bytes"))
        print(
            f"| {name} | {sizes} | {found['ratio']:.3f} | {found['ratio_without_weights']:.3f} |", flush=True
        )
    extra = {"base": served_name(arguments.base), "goal": GOAL, "steps": STEPS}
    print(write_report(arguments.output, "memory", rows, extra, lambda path: draw(rows, path)))


if __name__ == "__main__":
    main()
