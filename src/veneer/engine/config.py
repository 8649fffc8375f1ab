"""The engine's frozen configuration. Imports no torch: the HTTP process builds it and sends it as JSON."""

from __future__ import annotations

import msgspec

GIB = 1 << 30


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs to start. Sizes are bytes unless named otherwise.

    `None` means chosen from the device when the engine starts; the choice is shown by /health.
    """

    model: str  # a local folder that transformers can load (see engine/source.py)
    store: str  # folder of content-addressed adapter files: <store>/blobs/<digest>/
    quantization: str = "nf4"  # nf4 | int8 | none
    nf4_kernels: str = "auto"  # auto | packed (ours) | bitsandbytes; auto = packed on CUDA in bfloat16
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16; auto = bfloat16 on CUDA, float32 on CPU
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    max_model_len: int | None = None  # tokens
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int | None = None  # tokens in one step; prompts are cut into chunks of it
    max_queue: int = 1024  # waiting sequences; more are refused with 429
    page_size: int = 16  # tokens in one KV page
    kv_cache_memory: int | None = None
    prefix_caching: bool = True
    max_loras: int = 8  # device slots
    max_lora_rank: int = 512
    max_added_tokens: int = 256  # of an adapter, beyond the base's vocabulary
    max_module_bytes: int = 256 << 20  # of one weight that an adapter replaces or changes in full
    adapter_memory: int | None = None  # device arena
    host_adapter_memory: int | None = None
    slot_patience: float = 2.0  # seconds a request waits for a slot before a running adapter must yield
    enforce_eager: bool = False  # no CUDA graphs
    cuda_graphs: str = "all"  # decode | all: also steps with prompt chunks, or dense or sparse changes
    lookahead: bool | None = None  # launch a step before the last one's tokens are known; None = on CUDA
    threads: int | None = None  # CPU threads for torch
    base_name: str = ""  # what trained adapters call their base; "" = the model's folder
    training_share: float = 0.5  # of the processor's time, while requests run beside a training job
    training_latency: float = (
        1.5  # on CUDA: time between tokens beside a job over that without; bounds the share
    )
    training_memory: int | None = None  # bytes of the device kept free of KV cache for training; None = none
    hot_adapter_memory: int = 0  # of a merged copy for the adapter that dominates; 0 = none is made
    hot_adapter_format: str = "full"  # of that copy: full (the compute type) | nf4
