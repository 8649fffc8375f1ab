"""Conversion of a GGUF file into a folder that transformers loads in seconds: bfloat16 safetensors.

The weights are dequantized once. The engine then quantizes them its own way, so that every base, whatever
its source, goes through the same code. Split from source.py because it needs torch; source.py calls it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers

from veneer.errors import InvalidRequest, StorageFull


def convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` as bfloat16 safetensors with config, tokenizer and chat template into `folder`."""
    metadata = _metadata(gguf)
    if metadata.get("split.count", 0) > 1:
        raise InvalidRequest(
            f"{gguf.name!r} is one of {metadata['split.count']} parts; join them first with "
            "`llama-gguf-split --merge`",
            param="model",
        )
    options: dict[str, Any] = {"gguf_file": gguf.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
        _set_pre_tokenizer(tokenizer, metadata.get("tokenizer.ggml.pre"))
        if hasattr(transformers, "GgufConfig"):  # else dequantizing is the only way of loading
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, trust_remote_code=False, **options
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InvalidRequest(f"{gguf.name!r} cannot be converted: {error}", param="model") from error
    _check_room(folder.parent, sum(weight.numel() * weight.element_size() for weight in model.parameters()))
    stops = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    ends = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if ends:  # a chat model ends its turn with eot, a text with eos; generation stops at both
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _metadata(gguf: Path) -> dict[str, Any]:
    """The file's scalar fields."""
    try:
        fields = GGUFReader(gguf).fields
    except (ValueError, IndexError, OSError) as error:
        raise InvalidRequest(f"{gguf.name!r} is not a readable GGUF file: {error}", param="model") from error
    wanted = (
        "split.count",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
    )
    return {key: fields[key].contents() for key in wanted if key in fields}


def _set_pre_tokenizer(tokenizer: Any, kind: str | None) -> None:
    """Cut text as the model was trained to, where transformers leaves GPT-2's rule in place.

    SmolLM takes every digit by itself first (llama.cpp's "smollm": `\\p{N}`, then GPT-2's expression);
    without this, spaces before digits come out as other tokens than in training.
    """
    backend = tokenizer.backend_tokenizer
    if kind == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind not in (None, "default", "gpt-2") and isinstance(
        backend.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        raise ValueError(
            f"its pre-tokenizer {kind!r} is not known here, so text would be cut into other tokens than in "
            "training; use the model's safetensors folder"
        )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + (64 << 20):
        raise StorageFull(
            f"the cache {str(folder)!r} has {free >> 20} MiB free and the converted model needs "
            f"{needed >> 20} MiB; make room or set VENEER_CACHE to another disk"
        )
