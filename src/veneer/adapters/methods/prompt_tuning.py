"""PEFT's PROMPT_TUNING: embeddings of virtual tokens.

`prompt_embeddings` is [tokens, hidden].
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/prompt_tuning/config.py
"""

from __future__ import annotations

from typing import Any, Literal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Common, read_fields
from veneer.adapters.methods.prompts import REFUSED, PromptFields, lower_embeddings
from veneer.adapters.program import Program


class Honoured(PromptFields, frozen=True, kw_only=True):
    peft_type: Literal["PROMPT_TUNING"]


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Where training began."""

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    tokenizer_name_or_path: str | None = None


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT prompt. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "PromptTuningConfig")
    return lower_embeddings(checkpoint, config, base, "prompt_tuning")
