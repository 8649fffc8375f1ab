"""Random models of Llama-3.1-8B's shapes, and adapters for them: in memory, or as folders that a server loads.

`tiny` is for trying a script where there is no GPU; what is measured with it says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapters.program import Program, SiteProgram
from veneer.engine.base import (
    Base,
    fuse_norms,
    load_base,
    resolve_device,
    resolve_dtype,
    resolve_nf4_kernels,
    wrap_embedding,
    wrap_linears,
)
from veneer.engine.fused import fuse_layers
from veneer.engine.hidden import HiddenStates
from veneer.engine.layers import ATTENTION_NAME, StepContext
from veneer.engine.packed import PackedLinear, fuse
from veneer.engine.source import cache_folder, resolve
from veneer.kernels.nf4_layout import Nf4Weight

RANK = 16
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    },
}
POSITIONS = 8192
KV_TOKENS = 1 << 16  # in an engine's cache; 8.6 GB at the 8B shapes
LAYERS_PER_SHARD = 4  # 1.7 GB of 8B layers


def llama_config(layers: int | None = None, shapes: str = "8b") -> Any:
    """A LlamaConfig of the named shapes, without an end token: answers have the length that was asked for."""
    from transformers import LlamaConfig

    changed = {} if layers is None else {"num_hidden_layers": layers}
    return LlamaConfig(
        **{**SHAPES[shapes], **changed},
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        max_position_embeddings=POSITIONS,
        rope_theta=500000.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the seven projections of one layer, by their path below the layer."""
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = hidden // heads * config.num_key_value_heads
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    mlp = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    return {
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        "self_attn.o_proj": (hidden, hidden),
        **{f"mlp.{name}": shape for name, shape in mlp.items()},
    }


def adapter_bytes(config: Any, itemsize: int, rank: int = RANK) -> int:
    """Bytes of one adapter on all seven projections."""
    features = sum(map(sum, linear_shapes(config).values()))
    return int(rank * config.num_hidden_layers * features * itemsize)


def kv_token_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    head_dim = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize)


# Folders


def checkpoint_folder(layers: int | None = None, shapes: str = "8b") -> Path:
    """Where the benchmarks that need a checkpoint on disk share one."""
    config = llama_config(layers, shapes)
    return cache_folder() / "benchmarks" / f"llama-{shapes}-{config.num_hidden_layers}-layers"


def random_checkpoint(folder: Path, layers: int | None = None, shapes: str = "8b") -> Path:
    """A folder that transformers and `veneer serve` load: bfloat16 shards, config, tokenizer. Made once.

    The weights of 32 layers take 16 GB; each shard is drawn on the GPU where there is one, and written at once.
    """
    from safetensors.torch import save_file

    config = llama_config(layers, shapes)
    if (folder / "config.json").exists():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    placed: dict[str, str] = {}
    for index, shard in enumerate(_shards(config)):
        name = f"model-{index:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, name)
    total = sum((folder / name).stat().st_size for name in set(placed.values()))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": placed})
    )
    _write_tokenizer(folder, config.vocab_size)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    return folder


