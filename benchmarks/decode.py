"""Whole decode steps on Llama-3.1-8B's shapes with random NF4 weights: op `decode_step`, one CUDA device.

64 tokens in, 128 out, greedy, rank 16 on all seven projections; cases are adapters/batch. Weights are drawn
packed, on the device, so nothing is loaded or quantized. Also op `prefill`, `4x2048` on four adapters against
the base alone. Writes a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.device import commit
from torch import nn

from veneer.adapters.program import Program, SiteProgram
from veneer.engine.base import Base, fuse_norms, wrap_linears
from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine
from veneer.engine.layers import ATTENTION_NAME, StepContext
from veneer.engine.messages import Generate, SamplingParams
from veneer.engine.packed import PackedLinear, fuse
from veneer.kernels.nf4_layout import Nf4Weight

RANK = 16
SHAPES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
STEP_CASES = ((0, 1), (1, 1), (0, 64), (1, 64), (8, 64), (64, 64))


def random_weight(out_features: int, in_features: int) -> Nf4Weight:
    """Uniform codes, scales around 0.02: activations stay of the size that a trained model has."""
    tiles, pairs = -(-out_features // 128) * 2, -(-in_features // 128)
    packed = torch.randint(-(2**31), 2**31, (tiles, pairs, 2, 128, 4), dtype=torch.int64, device="cuda").int()
    scales = torch.full((tiles, pairs, 64, 2), 0.02 * 2**14, dtype=torch.float16, device="cuda")
    return Nf4Weight(packed, scales.view(torch.int32).squeeze(-1), 2.0**-14, out_features, in_features)


def random_base(layers: int) -> Base:
    """A Llama of the 8B shapes on the device, its linears packed NF4, everything else bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(num_hidden_layers=layers, **SHAPES)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME
        )
    rotary = type(model.model.rotary_emb)(config=config, device=torch.device("cuda"))
    packed: dict[nn.Module, nn.Module] = {}
    for layer in model.model.layers:
        for parent, names in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj")),
            (layer.mlp, ("gate_proj", "up_proj")),
        ):
            packed.update(_fused(parent, names))
        for parent, attribute in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            linear = getattr(parent, attribute)
            packed[linear] = PackedLinear(random_weight(linear.out_features, linear.in_features), None)
    named = {name: packed[module] for name, module in model.named_modules() if module in packed}
    for name, module in list(model.named_modules()):
        if name in named:
            module.weight = None  # never allocated
    model.to_empty(device="cuda")
    model.model.rotary_emb = rotary
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    model.eval().requires_grad_(False)
    fuse_norms(model)
    context = StepContext()
    sites = wrap_linears(model, context, named)
    return Base(
        model=model,
        config=model.config,
        sites=sites,
        context=context,
        device=torch.device("cuda:0"),
        dtype=torch.bfloat16,
        quantization="nf4",
        max_positions=8192,
        eos_token_ids=(),
    )


def _fused(parent: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, nn.Module]]:
    linears: list[Any] = [getattr(parent, name) for name in names]
    sizes = [linear.out_features for linear in linears]
    whole = PackedLinear(random_weight(sum(sizes), linears[0].in_features), None)
    return zip(linears, fuse(whole, sizes), strict=True)


def random_program(base: Base) -> Program:
    """LoRA of rank 16 on all seven projections."""
    sites = {}
    for name, site in base.sites.items():
        if name != "lm_head":
            a = torch.randn(RANK, site.in_features) / site.in_features**0.5
            b = torch.randn(RANK, site.out_features) * 0.01
            sites[name] = SiteProgram(a, b)
    return Program(kind="lora", sites=sites)


def submit(engine: Engine, name: str, batch: int, adapters: int, prompt: int, output: int) -> None:
    for index in range(batch):
        sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        adapter = f"{index % adapters:064x}" if adapters else None
        tokens = [(7919 * (index + 1) * (i + 1)) % 128256 for i in range(prompt)]
        engine.handle(Generate(id=f"{name}-{index}", prompt=tokens, sampling=sampling, adapter=adapter))


