"""PEFT's ADALORA: y += α/(init_r + 1e-5) · B diag(E) A x, where training has pruned the rank of each layer.

α of 0 or less stands for the layer's rank. The divisor is the rank before the pruning, as in peft, which carries
`ranknum` over when it resizes a layer: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/adalora

Keys are `base_model.model.<module>.lora_A` [r, in], `lora_B` [out, r] and `lora_E` [r, 1]. r is init_r, or how
many of the init_r flags of rank_pattern[`<module>.lora_E`] are true; it may be 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from veneer.adapters.checkpoint import Checkpoint, shown
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    BASE_BIASES,
    CAUSAL,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    check_rank,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["ADALORA"]
    init_r: int = 12
    lora_alpha: float = 8
    rank_pattern: dict[str, list[bool]] | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference, and fields of LoRA's config that peft's AdaLoRA does not look at."""

    alpha_pattern: dict[str, float] | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    corda_config: dict[str, Any] | None = None
    deltaT: int = 1
    eva_config: dict[str, Any] | None = None
    fan_in_fan_out: bool = False  # peft sets it to false for linear layers
    loftq_config: dict[str, Any] | None = None
    lora_dropout: float = 0.0
    lora_ga_config: dict[str, Any] | None = None
    megatron_core: str | None = None
    orth_reg_weight: float = 0.5
    qalora_group_size: int = 16
    r: int = 8
    runtime_config: dict[str, Any] | None = None
    target_r: int = 8
    tfinal: int = 0
    tinit: int = 0
    total_step: int | None = None
    use_rslora: bool = False


_PLAIN = "PEFT's AdaLoRA has no such variant; train without it"
REFUSED: Mapping[str, Refusal] = {
    "alora_invocation_tokens": Refusal((None,), _PLAIN),
    "arrow_config": Refusal((None,), _PLAIN),
    "bias": BASE_BIASES,
    "ensure_weight_tying": Refusal((False,), "adapters on tied embeddings are not served"),
    "init_lora_weights": Refusal((True, False), _PLAIN),
    "kasa_config": Refusal((None,), _PLAIN),
    "layer_replication": Refusal((None, []), "it makes a base of another depth"),
    "lora_bias": Refusal((False,), _PLAIN),
    "megatron_config": Refusal((None,), "Megatron's parallel layers are not served"),
    "modules_to_save": WHOLE_MODULES,
    "monteclora_config": Refusal((None,), _PLAIN),
    "target_parameters": Refusal((None, []), "only linear layers are served; use target_modules"),
    "task_type": CAUSAL,
    "trainable_token_indices": Refusal((None,), "it replaces embeddings of the base, which is shared"),
    "use_bdlora": Refusal((None,), _PLAIN),
    "use_dora": Refusal((False,), _PLAIN),
    "use_qalora": Refusal((False,), _PLAIN),
    "velora_config": Refusal((None,), _PLAIN),
}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT AdaLoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "AdaLoraConfig")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".lora_", warnings)
    check_rank(config.init_r, max_rank, "init_r")
    ranks = _ranks(config, sites)
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        rank = ranks[site.name]
        shapes[f"{PREFIX}{site.name}.lora_A"] = (rank, site.in_features)
        shapes[f"{PREFIX}{site.name}.lora_B"] = (site.out_features, rank)
        shapes[f"{PREFIX}{site.name}.lora_E"] = (rank, 1)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".lora_", base))
    programs = {}
    for site in sites:
        if rank := ranks[site.name]:
            a, b, e = (checkpoint.read(f"{PREFIX}{site.name}.lora_{name}") for name in "ABE")
            alpha = config.lora_alpha if config.lora_alpha > 0 else rank
            programs[site.name] = low_rank(site, a, b.T * e * (alpha / (config.init_r + 1e-5)))
    return Program(
        kind="adalora",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _ranks(config: Honoured, sites: Iterable[Site]) -> dict[str, int]:
    """The rank of each site after the pruning."""
    ranks = {site.name: config.init_r for site in sites}
    for key, kept in (config.rank_pattern or {}).items():
        name, _, tensor = key.rpartition(".")
        if tensor != "lora_E" or name not in ranks:
            raise wrong(
                "rank_pattern",
                {key: "…"},
                f"{shown(key)} must be the lora_E of a layer that the adapter changes",
            )
        if len(kept) != config.init_r:
            rule = f"{name} has {len(kept)} flags and must have init_r = {config.init_r}"
            raise wrong("rank_pattern", {key: "…"}, rule)
        ranks[name] = sum(kept)
    return ranks
