"""The resident base: transformers' own model, quantized once, its linear layers ready for adapters.

What is proven: the architectures in `PROVEN`, by tests that compare greedy tokens with transformers' own
`generate`. Anything else is refused by name.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from veneer.adapters.methods.base import Limits, Norm
from veneer.adapters.program import EMBEDDING, Site
from veneer.engine.fused import fuse_layers
from veneer.engine.hidden import HiddenStates
from veneer.engine.layers import ATTENTION_NAME, AdaptedEmbedding, AdaptedLinear, StepContext
from veneer.engine.packed import dequantized, dequantized_bias, dequantizing, pack_linears
from veneer.engine.packed_store import load_packed
from veneer.errors import InvalidRequest
from veneer.kernels.backend import resolve
from veneer.kernels.norm import rms_norm

logger = logging.getLogger(__name__)

PROVEN = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
QUANTIZATIONS = ("nf4", "int8", "none")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PLAIN_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm")
# These change their frequencies with the longest position of the whole batch, so beyond the original context
# one request would change another's numbers.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")
_NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "post_attention_layernorm": _MLP_INPUTS,
    "pre_feedforward_layernorm": _MLP_INPUTS,
    "norm": ("lm_head",),
}
"""The linear layers that read a norm of the proven architectures, and nothing else does."""


@dataclass
class Base:
    """The resident base model.

    Attributes:
        model: the transformers model, in eval mode, with `AdaptedLinear` at every site.
        sites: every linear layer adapters can target, by module path, in table order.
        hidden: the hidden states that they can target besides.
        context: the step tables that the layers read.
        max_positions: the longest context the base supports, in tokens.
        eos_token_ids: tokens that end a sequence.
        notes: limits and fallbacks that took effect, in words.
        limits: what the server takes of one adapter.
    """

    model: Any
    config: Any
    sites: Mapping[str, Site]
    hidden: HiddenStates
    context: StepContext
    device: torch.device
    dtype: torch.dtype
    quantization: str
    max_positions: int
    eos_token_ids: tuple[int, ...]
    notes: list[str] = field(default_factory=list)
    limits: Limits = Limits()  # noqa: RUF009  (a tuple)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the output head reads, [rows, hidden], of a step whose tables are in the context.

        ids, positions: int64 [rows].
        """
        inputs = {"input_ids": ids.unsqueeze(0), "position_ids": positions.unsqueeze(0)}
        with self.hidden.hooked():
            found: torch.Tensor = self.model.model(**inputs, use_cache=False).last_hidden_state[0]
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head, as transformers has it: [rows, hidden] -> [rows, vocabulary].

        The context's `head_rows` must be those of these rows.
        """
        found: torch.Tensor = self.model.lm_head(hidden.unsqueeze(0))[0]
        return self.cap(found)

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as Gemma bounds them; the same where the base has no bound."""
        bound = getattr(self.config, "final_logit_softcapping", None)
        return logits if bound is None else torch.tanh(logits / bound) * bound

    @property
    def hidden_sites(self) -> Mapping[str, Site]:
        """See `veneer.adapters.methods.base.Base`."""
        return self.hidden.sites

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def head_dim(self) -> int:
        explicit = getattr(self.config, "head_dim", None)
        return int(explicit or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def embedding(self) -> Site:
        """See `veneer.adapters.methods.base.Base`."""
        found = self.model.get_input_embeddings().base
        return Site(EMBEDDING, found.num_embeddings, found.embedding_dim)

    @property
    def embedding_scale(self) -> float:
        """See `veneer.adapters.methods.base.Base`."""
        return float(getattr(self.model.get_input_embeddings().base, "scalar_embed_scale", 1.0))

    @property
    def tied(self) -> bool:
        """See `veneer.adapters.methods.base.Base`."""
        return bool(self.config.tie_word_embeddings)

    def token_rows(self, site: str, ids: torch.Tensor) -> torch.Tensor:
        """See `veneer.adapters.methods.base.Base`."""
        if site == EMBEDDING:
            weight = self.model.get_input_embeddings().weight
        else:
            weight = getattr(self._linears[site], "weight", None)
            if weight is None or not weight.is_floating_point() or weight.shape != self.sites[site][:0:-1]:
                return dequantized(self._linears[site])[ids].cpu()
        found: torch.Tensor = weight[ids.to(weight.device)].float().cpu()
        return found

    def weight(self, site: str) -> torch.Tensor:
        """See `veneer.adapters.methods.base.Base`."""
        return dequantized(self._linears[site]).cpu().clone()

    def bias(self, site: str) -> torch.Tensor | None:
        """See `veneer.adapters.methods.base.Base`."""
        found = dequantized_bias(self._linears[site])
        return None if found is None else found.cpu().clone()

    @property
    def norms(self) -> dict[str, Norm]:
        """See `veneer.adapters.methods.base.Base`."""
        found = {}
        for path, module in self.model.named_modules():
            if type(module).__name__.endswith("RMSNorm"):
                name = path.replace(".plain.", ".")  # a fused layer holds the plain one
                weight = module.weight.detach().float().cpu().clone()
                found[name] = Norm(weight, _norm_offset(module), self._readers(name))
        return found

    def _readers(self, norm: str) -> tuple[str, ...]:
        parent, _, attribute = norm.rpartition(".")
        suffixes = _NORM_READERS.get(attribute, ())
        if self.config.model_type == "gemma3_text" and attribute == "post_attention_layernorm":
            suffixes = ()  # it normalizes what attention gives
        path = "" if attribute == "norm" else f"{parent}."
        return tuple(f"{path}{suffix}" for suffix in suffixes if f"{path}{suffix}" in self.sites)

    @cached_property
    def _linears(self) -> dict[str, nn.Module]:
        names = list(self.sites)
        return {names[m.site]: m.base for m in self.model.modules() if isinstance(m, AdaptedLinear)}

    def memory_bytes(self) -> int:
        """Bytes of all weights, each storage counted once."""
        return sum(_storages(self.model).values())


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest(f"device {name!r}: no CUDA device is visible. Use --device cpu.", param="device")
    return torch.device("cuda:0") if name == "cuda" else device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on CUDA and float32 on the CPU (most CPUs compute bfloat16 in software)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def packed_runs(quantization: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our own NF4 kernels can run this base: they are Triton's, for bfloat16."""
    return quantization == "nf4" and dtype == torch.bfloat16 and resolve(device).name == "triton"


def resolve_nf4_kernels(name: str, quantization: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether NF4 runs in our own kernels: "auto" is where they can. `load_base` refuses where they cannot."""
    return name == "packed" or (name == "auto" and packed_runs(quantization, dtype, device))


def load_base(
    folder: Path, *, quantization: str, dtype: torch.dtype, device: torch.device, own_kernels: bool = False
) -> Base:
    """Load the model in `folder` once, quantized, and wrap its linear layers.

    With `own_kernels`, NF4 layers are repacked for our own Triton kernels, and norms and layers are fused.

    Raises:
        InvalidRequest: the architecture is not proven, or its settings cannot be served exactly.
    """
    if own_kernels and not packed_runs(quantization, dtype, device):
        raise InvalidRequest(
            f"--nf4-kernels packed cannot run {quantization} in {dtype} on {device}: the kernels are Triton's, "
            "for nf4 in bfloat16 on CUDA. Use --nf4-kernels bitsandbytes.",
            param="nf4_kernels",
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type not in PROVEN:
        raise InvalidRequest(
            f"architecture {config.model_type!r} is not proven to be served exactly; "
            f"served are: {', '.join(PROVEN)}. Choose a base of one of these.",
            param="model",
        )
    notes = [f"NF4 kernels: {'packed' if own_kernels else 'bitsandbytes'}"] if quantization == "nf4" else []

    def load() -> nn.Module:
        return _load_model(folder, config, quantization, dtype, device)

    if own_kernels:
        model, replaced = load_packed(folder, config, dtype, device, load, notes)
        fuse_norms(model)
    else:
        model = load()
        replaced = pack_linears(model, dequantizing) if device.type == "cpu" else {}
    context = StepContext()
    sites = wrap_linears(model, context, replaced)
    hidden = HiddenStates(model, context, sites)
    wrap_embedding(model, context, len(sites) + len(hidden.sites))
    if own_kernels:
        fused = fuse_layers(model, context, notes)
        notes.append(f"fused decoder layers: {fused} of {config.num_hidden_layers}")
    return Base(
        model=model,
        config=model.config,
        sites=sites,
        hidden=hidden,
        context=context,
        device=device,
        dtype=dtype,
        quantization=quantization,
        max_positions=_max_positions(config, notes),
        eos_token_ids=_eos_token_ids(folder, config),
        notes=notes,
    )


def _load_model(
    folder: Path, config: Any, quantization: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    model: nn.Module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=quantization_config(quantization, dtype),
            device_map={"": device} if quantization != "none" or device.type == "cuda" else None,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    forbid_repacking(model)
    model.eval().requires_grad_(False)
    gc.collect()  # the unquantized weights are garbage now; the base is resident once
    return model


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers loads the base: bitsandbytes NF4 with double quantization, or LLM.int8."""
    if quantization == "none":
        return None
    if quantization == "int8":
        # Outlier decomposition picks its columns from the whole batch, so with it one request would change
        # another's numbers. Threshold 0 quantizes each row of activations by itself.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def forbid_repacking(model: nn.Module) -> None:
    """Keep NF4 weights as loaded: bitsandbytes would repack them in place on CPUs with AVX512-BF16.

    After that they can no longer be dequantized.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


class FusedRMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last axis, by our kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, eps = self.weight, self.eps
        assert eps is not None
        return rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def fuse_norms(model: nn.Module) -> None:
    """Replace transformers' RMSNorm, some six kernels, by our one. Gemma's (1 + w) is left alone."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in _PLAIN_RMS_NORMS:
            weight: Any = module.weight
            eps: Any = module.variance_epsilon
            norm = FusedRMSNorm(weight.shape[0], eps=eps, device="meta")
            norm.weight = weight
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, norm)


def wrap_linears(
    model: nn.Module, context: StepContext, replaced: Mapping[str, nn.Module]
) -> dict[str, Site]:
    """Put an `AdaptedLinear` at each linear layer and hand the step tables to each attention module.

    `replaced` has, by module path, what computes a layer instead of transformers' own module.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sites = {name: Site(name, module.in_features, module.out_features) for name, module in linears}
    for index, (name, module) in enumerate(linears):
        parent, _, attribute = name.rpartition(".")
        adapted = AdaptedLinear(replaced.get(name, module), index, context, is_head=module is head)
        setattr(model.get_submodule(parent), attribute, adapted)
    for part in model.modules():
        if hasattr(part, "layer_idx") and type(part).__name__.endswith("Attention"):
            part.veneer_step = context  # type: ignore[assignment]
    return sites


def wrap_embedding(model: nn.Module, context: StepContext, site: int) -> None:
    """Put an `AdaptedEmbedding` at the embedding; `site` is its index in the tables."""
    embedding = model.get_submodule(EMBEDDING)
    assert isinstance(embedding, nn.Embedding)
    parent, _, attribute = EMBEDDING.rpartition(".")
    setattr(model.get_submodule(parent), attribute, AdaptedEmbedding(embedding, site, context))


def _norm_offset(norm: nn.Module) -> float:
    """What transformers adds to the stored weight."""
    return 1.0 if type(norm).__name__.startswith("Gemma") else 0.0


def _max_positions(config: Any, notes: list[str]) -> int:
    positions = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in _rope_settings(rope):
        kind = parameters.get("rope_type", "default")
        if kind in _BATCH_DEPENDENT_ROPE:
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or positions
            if original < positions:
                notes.append(
                    f"context limited to {original} of {positions} tokens: rope type {kind!r} beyond it "
                    "depends on the longest request of the batch"
                )
                positions = int(original)
    return positions


def _rope_settings(rope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The RoPE parameters of a config: one set, or one for each kind of layer."""
    if "rope_type" in rope:
        yield rope
    else:
        yield from (value for value in rope.values() if isinstance(value, dict))


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    source = config
    if (folder / "generation_config.json").exists():
        source = GenerationConfig.from_pretrained(folder, local_files_only=True)
    eos = source.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _storages(model: nn.Module) -> dict[int, int]:
    """Bytes by storage address of every parameter, buffer and quantization state of the model."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        tensors += _quantization_tensors(getattr(parameter, "quant_state", None))
        tensors += [
            t for name in ("CB", "SCB") if isinstance(t := getattr(parameter, name, None), torch.Tensor)
        ]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _quantization_tensors(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    own = [
        t
        for name in ("absmax", "code", "offset")
        if isinstance(t := getattr(state, name, None), torch.Tensor)
    ]
    return own + _quantization_tensors(getattr(state, "state2", None))
