"""PEFT's ADAPTION_PROMPT (LLaMA-adapter): gated attention to a learned prompt, in the top `adapter_layers` layers.

To what the heads of attention give, before o_proj, comes of each head

    gate softmax(q K^T / sqrt(head_dim)) V        K, V: k_proj and v_proj of the prompt, of the head's group

with q after RoPE, K without, and a softmax of its own over the prompt alone. That is low rank with a softmax: a row
of A is a key in the columns of its head, the same row of B the gated value. PEFT sends the sum through o_proj by
itself, so a bias of o_proj comes twice. K and V follow from the base's weights as they are served.
https://arxiv.org/abs/2303.16199,
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/adaption_prompt/layer.py (AdaptedAttention)

Keys are `base_model.model.model.layers.N.self_attn.adaption_prompt` [1, adapter_len, hidden] and
`adaption_gate` [1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import CAUSAL, PREFIX, WHOLE_MODULES, Common, Refusal, read_fields, wrong
from veneer.adapters.program import Activation, Program, SiteProgram
from veneer.errors import AdapterRefused

_MODELS = ("llama", "mistral")  # those of PEFT that are served here; it also has gpt2


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["ADAPTION_PROMPT"]
    base_model_name_or_path: str | None = None
    target_modules: Literal["self_attn"] | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""


REFUSED: Mapping[str, Refusal] = {"modules_to_save": WHOLE_MODULES, "task_type": CAUSAL}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT adaption prompt. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "AdaptionPromptConfig")
    heads = _heads(base)
    length = _length(config, heads, max_rank)
    modules = _modules(config, base)
    checkpoint.require(
        {f"{PREFIX}{name}.adaption_prompt": (1, length, base.hidden_size) for name in modules}
        | {f"{PREFIX}{name}.adaption_gate": (1,) for name in modules},
        lambda key: (
            f"the config names the {len(modules)} top layers of the base, which has {base.num_layers}"
        ),
    )
    sites = {}
    for name in modules:
        prompt = checkpoint.read(f"{PREFIX}{name}.adaption_prompt")[0]
        gate = checkpoint.read(f"{PREFIX}{name}.adaption_gate")
        sites[f"{name}.heads"] = _side_attention(base, name, prompt, gate, heads)
        if (bias := base.bias(f"{name}.o_proj")) is not None:
            sites[f"{name}.o_proj"] = SiteProgram(bias=bias)
    return Program(
        kind="adaption_prompt",
        sites=sites,
        base_model=config.base_model_name_or_path or "",
        portability="proportional",
    )


def _heads(base: Base) -> int:
    """The query heads of a base that PEFT has this method for."""
    if base.model_type not in _MODELS:
        raise AdapterRefused(
            f"ADAPTION_PROMPT on a base of type {base.model_type!r}: PEFT has it for {', '.join(_MODELS)} alone. "
            "Train another kind of adapter."
        )
    heads = base.hidden_sites["model.layers.0.self_attn.heads"].in_features // base.head_dim
    factor = base.hidden_size // (base.num_kv_heads * base.head_dim)
    if factor * base.num_kv_heads != heads:
        raise AdapterRefused(
            f"ADAPTION_PROMPT on a base whose {heads} heads of {base.head_dim} are wider than its hidden size "
            f"{base.hidden_size}: PEFT cannot run it. Train another kind of adapter."
        )
    return heads


def _length(config: Honoured, heads: int, max_rank: int) -> int:
    length = config.adapter_len
    if length is None or length < 1:
        raise wrong("adapter_len", length, "the prompt must have at least one vector")
    if heads * length > max_rank:
        rule = f"with {heads} heads it needs rank {heads * length}, the limit is {max_rank} (--max-lora-rank)"
        raise wrong("adapter_len", length, rule)
    return length


def _modules(config: Honoured, base: Base) -> list[str]:
    """The attention modules of the top layers."""
    count = config.adapter_layers
    if count is None or not 1 <= count <= base.num_layers:
        raise wrong("adapter_layers", count, f"it must be from 1 to the base's {base.num_layers} layers")
    return [f"model.layers.{index}.self_attn" for index in range(base.num_layers - count, base.num_layers)]


def _side_attention(
    base: Base, name: str, prompt: torch.Tensor, gate: torch.Tensor, heads: int
) -> SiteProgram:
    """Attention to prompt [length, hidden] at the heads of the attention module `name`; gate [1]."""
    keys = _project(base, f"{name}.k_proj", prompt, heads) / math.sqrt(base.head_dim)
    values = _project(base, f"{name}.v_proj", prompt, heads) * gate
    a, b = (_block_diagonal(side) for side in (keys, values))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterRefused(f"The keys or values of {name} overflow; the adapter's values are too large.")
    return SiteProgram(a=a, b=b, activation=Activation("softmax", group=len(prompt)))


def _project(base: Base, site: str, prompt: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values of prompt [length, hidden] for each query head: [heads, length, head_dim]."""
    made = prompt @ base.weight(site).T
    if (bias := base.bias(site)) is not None:
        made += bias
    grouped = made.view(len(prompt), base.num_kv_heads, base.head_dim).transpose(0, 1)
    return grouped.repeat_interleave(heads // base.num_kv_heads, 0)


def _block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """[heads, length, head_dim] -> [heads * length, heads * head_dim], zero between heads."""
    heads, length, head_dim = blocks.shape
    whole = torch.zeros(heads, length, heads, head_dim)
    each = torch.arange(heads)
    whole[each, :, each] = blocks
    return whole.view(heads * length, heads * head_dim)
