"""PEFT's MULTITASK_PROMPT_TUNING: for task t prompt_embeddings * (prefix_task_cols[t] @ prefix_task_rows[t]).

`prompt_embeddings` is [tokens, hidden], the factors are [tasks, tokens, ranks] and [tasks, ranks, hidden].
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/multitask_prompt_tuning/config.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import check_tasks, read_fields, wrong
from veneer.adapters.methods.prompt_tuning import TrainingOnly as PromptTrainingOnly
from veneer.adapters.methods.prompts import REFUSED, PromptFields, count, lower_embeddings
from veneer.adapters.program import Program


class Honoured(PromptFields, frozen=True, kw_only=True):
    peft_type: Literal["MULTITASK_PROMPT_TUNING"]
    num_ranks: int = 1
    num_tasks: int = 1


class TrainingOnly(PromptTrainingOnly, frozen=True, kw_only=True):
    """Where training began."""

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT multitask prompt. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "MultitaskPromptTuningConfig")
    tasks = check_tasks("num_tasks", config.num_tasks, checkpoint.task)
    ranks = config.num_ranks
    if ranks < 1:
        raise wrong("num_ranks", ranks, "there must be at least one rank")
    factors = {
        "prefix_task_cols": (tasks, count(config), ranks),
        "prefix_task_rows": (tasks, ranks, base.hidden_size),
    }
    program = lower_embeddings(checkpoint, config, base, "multitask_prompt_tuning", factors)
    return replace(program, tasks=tasks)