def decode_ms(engine: Engine, batch: int, adapters: int) -> list[float]:
    """Wall time of each step in which all sequences decode, in milliseconds."""
    submit(engine, f"d{time.monotonic()}", batch, adapters, 64, 128)
    times = []
    while engine.has_work:
        full = len(engine.scheduler.running) == batch
        start = time.perf_counter()
        engine.step()
        if full and all(s.num_uncomputed == 1 for s in engine.scheduler.running):
            times.append((time.perf_counter() - start) * 1e3)
    return times[5:-2]


def prefill_ms(engine: Engine, adapters: int) -> float:
    """Wall time of one step over four prompts of 2048 tokens, in milliseconds."""
    submit(engine, f"p{time.monotonic()}", 4, adapters, 2048, 1)
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return (time.perf_counter() - start) * 1e3


def floor_ms(engine: Engine, batch: int, adapters: int, bandwidth: float) -> float:
    """Bytes of one step over the device's copy bandwidth: weights, head, distinct adapters, KV of ~128 tokens."""
    base = engine.base
    weights = base.memory_bytes() - base.model.get_input_embeddings().weight.nbytes
    adapter = sum(
        RANK * (s.in_features + s.out_features) * 2 for n, s in base.sites.items() if n != "lm_head"
    )
    kv = batch * 128 * 2 * base.num_layers * base.num_kv_heads * base.head_dim * 2
    return float((weights + adapters * adapter + kv) / bandwidth * 1e3)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device copy."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return float(2 * source.nbytes / statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--profile", action="store_true", help="also print the kernels of one 8/64 step")
    args = parser.parse_args()
    device = torch.cuda.get_device_name(0)
    bandwidth = copy_bandwidth()
    print(f"{device}: copy {bandwidth / 1e12:.2f} TB/s")
    started = time.perf_counter()
    base = random_base(args.layers)
    program = random_program(base)
    store = Path(tempfile.mkdtemp())
    for index in range(64):
        (store / "blobs" / f"{index:064x}").mkdir(parents=True)
    config = EngineConfig(
        model="",
        store=str(store),
        max_loras=64,
        adapter_memory=8 << 30,
        host_adapter_memory=16 << 30,
        kv_cache_memory=8 << 30,
        prefix_caching=False,
        max_model_len=4096,
    )
    engine = Engine(config, base=base, load=lambda folder: program)
    print(f"ready in {time.perf_counter() - started:.1f} s")
    rows: list[dict[str, Any]] = []
    try:
        for adapters, batch in STEP_CASES:
            decode_ms(engine, batch, adapters)  # loads the adapters
            times = sorted(decode_ms(engine, batch, adapters))
            floor = floor_ms(engine, batch, adapters, bandwidth)
            median = statistics.median(times)
            rows.append(
                {
                    "op": "decode_step",
                    "case": f"{adapters}/{batch}",
                    "ours_us": median * 1e3,
                    "floor_us": floor * 1e3,
                    "peers": {},
                    "p90_us": times[int(0.9 * len(times))] * 1e3,
                }
            )
            print(
                f"decode {adapters:3}/{batch:<3} {median:7.2f} ms  floor {floor:5.2f} ms  "
                f"{batch / median * 1e3:8.0f} tok/s"
            )
        prefill_ms(engine, 0), prefill_ms(engine, 4)
        plain, adapted = (min(prefill_ms(engine, n) for _ in range(3)) for n in (0, 4))
        print(
            f"prefill 4x2048: base {plain:.1f} ms, four adapters {adapted:.1f} ms, ratio {adapted / plain:.3f}"
        )
        rows.append(
            {
                "op": "prefill",
                "case": "4x2048",
                "ours_us": adapted * 1e3,
                "floor_us": None,
                "peers": {"base only": plain * 1e3},
            }
        )
        if args.profile:
            profile(engine)
    finally:
        engine.close()
    output = args.output or Path(f"benchmarks/results/{device.lower().replace(' ', '-')}-decode.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device,
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers")},
        "copy_bytes_per_second": bandwidth,
        "layers": args.layers,
        "rows": rows,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")


def profile(engine: Engine) -> None:
    """The kernels of one decode step by total time."""
    submit(engine, "profile", 64, 8, 64, 40)
    while any(s.num_uncomputed != 1 for s in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        engine.step()
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
