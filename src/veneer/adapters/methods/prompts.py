"""What PEFT's prompt methods have in common: virtual tokens in front of the prompt, from one tensor of the file.

Each has `prompt_embeddings`: the encoder that training put before it (an MLP, an LSTM, frozen parts) is applied
when PEFT saves. Real tokens stand at the positions after the virtual ones.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/peft_model.py (PeftModel.get_prompt)
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import WHOLE_MODULES, Refusal, wrong
from veneer.adapters.program import Program, Prompt

EMBEDDINGS = "prompt_embeddings"


class PromptFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of PEFT's PromptLearningConfig that say how the tensor is read, with PEFT's defaults.

    Those that are None PEFT takes from the base.
    """

    base_model_name_or_path: str | None = None
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None


REFUSED: Mapping[str, Refusal] = {
    "modules_to_save": WHOLE_MODULES,
    "num_transformer_submodules": Refusal((1, None), "the base is one decoder"),
    "task_type": Refusal(("CAUSAL_LM",), "without it PEFT leaves the virtual tokens out"),
}


def count(config: PromptFields) -> int:
    """The number of virtual tokens, at least 1."""
    tokens = config.num_virtual_tokens
    if tokens is None or tokens < 1:
        raise wrong("num_virtual_tokens", tokens, "there must be at least one virtual token")
    return tokens


def kv_shape(base: Base, tokens: int) -> tuple[int, int, int, int, int]:
    return base.num_layers, 2, tokens, base.num_kv_heads, base.head_dim


def lower_kv(checkpoint: Checkpoint, config: PromptFields, base: Base, kind: str) -> Program:
    """Keys and values as the file has them: [tokens, layers * 2 * kv_heads * head_dim], of each layer keys first.

    No RoPE is applied to the keys.
    """
    shape = layers, sides, tokens, heads, head_dim = kv_shape(base, count(config))
    _check(config, token_dim=heads * head_dim, num_layers=layers, num_attention_heads=heads)
    checkpoint.require({EMBEDDINGS: (tokens, layers * sides * heads * head_dim)}, _explain)
    kv = checkpoint.read(EMBEDDINGS).view(tokens, layers, sides, heads, head_dim)
    prompt = Prompt(shape, kv=kv.permute(1, 2, 0, 3, 4).contiguous())
    return Program(kind=kind, sites={}, base_model=config.base_model_name_or_path or "", prompt=prompt)


def lower_embeddings(
    checkpoint: Checkpoint,
    config: PromptFields,
    base: Base,
    kind: str,
    factors: Mapping[str, tuple[int, ...]] | None = None,
) -> Program:
    """Embeddings [tokens, hidden], which the first layer gets as they are.

    `factors` are the shapes of further tensors, tasks first; the embeddings are multiplied with the matrix product
    of the checkpoint's task.
    """
    tokens = count(config)
    _check(config, token_dim=base.hidden_size)
    factors = factors or {}
    checkpoint.require({EMBEDDINGS: (tokens, base.hidden_size), **factors}, _explain)
    embeddings = checkpoint.read(EMBEDDINGS)
    if factors:
        embeddings *= torch.linalg.multi_dot([checkpoint.read(name)[checkpoint.task] for name in factors])
        if not embeddings.isfinite().all():
            raise wrong("num_virtual_tokens", tokens, f"the product of {', '.join(factors)} overflows")
    prompt = Prompt(kv_shape(base, tokens), embeddings=embeddings)
    return Program(kind=kind, sites={}, base_model=config.base_model_name_or_path or "", prompt=prompt)


def _check(config: PromptFields, **sizes: int) -> None:
    """The fields that describe the base describe this one."""
    for name, size in sizes.items():
        value = getattr(config, name)
        if value not in (None, size):
            raise wrong(name, value, f"the base that is served here has {size}; train on this base")


def _explain(key: str) -> str:
    return "PEFT's prompt methods save prompt_embeddings; the encoder that makes them is not needed"
