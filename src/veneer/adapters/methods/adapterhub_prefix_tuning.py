"""AdapterHub's prefix tuning: keys and values in front of the prompt's, which take no positions.

They come from a small MLP over one embedding for each virtual token, or, with `flat`, are in the file. The prompt
begins at position 0 all the same, where PEFT's prefix tuning shifts it by the prefix.
https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters/methods/prefix_tuning.py

Keys are `model.prefix_tuning.prefix_tunings.<name>.self_prefix.{wte.weight,control_trans.{0,2}.{weight,bias}}`, or
`….control_trans` [tokens * layers * 2 * kv_heads * head_dim].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.adapterhub import GATED, LIBRARY, File, activation_kind, read
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import check_module
from veneer.adapters.methods.common import Refusal, read_fields, wrong
from veneer.adapters.methods.prompts import kv_shape
from veneer.adapters.program import Program, Prompt
from veneer.errors import AdapterRefused
from veneer.kernels.activation import ELEMENTWISE_FUNCTIONS


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with the library's defaults."""

    architecture: Literal["prefix_tuning"]
    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"


class TrainingOnly(msgspec.Struct, frozen=True, kw_only=True):
    """Fields without effect on a decoder's inference."""

    cross_prefix: bool = True
    dropout: float = 0.0
    encoder_prefix: bool = True
    init_weights_seed: int | None = None
    shared_gating: bool = True


REFUSED: Mapping[str, Refusal] = {
    "leave_out": Refusal(([],), "virtual tokens are in front of the prompt in every layer"),
    "use_gating": GATED,
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower AdapterHub's prefix. See `veneer.adapters.methods.base.Method`."""
    file = read(checkpoint, base)
    config = read_fields(file.fields, Honoured, TrainingOnly, REFUSED, "PrefixTuningConfig", LIBRARY)
    if config.prefix_length < 1:
        raise wrong("prefix_length", config.prefix_length, "there must be at least one virtual token")
    shape = layers, sides, tokens, heads, head_dim = kv_shape(base, config.prefix_length)
    values = _values(file, config, layers * sides * heads * head_dim)
    if not values.isfinite().all():
        raise AdapterRefused(
            "The keys and values of the prefix overflow; the adapter's numbers are too large."
        )
    kv = values.view(tokens, layers, sides, heads, head_dim).permute(1, 2, 0, 3, 4).contiguous()
    return Program(
        kind="adapterhub_prefix_tuning",
        sites={},
        base_model=file.base_model,
        warnings=tuple(file.warnings),
        prompt=Prompt(shape, kv=kv, takes_positions=False),
    )


def _values(file: File, config: Honoured, width: int) -> torch.Tensor:
    """Keys and values of every token, [tokens * width] in the order of the file."""

    def key(part: str) -> str:
        return file.key("model.prefix_tuning", "prefix_tunings", f"self_prefix.{part}")

    tokens, size, hidden = config.prefix_length, config.bottleneck_size, file.base.hidden_size
    if config.flat:
        file.require({key("control_trans"): (tokens * width,)})
        return file.checkpoint.read(key("control_trans"))
    shapes = {
        "wte.weight": (tokens, hidden),
        "control_trans.0.weight": (size, hidden),
        "control_trans.0.bias": (size,),
        "control_trans.2.weight": (width, size),
        "control_trans.2.bias": (width,),
    }
    kind = activation_kind(file, config.non_linearity)
    file.require({key(part): shape for part, shape in shapes.items()})
    # A row of the file becomes many times its size here.
    check_module("What the MLP makes of the prefix", (tokens, max(width, size)), file.base)
    embeddings, down, down_bias, up, up_bias = (file.checkpoint.read(key(part)) for part in shapes)
    inner = ELEMENTWISE_FUNCTIONS[kind](torch.addmm(down_bias, embeddings, down.T))
    return torch.addmm(up_bias, inner, up.T).flatten()
