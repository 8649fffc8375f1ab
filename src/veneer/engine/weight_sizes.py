"""How many bytes the resident base takes, from its config alone: what `Base.memory_bytes` will count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from veneer.engine.packed import FUSED
from veneer.kernels.nf4_layout import BLOCK, packed_shapes

_NESTED_BLOCK = 256  # blocks whose absmax share one of bitsandbytes' second quantization
_NESTED_TABLES = 4 * (256 + 16 + 1)  # bytes: codes of absmax, codes of weights, offset


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """transformers' model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )


def weight_bytes(config: Any, quantization: str, dtype: torch.dtype, device: str) -> int:
    """Bytes of all weights on a `device` ("cpu" or "cuda"); NF4 in bfloat16 on CUDA is in our own layout."""
    model = empty_model(config, dtype)
    tensors = [*model.parameters(), *model.buffers()]
    if quantization == "none":
        return _bytes(tensors)
    linears = dict(quantized_linears(model))
    replaced = {id(each.weight) for each in linears.values()}
    rest = _bytes(each for each in tensors if id(each) not in replaced)
    if quantization == "int8":
        return rest + sum(each.weight.numel() + 4 * each.out_features for each in linears.values())
    own = device == "cuda" and dtype == torch.bfloat16
    return rest + sum(_nf4_bytes(rows, columns, own) for rows, columns in _fused(linears))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(int(each.nbytes) for each in tensors)


def quantized_linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The layers whose weights quantization replaces: all but the output head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def _fused(linears: dict[str, nn.Linear]) -> Iterator[tuple[int, int]]:
    """Rows and columns of each matrix that is kept: linears of one input are one."""
    for name, linear in linears.items():
        parent, _, attribute = name.rpartition(".")
        group = next((group for group in FUSED if attribute in group), (attribute,))
        members = [linears.get(f"{parent}.{part}") for part in group]
        if None in members:
            yield linear.out_features, linear.in_features
        elif attribute == group[0]:
            yield sum(member.out_features for member in members if member), linear.in_features


def _nf4_bytes(rows: int, columns: int, own: bool) -> int:
    if columns % BLOCK:  # stays as bitsandbytes has it, absmax quantized again
        blocks = math.ceil(rows * columns / BLOCK)
        return math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + _NESTED_TABLES
    if own:
        return sum(4 * math.prod(shape) for shape in packed_shapes(rows, columns))
    return rows * columns // 2 + 4 * rows * (columns // BLOCK)
