"""Cases of the prompt methods: prefix tuning, Cartridge, prompt tuning, P-tuning, multitask prompts, CPT."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from veneer.training.conformance.cases import peft_case

_TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def randomize(model: Any) -> None:
    """A prefix starts far from what the base makes of text, or at 0: it moves by more than other adapters do."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


prompt_case = partial(peft_case, randomize=randomize)

CASES = [
    prompt_case(
        "PREFIX_TUNING",
        "",
        lambda model: PrefixTuningConfig(**_TASK, num_virtual_tokens=20),
    ),
    prompt_case(
        "PREFIX_TUNING",
        "projection",
        lambda model: PrefixTuningConfig(
            **_TASK, num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=32
        ),
    ),
    prompt_case(
        "CARTRIDGE",
        "",
        lambda model: CartridgeConfig(**_TASK, num_virtual_tokens=16, num_frozen_tokens=2),
    ),
    prompt_case(
        "PROMPT_TUNING",
        "",
        lambda model: PromptTuningConfig(**_TASK, num_virtual_tokens=20),
    ),
    prompt_case(
        "P_TUNING",
        "MLP",
        lambda model: PromptEncoderConfig(**_TASK, num_virtual_tokens=9, encoder_hidden_size=32),
    ),
    prompt_case(
        "P_TUNING",
        "LSTM",
        lambda model: PromptEncoderConfig(
            **_TASK, num_virtual_tokens=9, encoder_reparameterization_type="LSTM", encoder_hidden_size=32
        ),
    ),
    prompt_case(
        "MULTITASK_PROMPT_TUNING",
        "",
        lambda model: MultitaskPromptTuningConfig(**_TASK, num_virtual_tokens=11, num_ranks=2),
        task=0,
    ),
    prompt_case(
        "MULTITASK_PROMPT_TUNING",
        "first of two tasks",
        lambda model: MultitaskPromptTuningConfig(**_TASK, num_virtual_tokens=11, num_tasks=2),
        task=0,
    ),
    prompt_case(
        "MULTITASK_PROMPT_TUNING",
        "last of three tasks",
        lambda model: MultitaskPromptTuningConfig(**_TASK, num_virtual_tokens=8, num_tasks=3, num_ranks=2),
        task=2,
    ),
    prompt_case(
        "CPT",
        "",
        lambda model: CPTConfig(
            **_TASK,
            cpt_token_ids=[3, 44, 9, 71, 12],
            cpt_mask=[1] * 5,
            cpt_tokens_type_mask=[1, 2, 2, 3, 4],
            opt_projection_epsilon=5.0,
            opt_projection_format_epsilon=5.0,
        ),
    ),
]
