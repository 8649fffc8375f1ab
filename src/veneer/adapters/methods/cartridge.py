"""PEFT's CARTRIDGE: a trained KV cache of virtual tokens in every layer, used as it is.

`prompt_embeddings` is [tokens, layers * 2 * kv_heads * head_dim], the frozen tokens first.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/cartridge/config.py
"""

from __future__ import annotations

from typing import Literal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Common, read_fields
from veneer.adapters.methods.prompts import REFUSED, PromptFields, lower_kv
from veneer.adapters.program import Program


class Honoured(PromptFields, frozen=True, kw_only=True):
    peft_type: Literal["CARTRIDGE"]


class TrainingOnly(Common, frozen=True, kw_only=True):
    num_frozen_tokens: int = 1  # they are in the tensor as the others are


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT cartridge. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "CartridgeConfig")
    return lower_kv(checkpoint, config, base, "cartridge")
