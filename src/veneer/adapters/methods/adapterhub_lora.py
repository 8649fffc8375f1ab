"""AdapterHub's LoRA, DoRA, VeRA and IA3, which are one config there.

    LoRA    y = W0 x + b + s·B(A x), s = alpha / r
    VeRA    the same with B = vera_B·lora_B·vera_D; lora_A and lora_B are shared by all layers
    DoRA    y = m / |W0 + BA| ⊙ (W0 x + b + s·B(A x)): the norm of each row is without s, and b is scaled, too
    IA3     y = alpha·l ⊙ (W0 x + b): the outputs of all its layers, also of down_proj

https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters/methods/lora.py

Keys are `model.<module>.loras.<name>.{lora_A,lora_B}`, of DoRA `m.weight` [out, 1], of VeRA `vera_D` [r, r],
`vera_B` [out, out] and `model.shared_parameters.<name>.{lora_A,lora_B}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.adapterhub import GATED, LIBRARY, File, no_site, read
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Refusal, check_rank, low_rank, read_fields, wrong
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused

_PART = "loras"
_FIXED_SCALING = (1, 1)  # versions before scaled wrongly; the library loads their files with alpha = r


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with the library's defaults."""

    architecture: Literal["lora"]
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: list[int] = []
    r: int = 8
    alpha: float = 8
    attn_matrices: tuple[Literal["q", "k", "v"], ...] = ("q", "v")
    composition_mode: Literal["add", "scale"] = "add"
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None


class TrainingOnly(msgspec.Struct, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    dropout: float = 0.0
    dtype: str | None = None
    init_weights: str | None = None
    init_weights_seed: int | None = None


REFUSED: Mapping[str, Refusal] = {"use_gating": GATED}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower AdapterHub's LoRA, DoRA, VeRA or IA3. See `veneer.adapters.methods.base.Method`."""
    file = read(checkpoint, base)
    config = read_fields(file.fields, Honoured, TrainingOnly, REFUSED, "LoRAConfig", LIBRARY)
    check_rank(config.r, max_rank)
    scales, is_vera = config.composition_mode == "scale", (config.vera_d, config.vera_b) != (None, None)
    if scales and (config.r != 1 or config.use_dora or is_vera):
        raise wrong(
            "composition_mode", "scale", "the library takes it only with r = 1, without DoRA and VeRA"
        )
    sites = _sites(file, config)
    file.require(_shapes(file, config, sites, is_vera))
    programs = {}
    for site in sites:
        if scales:
            scale = checkpoint.read(file.key(site.name, _PART, "lora_B")).flatten() * config.alpha
            programs[site.name] = SiteProgram(scale_out=scale)
        else:
            programs[site.name] = _low_rank(file, config, site, is_vera)
    kind = "ia3" if scales else "dora" if config.use_dora else "vera" if is_vera else "lora"
    return Program(
        kind=f"adapterhub_{kind}",
        sites=programs,
        base_model=file.base_model,
        warnings=tuple(file.warnings),
        portability="proportional" if scales or config.use_dora else "independent",
    )


def _sites(file: File, config: Honoured) -> list[Site]:
    """The config's layers. Which MLP layer is the "intermediate" one differs by architecture: the file tells."""
    matrices = dict.fromkeys(config.attn_matrices if config.selfattn_lora else ())
    modules = [f"self_attn.{name}_proj" for name in matrices]
    mlp = ["mlp.down_proj", "mlp.up_proj"]
    if config.intermediate_lora != config.output_lora:
        here = [name for name in mlp if any(f".{name}.{_PART}." in key for key in file.checkpoint.header)]
        mlp = here[:1] or mlp[:1]
    if config.intermediate_lora or config.output_lora:
        modules += mlp
    names = [f"model.layers.{layer}.{name}" for layer in file.layers(config.leave_out) for name in modules]
    if not names:
        raise wrong("attn_matrices", list(config.attn_matrices), "with these fields no layer is adapted")
    if missing := [name for name in names if name not in file.base.sites]:
        raise no_site(missing)
    return [file.base.sites[name] for name in names]


def _shapes(file: File, config: Honoured, sites: list[Site], is_vera: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    rank, scales = config.r, config.composition_mode == "scale"
    for site in sites:
        parts: dict[str, tuple[int, ...]] = {"lora_B": (site.out_features, rank)}
        if is_vera:
            parts = {"vera_D": (rank, rank), "vera_B": (site.out_features, site.out_features)}
        elif not scales:
            parts["lora_A"] = (rank, site.in_features)
        if config.use_dora:
            parts["m.weight"] = (site.out_features, 1)
        shapes |= {file.key(site.name, _PART, part): shape for part, shape in parts.items()}
    if is_vera:
        first = sites[0]
        if other := [site.name for site in sites if site[1:] != first[1:]]:
            rule = f"its projections are shared, and {other[0]} has another shape than {first.name}"
            raise wrong("attn_matrices", list(config.attn_matrices), rule)
        shapes[_shared(file, "lora_A")] = (rank, first.in_features)
        shapes[_shared(file, "lora_B")] = (first.out_features, rank)
    return shapes


def _shared(file: File, part: str) -> str:
    return file.key("", "shared_parameters", part)


def _low_rank(file: File, config: Honoured, site: Site, is_vera: bool) -> SiteProgram:
    """LoRA or VeRA, with DoRA's scale if it has one."""

    def get(part: str) -> torch.Tensor:
        return file.checkpoint.read(file.key(site.name, _PART, part))

    if is_vera:
        a = file.checkpoint.read(_shared(file, "lora_A"))
        b = get("vera_B") @ file.checkpoint.read(_shared(file, "lora_B")) @ get("vera_D")
    else:
        a, b = get("lora_A"), get("lora_B")
    scaling = _alpha(file, config) / config.r
    if not config.use_dora:
        return low_rank(site, a, b.T * scaling)
    norm = torch.linalg.vector_norm(file.base.weight(site.name).addmm_(b, a), dim=1)
    scale = get("m.weight").flatten() / norm
    if not scale.isfinite().all():
        raise AdapterRefused(f"At {site.name} a row of the weight that DoRA normalizes is zero or overflows.")
    return replace(low_rank(site, a, b.T * scaling * scale), scale_out=scale)


def _alpha(file: File, config: Honoured) -> float:
    if file.version is not None and file.version < _FIXED_SCALING and config.r != config.alpha:
        note = (
            f"alpha = {config.alpha}: r is used instead, as the library does for files of before version 1.1."
        )
        if note not in file.warnings:
            file.warnings.append(note)
        return config.r
    return config.alpha
