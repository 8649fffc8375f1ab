"""Cases of what has an activation between its factors: LLaMA-adapter's gated attention, routing over LoRAs."""

from __future__ import annotations

from typing import Any

from peft import AdaptionPromptConfig

from veneer.training.conformance.cases import peft_case, randomize


def _strongly(model: Any) -> None:
    """Gates start at 0, and prompts as normal numbers, of which a tenth does little."""
    for _ in range(5):
        randomize(model)


CASES = [
    peft_case(
        "ADAPTION_PROMPT",
        "",
        lambda model: AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM"),
        randomize=_strongly,
    ),
    peft_case(
        "ADAPTION_PROMPT",
        "top layer",
        lambda model: AdaptionPromptConfig(
            adapter_len=1, adapter_layers=1, target_modules="self_attn", task_type="CAUSAL_LM"
        ),
        randomize=_strongly,
    ),
]
