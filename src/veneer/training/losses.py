"""Losses: of tokens, and of pairs of answers (DPO, https://arxiv.org/abs/2305.18290); and noise on embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from veneer.training.data.collation import Batch
from veneer.training.data.encoding import IGNORED
from veneer.training.trainable import Trainable


def token_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats, float32 [B, L - 1], 0 where nothing is learnt."""
    inputs = batch.inputs()
    labels = inputs.pop("labels")[:, 1:]
    if model_ignores_positions(model):
        inputs.pop("position_ids")
    logits = model(**inputs).logits[:, -labels.shape[1] - 1 : -1]  # virtual tokens come before
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)


def model_ignores_positions(model: Any) -> bool:
    """Whether it is PEFT's with virtual tokens, which places the tokens itself."""
    config = getattr(model, "active_peft_config", None)
    return bool(config is not None and config.is_prompt_learning)


def pair_losses(trainable: Trainable, batch: Batch, beta: float) -> torch.Tensor:
    """Σ -log σ(β ((π_c - π_r) - (ref_c - ref_r))) over the pairs; a batch is all chosen, then all rejected.

    π are log probabilities of the answers by the model, ref by the base.
    """
    with torch.no_grad(), trainable.disabled():
        reference = -token_losses(trainable.model, batch).sum(1)
    policy = -token_losses(trainable.model, batch).sum(1)
    chosen, rejected = (policy - reference).chunk(2)
    return -functional.logsigmoid(beta * (chosen - rejected)).sum()


@contextmanager
def noisy_embeddings(model: Any, alpha: float | None) -> Iterator[None]:
    """NEFTune (https://arxiv.org/abs/2310.05914): uniform noise of ± alpha / sqrt(L d) while the model trains."""
    if alpha is None:
        yield
        return

    def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        most = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-most, most)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
