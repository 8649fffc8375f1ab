"""Engines on random bases, driven in this process: what the benchmarks of whole steps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.models import KV_TOKENS, POSITIONS, adapter_bytes, kv_token_bytes, random_program

from veneer.adapters.packing import pack, packed_size, shared_size
from veneer.adapters.program import Program
from veneer.engine.base import Base
from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine
from veneer.engine.messages import Generate, Outputs, SamplingParams, SequenceOutput


def digest(index: int) -> str:
    """Stands for the content of adapter `index`."""
    return f"{index:064x}"


def program_bytes(base: Base, *programs: Program) -> int:
    """What adapters of these contents take on the device; a program that comes again is another adapter like it,
    with which it shares what can be shared."""
    item = base.dtype.itemsize
    shared = {id(program): shared_size(program, item) for program in programs}
    return item * (sum(packed_size(program, item) for program in programs) + sum(shared.values()))


def random_engine(
    store: Path,
    base: Base,
    adapters: int,
    *,
    slots: int,
    batch: int = 64,
    wake: Callable[[], None] = lambda: None,
    programs: Sequence[Program] = (),
    spare: int = 0,
    model: str = "",
    kv_tokens: int = KV_TOKENS,
) -> Engine:
    """An engine on a random base that finds `adapters` digests.

    Their contents are `programs` in turn, or one random LoRA. Each is packed into host memory of its own when it
    is first asked for, and copied to one of `slots` slots; the arena has room for `spare` of the largest more.
    `model` is a folder with the tokenizer, which grammars need.
    """
    for index in range(adapters):
        (store / "blobs" / digest(index)).mkdir(parents=True, exist_ok=True)
    programs = programs or [random_program(base)]
    size = max(program_bytes(base, program) for program in programs)
    return Engine(
        EngineConfig(
            model=model,
            store=str(store),
            max_loras=slots,
            max_lora_rank=max(program.rank for program in programs),
            max_num_seqs=batch,
            adapter_memory=(slots + spare) * size,
            host_adapter_memory=adapters * 2 * size + (1 << 30),  # pinned memory comes in powers of two
            kv_cache_memory=kv_tokens * kv_token_bytes(base.config, base.dtype.itemsize),
            prefix_caching=False,
            max_model_len=POSITIONS // 2,
        ),
        wake=wake,
        base=base,
        load=lambda folder, task: programs[int(folder.name, 16) % len(programs)],
    )


def share_host_memory(
    engine: Engine, adapters: int, copies: int = 1, programs: Sequence[Program] = ()
) -> None:
    """Put digests 0 to `adapters` into the host cache, backed by only `copies` pieces of host memory.

    With `programs`, those of the engine, it is one piece of each. The cache counts each digest in full and must
    have room for that; a copy to the device reads what it would.
    """
    base, cache = engine.base, engine.residency._loader.cache
    contents, pin = programs or [random_program(base)] * copies, base.device.type == "cuda"
    packed = [pack(program, engine.residency.sites, base.dtype, pin) for program in contents]
    for index in range(adapters):
        cache.put(digest(index), packed[index % len(packed)])


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