def _shards(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    hidden = config.hidden_size
    yield {
        "model.embed_tokens.weight": _random(config.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for first in range(0, config.num_hidden_layers, LAYERS_PER_SHARD):
        shard = {}
        for layer in range(first, min(first + LAYERS_PER_SHARD, config.num_hidden_layers)):
            for name, shape in linear_shapes(config).items():
                shard[f"model.layers.{layer}.{name}.weight"] = _random(*shape)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        yield shard
    yield {"lm_head.weight": _random(config.vocab_size, hidden)}


def _random(*shape: int, scale: float = 0.02) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, scale)


def _write_tokenizer(folder: Path, size: int) -> None:
    """Token n is the word `wn`, so a prompt has as many tokens as words and each token is visible text."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": metaspace,
        "post_processor": None,
        "decoder": metaspace,
        "model": {
            "type": "WordLevel",
            "vocab": {f"▁w{index}": index for index in range(size)},
            "unk_token": "▁w0",
        },
    }
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    )


def random_adapters(
    folder: Path, count: int, rank: int = RANK, layers: int | None = None, shapes: str = "8b"
) -> list[Path]:
    """Distinct LoRA adapters on all seven projections as PEFT saves them, bfloat16. Each is made once.

    One of rank 16 takes 84 MB at the 8B shapes.
    """
    from safetensors.torch import save_file

    config = llama_config(layers, shapes)
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.rpartition(".")[2] for name in linear_shapes(config)],
        "base_model_name_or_path": f"random-{shapes}",
    }
    folders = [folder / f"r{rank}-{config.num_hidden_layers}-{shapes}-{index}" for index in range(count)]
    for index, target in enumerate(folders):
        if (target / "adapter_config.json").exists():  # written last
            continue
        target.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(index + 1)
        tensors = {}
        for layer in range(config.num_hidden_layers):
            for name, (outputs, inputs) in linear_shapes(config).items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = _random(rank, inputs, scale=inputs**-0.5)
                tensors[f"{prefix}.lora_B.weight"] = _random(outputs, rank, scale=0.01)
        save_file(tensors, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(adapter))
    return folders


def write_subword_tokenizer(folder: Path, size: int) -> Path:
    """The packaged base's tokenizer with its first `size` tokens, or with as many more, each of two of its own.

    For grammars, whose masks take as long as the tokens are many. Returns the folder.
    """
    tokenizer = json.loads((resolve(None) / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    joined = (first + second for second in tokens[-256:] for first in tokens[-1024:])
    known = dict.fromkeys([*tokens[:size], *islice(joined, max(0, size - len(tokens)))])
    model["vocab"] = {token: index for index, token in enumerate(known)}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= known.keys()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


# In memory


def make_base(shapes: str, layers: int | None = None) -> Base:
    """A random base of the named shapes, or the packaged one in NF4: on the GPU where there is one."""
    if shapes != "packaged":
        return random_base(layers, shapes)
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    own = resolve_nf4_kernels("auto", "nf4", dtype, device)
    return load_base(resolve(None), quantization="nf4", dtype=dtype, device=device, own_kernels=own)


def random_base(layers: int | None = None, shapes: str = "8b") -> Base:
    """A Llama on the device, its linears packed NF4, all else bfloat16 (float32 on a CPU). Nothing is read."""
    from transformers import AutoModelForCausalLM

    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    config = llama_config(layers, shapes)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    with device:
        rotary = type(model.model.rotary_emb)(config=config)
    packed: dict[nn.Module, nn.Module] = {}
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            packed.update(zip(group, _packed(group, device), strict=True))
    named = {name: packed[module] for name, module in model.named_modules() if module in packed}
    for module in packed:
        module.weight = None  # type: ignore[assignment] # never allocated
    model.to_empty(device=device)
    model.model.rotary_emb = rotary
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    model.eval().requires_grad_(False)
    fuse_norms(model)
    context = StepContext()
    sites = wrap_linears(model, context, named)
    hidden = HiddenStates(model, context, sites)
    wrap_embedding(model, context, len(sites) + len(hidden.sites))
    notes: list[str] = []
    notes.append(f"fused decoder layers: {fuse_layers(model, context, notes)} of {config.num_hidden_layers}")
    return Base(
        model=model,
        config=model.config,
        sites=sites,
        hidden=hidden,
        context=context,
        device=device,
        dtype=dtype,
        quantization="nf4",
        max_positions=POSITIONS,
        eos_token_ids=(),
        notes=notes,
    )


def _packed(group: tuple[Any, ...], device: torch.device) -> list[nn.Module]:
    sizes = [linear.out_features for linear in group]
    weight = random_weight(sum(sizes), group[0].in_features, device)
    return fuse(PackedLinear(weight, None), sizes)


def random_weight(out_features: int, in_features: int, device: torch.device) -> Nf4Weight:
    """Uniform codes, scales around 0.02: activations stay of the size that a trained model has."""
    tiles, pairs = -(-out_features // 128) * 2, -(-in_features // 128)
    packed = torch.randint(-(2**31), 2**31, (tiles, pairs, 2, 128, 4), dtype=torch.int64, device=device).int()
    scales = torch.full((tiles, pairs, 64, 2), 0.02 * 2**14, dtype=torch.float16, device=device)
    return Nf4Weight(packed, scales.view(torch.int32).squeeze(-1), 2.0**-14, out_features, in_features)


def random_program(base: Base, rank: int = RANK) -> Program:
    """LoRA on all seven projections."""
    sites = {}
    for name, site in base.sites.items():
        if name != "lm_head":
            a = torch.randn(rank, site.in_features) / site.in_features**0.5
            b = torch.randn(rank, site.out_features) * 0.01
            sites[name] = SiteProgram(a, b)
    return Program(kind="lora", sites=sites)
