"""The fields of peft's LoraConfig: honoured (`Honoured`), without effect on inference (`TrainingOnly`), or refused.

A field is refused by name unless it is off (`REFUSED`); one in none of the three is refused as unknown.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/config.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from veneer.adapters.methods.common import (
    CAUSAL,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    read_fields,
    wrong,
)

_INVOCATION_LIMIT = 64  # tokens


class BlockDiagonal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEFT's BdLoraConfig: the modules, by a part of their name, whose A or B is block-diagonal."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True


Invocation = Annotated[
    list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1, max_length=_INVOCATION_LIMIT)
]


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["LORA"]
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_bdlora: BlockDiagonal | None = None
    use_dora: bool = False
    ensure_weight_tying: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    alora_invocation_tokens: Invocation | None = None
    velora_config: dict[str, Any] | None = None
    monteclora_config: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    arrow_experts: dict[str, dict[str, Any]] | None = None  # not PEFT's: see arrow.py


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference. The sub-configs act only with an init_lora_weights, the others
    only with a megatron_config or use_qalora, that is refused or harmless."""

    corda_config: dict[str, Any] | None = None
    eva_config: dict[str, Any] | None = None
    loftq_config: dict[str, Any] | None = None
    lora_dropout: float = 0.0
    lora_ga_config: dict[str, Any] | None = None
    megatron_core: str | None = None
    qalora_group_size: int = 16
    runtime_config: dict[str, Any] | None = None


_CONVERT = (
    "PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ are base-fragile: their training took the adapter's start out of the "
    "base, so the file fits only that base. `veneer adapters convert FOLDER --weights MODEL --output OUT` makes a "
    "plain LoRA of PiSSA and OLoRA, given the weights of the training. PEFT's save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=...) makes one of all but LoftQ when the training ends; for LoftQ, "
    "initialise with PEFT's replace_lora_weights_loftq, which leaves the base as it is"
)
_KASA = (
    "KaSA is base-fragile: it takes the smallest singular values out of the base, so the file fits only the "
    "exact weights that it was trained on. `veneer adapters convert FOLDER --weights MODEL --output OUT` makes a "
    "plain LoRA of it, given these weights"
)
REFUSED: Mapping[str, Refusal] = {
    "init_lora_weights": Refusal((True, False, "gaussian", "eva", "orthogonal", "mica"), _CONVERT),
    "kasa_config": Refusal((None,), _KASA),
    "layer_replication": Refusal((None, []), "it makes a base of another depth"),
    "megatron_config": Refusal((None,), "Megatron's parallel layers are not served"),
    "modules_to_save": WHOLE_MODULES,
    "target_parameters": Refusal((None, []), "only linear layers are served; use target_modules"),
    "task_type": CAUSAL,
    "use_qalora": Refusal((False,), "QALoRA needs a GPTQ base; train a plain LoRA"),
}


VARIANTS = (
    "alora_invocation_tokens",
    "use_bdlora",
    "use_dora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
)  # at most one at a time, as in PEFT


def read_config(config: Mapping[str, Any]) -> Honoured:
    """The fields that count, after every field was looked at. Raises AdapterRefused."""
    fields = read_fields(config, Honoured, TrainingOnly, REFUSED, "LoraConfig")
    if len(on := [name for name in VARIANTS if getattr(fields, name) not in (None, False)]) > 1:
        raise wrong(on[0], config[on[0]], f"PEFT does not combine it with {on[1]}")
    if fields.use_dora and fields.lora_bias:
        raise wrong("use_dora", True, "PEFT does not combine it with lora_bias")
    if fields.alora_invocation_tokens is not None:
        _check_activated(fields, config)
    if fields.arrow_experts is not None and fields.arrow_config is None:
        raise wrong("arrow_experts", list(fields.arrow_experts), "without arrow_config nothing routes them")
    return fields


def _check_activated(fields: Honoured, config: Mapping[str, Any]) -> None:
    """Refuse what does not go with aLoRA."""
    if fields.bias != "none":
        raise wrong("bias", fields.bias, "it changes the base's biases before the invocation of aLoRA, too")
    if config.get("task_type") is None:
        raise wrong("task_type", None, 'without "CAUSAL_LM" PEFT looks for no invocation of aLoRA; add it')
    if config.get("init_lora_weights") == "mica":
        raise wrong("init_lora_weights", "mica", "PEFT does not combine it with alora_invocation_tokens")
