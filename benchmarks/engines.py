"""Engines on random bases, driven in this process: what the benchmarks of whole steps share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.models import KV_TOKENS, POSITIONS, RANK, adapter_bytes, kv_token_bytes, random_program

from veneer.adapters.packing import pack
from veneer.engine.base import Base
from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine
from veneer.engine.messages import Generate, Outputs, SamplingParams, SequenceOutput


def digest(index: int) -> str:
    """Stands for the content of adapter `index`."""
    return f"{index:064x}"


def random_engine(
    store: Path,
    base: Base,
    adapters: int,
    *,
    slots: int,
    batch: int = 64,
    wake: Callable[[], None] = lambda: None,
) -> Engine:
    """An engine on a random base that finds `adapters` digests, all with the content of one random adapter.

    Each is packed into host memory of its own when it is first asked for, and copied to one of `slots` slots.
    """
    for index in range(adapters):
        (store / "blobs" / digest(index)).mkdir(parents=True, exist_ok=True)
    program = random_program(base)
    config = base.config, base.dtype.itemsize
    size = adapter_bytes(*config)
    return Engine(
        EngineConfig(
            model="",
            store=str(store),
            max_loras=slots,
            max_lora_rank=RANK,
            max_num_seqs=batch,
            adapter_memory=slots * size,
            host_adapter_memory=adapters * 2 * size + (1 << 30),  # pinned memory comes in powers of two
            kv_cache_memory=KV_TOKENS * kv_token_bytes(*config),
            prefix_caching=False,
            max_model_len=POSITIONS // 2,
        ),
        wake=wake,
        base=base,
        load=lambda folder: program,
    )


def share_host_memory(engine: Engine, adapters: int, copies: int) -> None:
    """Put digests 0 to `adapters` into the host cache, backed by only `copies` pieces of host memory.

    The cache counts each digest in full and must have room for that; a copy to the device reads what it would.
    """
    base, cache = engine.base, engine.residency._loader.cache
    program, pin = random_program(base), base.device.type == "cuda"
    packed = [pack(program, list(base.sites.values()), base.dtype, pin) for _ in range(copies)]
    for index in range(adapters):
        cache.put(digest(index), packed[index % copies])


def step_bytes(base: Base, batch: int, adapters: float, context: int) -> float:
    """What one decode step must read: the weights, the head, each distinct adapter, keys and values."""
    weights = base.memory_bytes() - base.model.get_input_embeddings().weight.nbytes
    kv = kv_token_bytes(base.config, base.dtype.itemsize)
    return float(weights + adapters * adapter_bytes(base.config, base.dtype.itemsize) + batch * context * kv)


def generate(
    name: str, index: int, vocabulary: int, prompt: int, output: int, adapter: int | None
) -> Generate:
    """A greedy request of fixed lengths whose prompt is its own."""
    return Generate(
        id=f"{name}-{index}",
        prompt=[(7919 * (index + 1) * (i + 1)) % vocabulary for i in range(prompt)],
        sampling=SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
        adapter=None if adapter is None else digest(adapter),
    )


def step_outputs(engine: Engine) -> list[SequenceOutput]:
    """One step, and what came out. RuntimeError when a request failed."""
    items = [item for reply in engine.step()[0] if isinstance(reply, Outputs) for item in reply.items]
    for item in items:
        if item.error is not None:
            raise RuntimeError(item.error.message)
    return items


def count_loads(engine: Engine) -> int:
    """How often adapters were brought to the device so far."""
    return sum(adapter.loads for adapter in engine.residency._adapters.values())
