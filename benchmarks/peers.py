"""Peers that run in this process: transformers + PEFT on bitsandbytes' NF4, with random weights."""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from itertools import pairwise
from typing import Any

import torch
from benchmarks.models import RANK, linear_shapes
from torch import nn
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from veneer.engine.base import forbid_repacking, resolve_device, resolve_dtype


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class Peft:
    """A mixed batch as PEFT serves it: `generate(adapter_names=...)`, LoRA on all seven projections."""

    def __init__(self, config: Any, adapters: int) -> None:
        self._device = resolve_device("auto")
        dtype = resolve_dtype("auto", self._device)
        with torch.device(self._device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model: Any = _random_nf4(config, dtype)
            for index in range(adapters):
                self._add_adapter(index, config)
        for name, parameter in self._model.named_parameters():
            if "lora_" in name:  # PEFT makes them float32; the base's type is the faster one
                parameter.data = parameter.data.to(dtype)
        self._model.eval()

    def _add_adapter(self, index: int, config: Any) -> None:
        from peft import LoraConfig, get_peft_model

        targets = [name.rpartition(".")[2] for name in linear_shapes(config)]
        lora = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        if index:
            self._model.add_adapter(f"a{index}", lora)
        else:
            self._model = get_peft_model(self._model, lora, adapter_name="a0")

    def decode_us(self, batch: int, adapters: int, prompt: int, steps: int) -> float:
        """Median time of a decode step, synchronized after each one's logits."""
        vocabulary = self._model.config.vocab_size
        ids = torch.randint(vocabulary, (batch, prompt), device=self._device)
        clock = _Clock()
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                adapter_names=[f"a{index % adapters}" if adapters else "__base__" for index in range(batch)],
                max_new_tokens=steps + 3,  # the first one is the prompt's, the next two warm up
                min_new_tokens=steps + 3,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
            )
        return statistics.median(b - a for a, b in pairwise(clock.times[2:])) * 1e6


class _Clock(LogitsProcessor):  # type: ignore[misc]
    """Notes when each step's logits are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def _random_nf4(config: Any, dtype: torch.dtype) -> Any:
    """Random weights, each linear quantized in place as transformers' bitsandbytes loader does it."""
    import bitsandbytes

    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        linear = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        linear.weight = weight.to(module.weight.device)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, linear)
    forbid_repacking(model)
    model.is_loaded_in_4bit = True  # so that PEFT takes its own layer for it
    return model.requires_grad_(False)
