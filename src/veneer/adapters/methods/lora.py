"""PEFT's LORA, read as peft 0.21 writes it: y += s·B(A x) + s·b, with s = α/r, or α/√r for rsLoRA.

Every field of peft's LoraConfig is honoured (`Honoured`), without effect on inference (`TrainingOnly`), or
refused by name unless it is off (`REFUSED`). A field in none of the three is refused as unknown.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/config.py

Keys are `base_model.model.<module>.lora_A.weight` [r, in], `lora_B.weight` [out, r] and `lora_B.bias` [out].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from veneer.adapters.checkpoint import Checkpoint, listed, shown
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import (
    CAUSAL,
    HEAD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    choose_sites,
    compile_pattern,
    read_fields,
    wrong,
)
from veneer.adapters.program import Program, Site, SiteProgram


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
    "PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change the base; convert the adapter with PEFT's save_pretrained"
    "(folder, path_initial_model_for_weight_conversion=...), which writes a plain LoRA"
)
_LATER = "this variant of LoRA is not served; train a plain LoRA"
REFUSED: Mapping[str, Refusal] = {
    "alora_invocation_tokens": Refusal((None,), "activated LoRA is not served; train a plain LoRA"),
    "arrow_config": Refusal((None,), "Arrow routing over several adapters is not served"),
    "bias": Refusal(("none",), "it replaces biases of the base, which is shared; use lora_bias"),
    "ensure_weight_tying": Refusal((False,), "adapters on tied embeddings are not served"),
    "init_lora_weights": Refusal((True, False, "gaussian", "eva", "orthogonal", "mica"), _CONVERT),
    "kasa_config": Refusal((None,), "KaSA changes the base; train a plain LoRA"),
    "layer_replication": Refusal((None, []), "it makes a base of another depth"),
    "megatron_config": Refusal((None,), "Megatron's parallel layers are not served"),
    "modules_to_save": WHOLE_MODULES,
    "monteclora_config": Refusal((None,), _LATER),
    "target_parameters": Refusal((None, []), "only linear layers are served; use target_modules"),
    "task_type": CAUSAL,
    "trainable_token_indices": Refusal((None,), "it replaces embeddings of the base, which is shared"),
    "use_bdlora": Refusal((None,), _LATER),
    "use_dora": Refusal((False,), "DoRA is not served; train with use_dora=false"),
    "use_qalora": Refusal((False,), "QALoRA needs a GPTQ base; train a plain LoRA"),
    "velora_config": Refusal((None,), _LATER),
}


class _Scaled(NamedTuple):
    """A site the adapter changes."""

    site: Site
    rank: int
    scale: float


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT LoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_config(checkpoint.config)
    warnings: list[str] = []
    sites = _scaled(
        config, choose_sites(config, base, checkpoint.header, ".lora_", warnings), max_rank, warnings
    )
    shapes = _shapes(config, sites)
    dump = f"{PREFIX}{HEAD}.base_layer.weight"
    if dump in checkpoint.header and any(item.site.name == HEAD for item in sites):
        # PEFT adds the frozen weight of a targeted head to the file. It is the base's own and is not read.
        shapes[dump] = (base.sites[HEAD].out_features, base.sites[HEAD].in_features)
        warnings.append(f"{dump}: this copy of the base's output head is not used.")
    if config.fan_in_fan_out:
        warnings.append(
            "fan_in_fan_out: true has no effect on a base of linear layers; PEFT sets it to false."
        )
    checkpoint.require(shapes, lambda key: _explain(key, base))
    return Program(
        kind="lora",
        sites={item.site.name: _read(checkpoint, item, config.lora_bias) for item in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def read_config(config: Mapping[str, Any]) -> Honoured:
    """The fields that count, after every field was looked at. Raises AdapterRefused."""
    return read_fields(config, Honoured, TrainingOnly, REFUSED, "LoraConfig")


def _scaled(config: Honoured, sites: list[Site], max_rank: int, warnings: list[str]) -> list[_Scaled]:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank_key, alpha_key = compile_pattern("rank_pattern", ranks), compile_pattern("alpha_pattern", alphas)
    used: dict[str, set[str | None]] = {"rank_pattern": set(), "alpha_pattern": set()}
    scaled = []
    for site in sites:
        in_ranks, in_alphas = rank_key(site.name), alpha_key(site.name)
        used["rank_pattern"].add(in_ranks)
        used["alpha_pattern"].add(in_alphas)
        rank = config.r if in_ranks is None else ranks[in_ranks]
        alpha = config.lora_alpha if in_alphas is None else alphas[in_alphas]
        if not 1 <= rank <= max_rank:
            rule = f"the rank of {site.name} must be from 1 to {max_rank} (--max-lora-rank)"
            raise wrong("r" if in_ranks is None else "rank_pattern", rank, rule)
        scaled.append(_Scaled(site, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    for field, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if idle := [key for key in pattern if key not in used[field]]:
            warnings.append(f"{field}: {listed(idle)} decides for no layer.")
    return scaled


def _shapes(config: Honoured, sites: Iterable[_Scaled]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for site, rank, _ in sites:
        shapes[f"{PREFIX}{site.name}.lora_A.weight"] = (rank, site.in_features)
        shapes[f"{PREFIX}{site.name}.lora_B.weight"] = (site.out_features, rank)
        if config.lora_bias:
            shapes[f"{PREFIX}{site.name}.lora_B.bias"] = (site.out_features,)
    return shapes


def _read(checkpoint: Checkpoint, item: _Scaled, lora_bias: bool) -> SiteProgram:
    key = f"{PREFIX}{item.site.name}"
    b = checkpoint.read(f"{key}.lora_B.weight").t().contiguous().mul_(item.scale)
    bias = checkpoint.read(f"{key}.lora_B.bias").mul_(item.scale) if lora_bias else None
    if not (b.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise wrong("lora_alpha", item.scale, f"with this scale the values of {item.site.name} overflow")
    return SiteProgram(a=checkpoint.read(f"{key}.lora_A.weight").contiguous(), b=b, bias=bias)


def _explain(key: str, base: Base) -> str:
    """Why a tensor that the config does not name is refused."""
    module, _, part = key.removeprefix(PREFIX).partition(".lora_")
    if not key.startswith(PREFIX):
        return f"PEFT's keys begin with {PREFIX!r}"
    if part.startswith("embedding"):
        return "LoRA on the embedding is not served"
    if part.startswith("magnitude"):
        return "DoRA is not served"
    if re.fullmatch(r"[AB]\.[^.]+\.(weight|bias)", part):
        return "the key holds an adapter's name; save with PEFT's save_pretrained, which removes it"
    if part not in ("A.weight", "B.weight", "B.bias"):
        return "it is no tensor of a plain LoRA, and an adapter cannot replace the base's own"
    if module not in base.sites:
        return f"the base has no linear layer {shown(module)}"
    if part == "B.bias":
        return "lora_bias is false"
    return "target_modules, exclude_modules and layers_to_transform leave this layer out"
