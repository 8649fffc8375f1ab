"""PEFT's CPT: embeddings of the tokens of an example, moved by what was learned. The sum is in the file.

`prompt_embeddings` is [tokens, hidden].
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/cpt/config.py
"""

from __future__ import annotations

from typing import Literal

import msgspec

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Common, read_fields, wrong
from veneer.adapters.methods.prompts import REFUSED, PromptFields, lower_embeddings
from veneer.adapters.program import Program


class Honoured(PromptFields, frozen=True, kw_only=True):
    peft_type: Literal["CPT"]
    cpt_token_ids: list[int] | None = None  # PEFT takes the number of virtual tokens from it


class TrainingOnly(Common, frozen=True, kw_only=True):
    """The loss and what it may move."""

    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    opt_weighted_loss_type: str | None = "none"
    tokenizer_name_or_path: str | None = None


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT CPT. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "CPTConfig")
    tokens = 1 if config.cpt_token_ids is None else len(config.cpt_token_ids)
    if config.num_virtual_tokens not in (None, tokens):
        rule = f"cpt_token_ids has {tokens}, and PEFT goes by it"
        raise wrong("num_virtual_tokens", config.num_virtual_tokens, rule)
    return lower_embeddings(
        checkpoint, msgspec.structs.replace(config, num_virtual_tokens=tokens), base, "cpt"
    )
