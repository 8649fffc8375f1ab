"""A base of which only the shapes are in memory: weights are read from a checkpoint when they are asked for.

For what is done with a model's weights and not with the model: merging adapters into them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from veneer.adapters.methods.base import Limits, Norm
from veneer.adapters.model_weights import Weights
from veneer.adapters.program import EMBEDDING, HEAD
from veneer.engine.base import PROVEN, Base, _norm_offset, wrap_embedding, wrap_linears
from veneer.engine.hidden import HiddenStates
from veneer.engine.layers import StepContext
from veneer.errors import InvalidRequest

_NO_LIMITS = Limits(module_bytes=1 << 62)


@dataclass
class CheckpointBase(Base):
    """See `veneer.adapters.methods.base.Base`. Weights are the checkpoint's own, unquantized."""

    weights: Weights = field(kw_only=True)

    def weight(self, site: str) -> torch.Tensor:
        return self.weights.read(EMBEDDING if site == HEAD and HEAD not in self.weights.sites else site)

    def bias(self, site: str) -> torch.Tensor | None:
        found = self.weights.tensor(f"{site}.bias")
        return None if found is None else found.to(torch.float32, copy=True)

    def token_rows(self, site: str, ids: torch.Tensor) -> torch.Tensor:
        return self.weight(site)[ids]

    @property
    def norms(self) -> dict[str, Norm]:
        return self._read_norms

    @cached_property
    def _read_norms(self) -> dict[str, Norm]:
        found = {}
        for path, module in self.model.named_modules():
            weight = (
                self.weights.tensor(f"{path}.weight") if type(module).__name__.endswith("RMSNorm") else None
            )
            if weight is not None:
                found[path] = Norm(weight.float(), _norm_offset(module), self._readers(path))
        return found


def open_base(folder: Path) -> CheckpointBase:
    """The base in a model's folder.

    Raises:
        InvalidRequest: the architecture is not proven, the weights are quantized, or their names are not its own.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type not in PROVEN:
        raise InvalidRequest(
            f"architecture {config.model_type!r} is not known exactly; known are: {', '.join(PROVEN)}.",
            param="model",
        )
    weights = Weights(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    context = StepContext()
    sites = wrap_linears(model, context, {})
    hidden = HiddenStates(model, context, sites)
    wrap_embedding(model, context, len(sites) + len(hidden.sites))
    base = CheckpointBase(
        model=model,
        config=config,
        sites=sites,
        hidden=hidden,
        context=context,
        device=torch.device("cpu"),
        dtype=torch.float32,
        quantization="none",
        max_positions=int(config.max_position_embeddings),
        eos_token_ids=(),
        limits=_NO_LIMITS,
        weights=weights,
    )
    wanted = {EMBEDDING, *sites} - ({HEAD} if base.tied else set())
    if missing := sorted(wanted - weights.sites.keys()):
        raise InvalidRequest(
            f"the checkpoint in {str(folder)!r} has no {missing[0]}.weight, as transformers names it; save it with "
            "transformers' save_pretrained first",
            param="model",
        )
    return base
