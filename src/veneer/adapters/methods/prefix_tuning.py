"""PEFT's PREFIX_TUNING: keys and values of virtual tokens in every layer, used as they are.

`prompt_embeddings` is [tokens, layers * 2 * kv_heads * head_dim]; with prefix_projection the MLP is applied in it.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/prefix_tuning/config.py
"""

from __future__ import annotations

from typing import Literal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Common, read_fields
from veneer.adapters.methods.prompts import REFUSED, PromptFields, lower_kv
from veneer.adapters.program import Program


class Honoured(PromptFields, frozen=True, kw_only=True):
    peft_type: Literal["PREFIX_TUNING"]


class TrainingOnly(Common, frozen=True, kw_only=True):
    """What made the tensor, which is not needed any more."""

    encoder_hidden_size: int | None = None
    init_weights: str | None = None
    prefix_projection: bool = False


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT prefix. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "PrefixTuningConfig")
    return lower_kv(checkpoint, config, base, "prefix_tuning")
