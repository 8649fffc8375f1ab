"""PEFT's PVERA at its mean: VERA (vera.py) with 2r rows in A, of which the first r give the mean.

The other r rows are the logarithm of a variance, used only where noise is drawn.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/pvera/layer.py

Keys are `base_model.model.<module>.pvera_lambda_b` [out], `pvera_lambda_d` [2r], and `base_model.pvera_A`
[2r, largest in], `base_model.pvera_B` [largest out, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods import vera
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Common, Refusal, read_fields
from veneer.adapters.program import Program


class Honoured(vera.Shared, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["PVERA"]


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference: generator_seed is that of the noise, which is not drawn."""

    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    generator_seed: int | None = None
    init_weights: bool = True
    pvera_dropout: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    **vera.REFUSED,
    "sample_at_inference": Refusal(
        (False,),
        "it draws noise in every layer for every token, so no answer could be repeated; use the mean",
    ),
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT PVeRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "PveraConfig")
    return vera.lower_shared(checkpoint, base, max_rank, config, "pvera", 2 * config.r)
