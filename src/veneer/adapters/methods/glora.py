"""PEFT's GLORA: W = W0 + W0 ⊙ A + B and, where the base has a bias b0, b = b0 + b0 ⊙ D + E + W0 C.

A and B are products Xd Xu ("lora"), one number for each output ("vector"), one number ("constant") or nothing.
Only a product in A makes W0 ⊙ A dense, of a rank up to r times W0's; otherwise 1 + A scales the output, and B is of
rank r or 1. W0 is the weight that is served, as in peft on the same base.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/glora/layer.py

Keys are `base_model.model.<module>.glora_{A,B,C,D,E}.` with `Xd`, `Xu`; `X`; or, for nothing, `zeros`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from veneer.adapters.checkpoint import Checkpoint, shown
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import change
from veneer.adapters.methods.common import (
    BASE_BIASES,
    CAUSAL,
    NO_FIELD,
    PREFIX,
    WHOLE_MODULES,
    Common,
    Refusal,
    Targeting,
    add_head_copy,
    choose_sites,
    explain_for,
    low_rank,
    read_fields,
    wrong,
)
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused

Form = Literal["lora", "vector", "constant", "none"]


class Honoured(Targeting, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["GLORA"]
    config_A_B: Form = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    r: int = 8


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {
    "bias": BASE_BIASES,
    "exclude_modules": NO_FIELD,
    "layers_pattern": NO_FIELD,
    "layers_to_transform": NO_FIELD,
    "modules_to_save": WHOLE_MODULES,
    "task_type": CAUSAL,
}


class _Path(NamedTuple):
    """The form of one of A to E at a site."""

    key: str
    form: Form
    shape: tuple[int, ...]  # of what it stands for

    def tensors(self, rank: int) -> dict[str, tuple[int, ...]]:
        if self.form == "lora":
            return {f"{self.key}.Xd": (self.shape[0], rank), f"{self.key}.Xu": (rank, self.shape[1])}
        if self.form == "none":
            return {f"{self.key}.zeros": self.shape}
        column = (self.shape[0], 1) if len(self.shape) > 1 else self.shape
        return {f"{self.key}.X": (1,) if self.form == "constant" else column}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT GLoRA. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "GloraConfig")
    if config.r < 1:
        raise wrong("r", config.r, "it must be at least 1")
    warnings: list[str] = []
    sites = choose_sites(config, base, checkpoint.header, ".glora_", warnings)
    paths = {site.name: _paths(config, site, base.bias(site.name) is not None) for site in sites}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in (path for at_site in paths.values() for path in at_site):
        shapes |= path.tensors(config.r)
    add_head_copy(shapes, checkpoint.header, sites, warnings)
    checkpoint.require(shapes, explain_for(".glora_", base))
    return Program(
        kind="glora",
        sites={site.name: _read(checkpoint, base, site, paths[site.name], max_rank) for site in sites},
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability="independent"
        if (config.config_A_B, config.config_C) == ("none", "none")
        else "proportional",
    )


def _paths(config: Honoured, site: Site, has_bias: bool) -> tuple[_Path, ...]:
    key = f"{PREFIX}{site.name}.glora_"
    weight, c, d = (site.out_features, site.in_features), (site.in_features, 1), (site.out_features,)
    return (
        _Path(f"{key}A", config.config_A_B, weight),
        _Path(f"{key}B", config.config_A_B, weight),
        _Path(f"{key}C", config.config_C if has_bias else "none", c),
        _Path(f"{key}D", config.config_D_E if has_bias else "none", d),
        _Path(f"{key}E", config.config_D_E if has_bias else "none", d),
    )


def _read(
    checkpoint: Checkpoint, base: Base, site: Site, paths: tuple[_Path, ...], max_rank: int
) -> SiteProgram:
    a, b, c, d, e = (_value(checkpoint, path) for path in paths)
    weight, bias = base.weight(site.name).double(), base.bias(site.name)
    found, scale, beta = SiteProgram(), None, None
    if paths[0].form == "lora":
        found = change(site, weight * a + b, max_rank, base)
    elif paths[0].form != "none":  # a and b [out, 1] or [1]
        scale = (1 + a).flatten().expand(site.out_features)
        found = low_rank(site, torch.ones(1, site.in_features), b.flatten().expand(1, site.out_features))
    if bias is not None:
        bias = bias.double()
        scaled = bias if scale is None else bias * scale  # what the scale makes of the base's bias
        beta = bias + bias * d + e + (weight @ c).flatten() - scaled
    return replace(
        found,
        bias=None if beta is None else _stored(beta, site),
        scale_out=None if scale is None else _stored(scale, site),
    )


def _value(checkpoint: Checkpoint, path: _Path) -> torch.Tensor:
    """What the path stands for, in float64: of `path.shape`, or of a shape that broadcasts to it."""
    if path.form == "lora":
        return checkpoint.read(f"{path.key}.Xd").double() @ checkpoint.read(f"{path.key}.Xu").double()
    if path.form != "none":
        return checkpoint.read(f"{path.key}.X").double()
    if checkpoint.read(key := f"{path.key}.zeros").any():
        raise AdapterRefused(
            f"{WEIGHTS_FILE}: tensor {shown(key)} stands for a path that is off and must hold zeros alone, as "
            "PEFT writes it."
        )
    return torch.zeros(path.shape[-2:] if path.key.endswith("C") else (1,), dtype=torch.double)


def _stored(tensor: torch.Tensor, site: Site) -> torch.Tensor:
    tensor = tensor.float().contiguous()
    if not tensor.isfinite().all():
        raise AdapterRefused(f"The change of {site.name} overflows; the adapter's values are too large.")
    return tensor
