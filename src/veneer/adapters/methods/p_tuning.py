"""PEFT's P_TUNING: embeddings of virtual tokens that an MLP or an LSTM made in training.

`prompt_embeddings` is [tokens, hidden], after that encoder.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/p_tuning/config.py
"""

from __future__ import annotations

from typing import Literal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Common, read_fields
from veneer.adapters.methods.prompts import REFUSED, PromptFields, lower_embeddings
from veneer.adapters.program import Program


class Honoured(PromptFields, frozen=True, kw_only=True):
    peft_type: Literal["P_TUNING"]


class TrainingOnly(Common, frozen=True, kw_only=True):
    """The encoder, which is not needed any more."""

    encoder_dropout: float = 0.0
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_reparameterization_type: str = "MLP"


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT P-tuning. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "PromptEncoderConfig")
    return lower_embeddings(checkpoint, config, base, "p_tuning")
