"""What can be trained: from a recipe's `Adapter` to a model with trainable weights on a view of the base.

PEFT makes the modules of all kinds but three of our own (modules.py). Kinds are spelled as in recipe.py, which also
says which fields of `Adapter` each uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from veneer.errors import InvalidRequest
from veneer.training.modules import add_bottlenecks, add_interventions, free_layers
from veneer.training.peft_model import PeftTrainable, start_factors
from veneer.training.recipe import USES, Adapter, Kind, Training
from veneer.training.trainable import Trainable

_PLUS_RATIO = 16.0  # LoRA+, https://arxiv.org/abs/2402.12354


@dataclass(frozen=True)
class Setting:
    """What a kind may need to know besides the adapter's fields."""

    view: Any  # transformers' model, from `veneer.engine.view`
    total_steps: int
    base_name: str  # as the adapter's config will call it
    weights: Path  # the base's folder, for initialisations from unquantized weights
    examples: Callable[[], list[dict[str, torch.Tensor]]]  # batches of the data, for those from activations


def make_trainable(training: Training, setting: Setting) -> Trainable:
    """Put the adapter of `training` on the view; the same seed gives the same first weights.

    Raises:
        InvalidRequest: the kind's library refuses a field; it is named.
    """
    adapter = training.adapter
    torch.manual_seed(training.seed)
    try:
        return KINDS[adapter.kind](adapter, setting)
    except (ValueError, TypeError, NotImplementedError) as error:
        field = "options" if adapter.options else "targets" if "targets" in USES[adapter.kind] else "kind"
        raise InvalidRequest(
            f"adapter.{field} {getattr(adapter, field)!r}: {error}", param=f"adapter.{field}"
        ) from error


def plus_ratio(training: Training) -> float | None:
    """Learning rate of LoRA's B over that of A."""
    if training.loraplus_ratio is None:
        return _PLUS_RATIO if training.adapter.kind == "lora+" else None
    if training.adapter.kind not in ("lora", "rslora", "dora", "lora+"):
        raise InvalidRequest(
            f"loraplus_ratio={training.loraplus_ratio:g}: kind {training.adapter.kind!r} has no factors A and B; "
            "leave it out",
            param="loraplus_ratio",
        )
    return training.loraplus_ratio


def _peft(adapter: Adapter, setting: Setting, config: type[Any], **fields: Any) -> PeftTrainable:
    """PEFT's model; `adapter.options` are added to the fields, and may not take their places."""
    taken = sorted(fields.keys() & adapter.options.keys())
    if taken:
        raise ValueError(f"{taken[0]!r} follows from the adapter's own fields; set those")
    known = {name for name in config.__dataclass_fields__ if not name.startswith("_")}
    unknown = sorted(adapter.options.keys() - known)
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no field of PEFT's {config.__name__}")
    if adapter.layers is not None and "layers_to_transform" in known:
        fields["layers_to_transform"] = adapter.layers
    return PeftTrainable(
        setting.view, config(task_type="CAUSAL_LM", **fields, **adapter.options), setting.base_name
    )


def _lora(adapter: Adapter, setting: Setting) -> Trainable:
    if adapter.init != "default" and (adapter.kind == "dora" or adapter.options):
        raise ValueError(f"init {adapter.init!r} is for LoRA without DoRA and further options")
    model = _peft(
        adapter,
        setting,
        peft.LoraConfig,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.kind == "rslora",
        use_dora=adapter.kind == "dora",
        target_modules=adapter.targets,
        **(
            {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)}
            if adapter.init == "eva"
            else {}
        ),
    )
    if adapter.init != "default":
        start_factors(model, adapter.init, setting.weights, setting.examples)
    return model


def _adalora(adapter: Adapter, setting: Setting) -> Trainable:
    """Ranks begin half as large again and end at `rank` on average (https://arxiv.org/abs/2303.10512)."""
    total = setting.total_steps
    if total < 4:
        raise ValueError(f"AdaLoRA gives ranks away over the steps; it needs at least 4, not {total}")
    return _peft(
        adapter,
        setting,
        peft.AdaLoraConfig,
        init_r=-(-adapter.rank * 3 // 2),
        target_r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        total_step=total,
        tinit=total // 10,
        tfinal=total // 4,
        deltaT=max(1, total // 50),
    )


def _ia3(adapter: Adapter, setting: Setting) -> Trainable:
    targets = adapter.targets if "targets" in adapter.model_fields_set else _ia3_targets(setting.view)
    if targets == "all-linear":
        raise ValueError("IA3 scales keys, values and the MLP's inner state; name the modules")
    inner = [name for name in targets if name.rpartition(".")[2] == "down_proj"]
    return _peft(adapter, setting, peft.IA3Config, target_modules=targets, feedforward_modules=inner)


def _ia3_targets(view: Any) -> list[str]:
    names = {name.rpartition(".")[2] for name, _ in view.named_modules()}
    return ["k_proj", "v_proj", "down_proj"] if "k_proj" in names else ["qkv_proj", "down_proj"]


def _ranked(
    config: str, rank: str = "r", alpha: str | None = None, dropout: str | None = None, **more: Any
) -> Callable[..., Trainable]:
    """Of a method that PEFT gives a rank, perhaps an alpha and a dropout, under these names; `more` are further
    fields."""

    def make(adapter: Adapter, setting: Setting) -> Trainable:
        fields: dict[str, Any] = {rank: adapter.rank, "target_modules": adapter.targets, **more}
        if alpha is not None:
            fields[alpha] = adapter.alpha
        if dropout is not None:
            fields[dropout] = adapter.dropout
        return _peft(adapter, setting, getattr(peft, config), **fields)

    return make


def _virtual(config: str) -> Callable[..., Trainable]:
    def make(adapter: Adapter, setting: Setting) -> Trainable:
        return _peft(adapter, setting, getattr(peft, config), num_virtual_tokens=adapter.tokens)

    return make


def _vera(adapter: Adapter, setting: Setting) -> Trainable:
    rank = adapter.rank if "rank" in adapter.model_fields_set else 256
    return _peft(
        adapter,
        setting,
        peft.VeraConfig,
        r=rank,
        vera_dropout=adapter.dropout,
        target_modules=adapter.targets,
        save_projection=True,
    )


KINDS: Mapping[Kind, Callable[[Adapter, Setting], Trainable]] = {
    "lora": _lora,
    "rslora": _lora,
    "dora": _lora,
    "lora+": _lora,
    "adalora": _adalora,
    "vera": _vera,
    "gralora": _ranked("GraloraConfig", alpha="alpha", dropout="gralora_dropout"),
    "loha": _ranked("LoHaConfig", alpha="alpha"),
    "lokr": _ranked("LoKrConfig", alpha="alpha"),
    "oft": _ranked("OFTConfig", rank="oft_block_size", r=0),
    "ia3": _ia3,
    "hra": _ranked("HRAConfig"),
    "miss": _ranked("MissConfig", dropout="miss_dropout"),
    "prefix": _virtual("PrefixTuningConfig"),
    "prompt": _virtual("PromptTuningConfig"),
    "p-tuning": _virtual("PromptEncoderConfig"),
    "bitfit": lambda adapter, setting: _peft(
        adapter, setting, peft.BeftConfig, target_modules=adapter.targets
    ),
    "reft": lambda adapter, setting: add_interventions(setting.view, adapter, setting.base_name),
    "bottleneck": lambda adapter, setting: add_bottlenecks(setting.view, adapter, setting.base_name),
    "layers": lambda adapter, setting: free_layers(setting.view, adapter, setting.base_name),
}
