"""`make bench`: 32 requests of mixed lengths over 8 adapters, Veneer against transformers + PEFT.

Both run in this process, one after the other, on the same base, quantization and compute type. PEFT serves a
mixed batch with `generate(adapter_names=...)`: one left-padded static batch that runs to the longest request.
Only the tokens each request asked for count, on both sides. Writes a table and JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.device import commit

from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine
from veneer.engine.messages import Generate, Outputs, SamplingParams
from veneer.engine.source import resolve

REQUESTS = 32
ADAPTER_RANKS = (4, 8, 8, 8, 16, 16, 16, 32)
PROMPT_TOKENS = (16, 256)
OUTPUT_TOKENS = (16, 128)


@dataclass(frozen=True)
class Work:
    """One request of the workload."""

    prompt: list[int]
    output_tokens: int
    adapter: int | None  # index into ADAPTER_RANKS; None = the base


@dataclass(frozen=True)
class Measured:
    """One side's result. Times in seconds."""

    name: str
    seconds: float
    tokens: int
    tokens_per_second: float
    ttft_median: float
    ttft_max: float


def make_work(vocabulary: int, seed: int = 0) -> list[Work]:
    """The workload: lengths uniform in log scale, adapters in turn with every ninth request on the base."""
    generator = random.Random(seed)

    def length(low: int, high: int) -> int:
        return round(float(low * (high / low) ** generator.random()))

    return [
        Work(
            prompt=[generator.randrange(3, vocabulary) for _ in range(length(*PROMPT_TOKENS))],
            output_tokens=length(*OUTPUT_TOKENS),
            adapter=None if i % 9 == 8 else i % 9,
        )
        for i in range(REQUESTS)
    ]


def make_adapters(folder: Path, model: Path) -> list[Path]:
    """Random LoRA adapters on all linear layers, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for index, rank in enumerate(ADAPTER_RANKS):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        torch.manual_seed(index)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
        made.append(folder / f"adapter-{index}")
        adapted.save_pretrained(made[-1])
        base = adapted.unload()
    return made


def measure_veneer(model: Path, adapters: list[Path], work: list[Work], args: argparse.Namespace) -> Measured:
    """All requests are queued at once; the engine batches them as it will."""
    with tempfile.TemporaryDirectory() as store:
        digests = []
        for index, folder in enumerate(adapters):
            digests.append(f"{index:064x}")
            target = Path(store) / "blobs" / digests[-1]
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(folder)
        config = EngineConfig(
            model=str(model),
            store=store,
            quantization=args.quantization,
            dtype=args.dtype,
            device=args.device,
            max_loras=len(adapters),
            prefix_caching=False,
            threads=args.threads,
        )
        engine = Engine(config)
        try:
            _run_engine(engine, _requests(work[:4], digests, "warm"), lambda name: None)
            first: dict[str, float] = {}
            start = time.perf_counter()
            tokens = _run_engine(
                engine,
                _requests(work, digests, "timed"),
                lambda name: first.setdefault(name, time.perf_counter() - start),
            )
            return _measured("veneer", time.perf_counter() - start, tokens, list(first.values()))
        finally:
            engine.close()


def _requests(work: list[Work], digests: list[str], prefix: str) -> list[Generate]:
    return [
        Generate(
            id=f"{prefix}-{i}",
            prompt=item.prompt,
            adapter=None if item.adapter is None else digests[item.adapter],
            sampling=SamplingParams(max_tokens=item.output_tokens, temperature=0.0, ignore_eos=True),
        )
        for i, item in enumerate(work)
    ]


def _run_engine(engine: Engine, requests: list[Generate], on_token: Callable[[str], Any]) -> int:
    for request in requests:
        engine.handle(request)
    tokens = 0
    while engine.has_work:
        for reply in engine.step()[0]:
            for item in reply.items if isinstance(reply, Outputs) else []:
                if item.error is not None:
                    raise RuntimeError(item.error.message)
                on_token(item.id)
                tokens += len(item.tokens)
    return tokens


def measure_peft(model: Path, adapters: list[Path], work: list[Work], args: argparse.Namespace) -> Measured:
    """One static batch, left-padded, to the longest request."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

    from veneer.engine.base import quantization_config, resolve_device, resolve_dtype

    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    base: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=dtype,
        quantization_config=quantization_config(args.quantization, dtype),
        device_map={"": device},
    )
    adapted: Any = PeftModel.from_pretrained(base, adapters[0], adapter_name="a0")
    for index, folder in enumerate(adapters[1:], 1):
        adapted.load_adapter(folder, adapter_name=f"a{index}")
    adapted.eval()

    class FirstToken(LogitsProcessor):  # type: ignore[misc]
        """Notes when the first logits of a batch arrive."""

        at: float | None = None

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.at is None:
                self.at = time.perf_counter()
            return scores

    def generate(items: list[Work], new_tokens: int) -> float:
        widest = max(len(item.prompt) for item in items)
        first = FirstToken()
        start = time.perf_counter()
        adapted.generate(
            input_ids=torch.tensor([[0] * (widest - len(i.prompt)) + i.prompt for i in items], device=device),
            attention_mask=torch.tensor(
                [[0] * (widest - len(i.prompt)) + [1] * len(i.prompt) for i in items], device=device
            ),
            adapter_names=["__base__" if i.adapter is None else f"a{i.adapter}" for i in items],
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([first]),
        )
        assert first.at is not None
        return first.at - start

    with torch.inference_mode():
        generate(work[:4], 4)
        start = time.perf_counter()
        ttft = generate(work, max(item.output_tokens for item in work))
        seconds = time.perf_counter() - start
    return _measured("transformers + PEFT", seconds, sum(i.output_tokens for i in work), [ttft] * len(work))


def _measured(name: str, seconds: float, tokens: int, ttft: list[float]) -> Measured:
    return Measured(name, seconds, tokens, tokens / seconds, statistics.median(ttft), max(ttft))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", default=None, help="as for `veneer serve`; the packaged default base if absent"
    )
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "int8", "none"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu-batched.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="transformers|peft|bitsandbytes")
    if args.threads:
        torch.set_num_threads(args.threads)
    model = resolve(args.model)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    work = make_work(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder), model)
        ours = measure_veneer(model, adapters, work, args)
        gc.collect()
        peft = measure_peft(model, adapters, work, args)
    report = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "quantization": args.quantization,
        "requests": REQUESTS,
        "adapter_ranks": ADAPTER_RANKS,
        "rows": [asdict(ours), asdict(peft)],
        "ratio": ours.tokens_per_second / peft.tokens_per_second,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{'':22}{'tokens/s':>10}{'seconds':>10}{'TTFT median':>13}{'TTFT max':>10}")
    for row in (ours, peft):
        print(
            f"{row.name:22}{row.tokens_per_second:10.1f}{row.seconds:10.1f}"
            f"{row.ttft_median:13.2f}{row.ttft_max:10.2f}"
        )
    print(f"ratio {report['ratio']:.2f}; written to {args.output}")


if __name__ == "__main__":
    main()
