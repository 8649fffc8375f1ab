"""Cases of what has an activation between its factors: LLaMA-adapter's gated attention, routing over LoRAs."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import AdaptionPromptConfig, ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from safetensors.torch import load_file, save_file

from veneer.adapters.convert import write
from veneer.adapters.methods.arrow import pack
from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.training.conformance.cases import Case, peft_case, randomize


def _strongly(model: Any) -> None:
    """Gates start at 0, and prompts as normal numbers, of which a tenth does little."""
    for _ in range(5):
        randomize(model)


def _arrow(variant: str, experts: list[LoraConfig], general: int = 0, **fields: Any) -> Case:
    """A router over the experts, of which the last `general` are those of GenKnowSub."""

    def make(model: Any) -> Any:
        with tempfile.TemporaryDirectory() as temporary:
            paths = [str(Path(temporary) / str(index)) for index in range(len(experts))]
            for path, config in zip(paths, experts, strict=True):
                get_peft_model(copy.deepcopy(model), config).save_pretrained(path)
            tasks = len(paths) - general
            router = ArrowConfig(use_gks=general > 0, **fields)
            return create_arrow_model(model, paths[:tasks], router, paths[tasks:] or None)

    return Case(f"LORA Arrow{variant}", "LORA", make, _randomize_experts, _save_packed, _load_packed)


def _randomize_experts(model: Any) -> None:
    """Those of the experts are frozen: the router is what PEFT has active."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)


def _save_packed(model: Any, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        write(folder, *pack(Path(temporary)))


def _load_packed(model: Any, folder: Path) -> Any:
    """By way of the folders of the experts, which is all that PEFT can load."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    arrow, tensors = config["arrow_config"], load_file(folder / WEIGHTS_FILE)
    with tempfile.TemporaryDirectory() as temporary:
        for name, expert in config["arrow_experts"].items():
            path = Path(temporary) / name
            path.mkdir()
            (path / CONFIG_FILE).write_text(json.dumps(expert))
            own = {
                key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")
            }
            save_file(own, path / WEIGHTS_FILE)
        tasks, general = (
            [str(Path(temporary) / name) for name in arrow[names]]
            for names in ("task_adapter_names", "gks_adapter_names")
        )
        fields = {name: arrow[name] for name in ("top_k", "router_temperature", "use_gks", "rng_seed")}
        return create_arrow_model(model, tasks, ArrowConfig(**fields), general or None)


def _expert(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields})


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
    _arrow("", [_expert(lora_alpha=4 * scale) for scale in (1, 2, 3, 4)], top_k=2, rng_seed=5),
    _arrow(
        " GenKnowSub",
        [_expert(), _expert(use_rslora=True), _expert(), _expert(), _expert(lora_alpha=3)],
        general=2,
        top_k=3,
        router_temperature=0.3,
        rng_seed=0,
    ),
]
