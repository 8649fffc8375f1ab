"""AdapterHub's AdapterFusion: h + x + Σ_k softmax_k(s) W_v up_k, s_k = (W_q z + b_q)·(W_k up_k).

up_k are bottlenecks of one input z (adapterhub_bottleneck.py). With up_k = U_k phi_k + u_k (scale folded in) every
score is linear in z for given phi_k = phi(D_k z + d_k),

    s_k = (M_k z + c_k)·phi_k + n_k·z + e_k        M_k = (W_k U_k)ᵀ W_q    c_k = (W_k U_k)ᵀ b_q
                                                   n_k = W_qᵀ (W_k u_k)    e_k = b_q·(W_k u_k)

so n_k, D_k and M_k are rows of one A, and W_v u_k and W_v U_k rows of one B. The bias of W_k adds the same to all
scores. https://arxiv.org/abs/2005.00247,
https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters/methods/modeling.py (BertFusion)

`veneer adapters convert PART… --fusion LAYER --output OUT` puts the library's folders into two files: the config is
{"peft_type": "ADAPTERHUB_FUSION", "adapters": [adapter_config.json…], "fusion": adapter_fusion_config.json}, the
tensors keep their keys; those of the layer are `model.layers.<n>.{attention,output}_adapters.adapter_fusion_layer.
<name>.{query,key,value}.{weight,bias}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods import adapterhub_bottleneck as bottleneck
from veneer.adapters.methods.adapterhub import LIBRARY, File, activation_kind, read
from veneer.adapters.methods.adapterhub_bottleneck import Located
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.bottleneck import Source
from veneer.adapters.methods.common import Refusal, read_fields, wrong
from veneer.adapters.program import Activation, Program, Site, SiteProgram
from veneer.errors import AdapterRefused
from veneer.kernels.tables import MAX_CHOICES

_PROJECTIONS = ("query", "key", "value")


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """The file's fields."""

    peft_type: Literal["ADAPTERHUB_FUSION"]
    adapters: list[dict[str, Any]]
    fusion: dict[str, Any]


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    """The fields around the layer's own config."""

    config: dict[str, Any]
    name: str
    adapter_names: list[str]


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the layer computes."""

    key: bool
    query: bool
    value: bool
    query_before_ln: bool


class NoFields(msgspec.Struct, frozen=True, kw_only=True):
    """Every field counts."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the layer comes from."""

    hidden_size: int | None = None
    model_class: str | None = None
    model_name: str | None = None
    model_type: str | None = None
    version: str | None = None


class TrainingOnly(msgspec.Struct, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    dropout_prob: float | None = None
    regularization: bool = False
    value_before_softmax: bool = True
    value_initialized: Any = None


REFUSED: Mapping[str, Refusal] = {
    "residual_before": Refusal((False,), "the value projection would act on the residual, too"),
    "temperature": Refusal((False,), "the library lowers it with every call, so no answer could be repeated"),
}


class _Part(NamedTuple):
    """One of the fused adapters."""

    file: File
    config: bottleneck.Honoured
    found: Mapping[tuple[int, str], Located]


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a fusion of bottlenecks. See `veneer.adapters.methods.base.Method`."""
    upload = read_fields(checkpoint.config, Upload, NoFields, {}, "ADAPTERHUB_FUSION", "Veneer")
    outer = read_fields(upload.fusion, Outer, Origin, {}, "adapter_fusion_config.json", LIBRARY)
    config = read_fields(outer.config, Honoured, TrainingOnly, REFUSED, "AdapterFusionConfig", LIBRARY)
    parts = _parts(checkpoint, base, upload, outer)
    last = parts[-1]
    reads = _source(last.config, config)
    kind = _activation(parts)
    places = [(layer, place) for layer in range(base.num_layers) for place in bottleneck.LOCATIONS]
    wanted: dict[str, tuple[int, ...]] = {}
    for part in parts:
        wanted |= bottleneck.shapes(part.file, part.config, list(part.found.values()))
    for layer, place in places:
        if _is_used(parts, place):
            wanted |= _shapes(_prefix(last.file, layer, place, outer.name), config, base.hidden_size)
    last.file.require(wanted)
    sites = {}
    for layer, place in places:
        here = [part for part in parts if (layer, place) in part.found]
        if not here:
            continue
        if last not in here:
            raise wrong(
                "leave_out", layer, "the last fused adapter must be in every layer that another one is in"
            )
        site = bottleneck.site_of(last.file, last.found[layer, place], reads)
        layer_tensors = _projections(checkpoint, _prefix(last.file, layer, place, outer.name), config, base)
        sites[site.name] = _fuse(site, here, (layer, place), layer_tensors, kind, max_rank)
    return Program(
        kind="adapterhub_fusion",
        sites=sites,
        base_model=last.file.base_model,
        warnings=tuple(last.file.warnings),
    )


def _parts(checkpoint: Checkpoint, base: Base, upload: Upload, outer: Outer) -> list[_Part]:
    """The fused adapters in their order."""
    if (count := len(upload.adapters)) > MAX_CHOICES:
        raise wrong("adapters", f"{count} of them", f"at most {MAX_CHOICES} adapters can be fused")
    files = [read(checkpoint, base, each) for each in upload.adapters]
    names = [file.name for file in files]
    if not names or names != outer.adapter_names or len(set(names)) < len(names):
        raise wrong(
            "adapter_names", outer.adapter_names, f"the adapters in the file are {names}, in this order"
        )
    parts = []
    for file in files:
        config = bottleneck.read_config(file)
        found = {(each.layer, each.location): each for each in bottleneck.locate(file, config)}
        parts.append(_Part(file, config, found))
    for field in ("mh_adapter", "output_adapter"):
        values = [getattr(part.config, field) for part in parts]
        if len(set(values)) > 1:
            raise wrong(field, values, "all fused adapters must have the same")
    return parts


def _source(last: bottleneck.Honoured, config: Honoured) -> Source:
    """What all of them read: the last adapter's config says it."""
    if last.is_parallel:
        raise wrong("is_parallel", True, "a fusion whose last adapter is parallel adds the residual twice")
    reads = bottleneck.source(last)
    if config.query_before_ln and reads == "sum":
        rule = "the query would read another state than the adapters, whose last has original_ln_before"
        raise wrong("query_before_ln", True, rule)
    return reads


def _activation(parts: Sequence[_Part]) -> str:
    kinds = [activation_kind(part.file, part.config.non_linearity) for part in parts]
    if len(set(kinds)) > 1:
        names = [part.config.non_linearity for part in parts]
        raise wrong("non_linearity", names, "the fused adapters must have one activation")
    return kinds[0]


def _is_used(parts: Sequence[_Part], place: str) -> bool:
    config = parts[0].config
    return config.mh_adapter if place == "attention_adapters" else config.output_adapter


def _prefix(file: File, layer: int, place: str, name: str) -> str:
    return f"{file.prefix}layers.{layer}.{place}.adapter_fusion_layer.{name}"


def _shapes(prefix: str, config: Honoured, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _PROJECTIONS:
        if getattr(config, name):
            shapes[f"{prefix}.{name}.weight"] = (hidden, hidden)
            if name != "value":
                shapes[f"{prefix}.{name}.bias"] = (hidden,)
    if not (config.query or config.key or config.value):  # the library makes this one and does not use it
        shapes |= {f"{prefix}.dense.weight": (1, hidden), f"{prefix}.dense.bias": (1,)}
    return shapes


class _Layer(NamedTuple):
    """One fusion layer, float64; the identity where it has no such projection."""

    query: torch.Tensor  # [hidden, hidden]
    query_bias: torch.Tensor  # [hidden]
    key: torch.Tensor
    value: torch.Tensor


def _projections(checkpoint: Checkpoint, prefix: str, config: Honoured, base: Base) -> _Layer:
    found = {}
    for name in _PROJECTIONS:
        given = getattr(config, name)
        found[name] = checkpoint.read(f"{prefix}.{name}.weight") if given else torch.eye(base.hidden_size)
    bias = checkpoint.read(f"{prefix}.query.bias") if config.query else torch.zeros(base.hidden_size)
    return _Layer(found["query"].double(), bias.double(), found["key"].double(), found["value"].double())


def _fuse(
    site: Site, here: Sequence[_Part], place: tuple[int, str], layer: _Layer, kind: str, max_rank: int
) -> SiteProgram:
    """One A, B and d in the order that `program.Activation` gives for "fusion"."""
    count, group = len(here), max(part.found[place].inner for part in here)
    rank = count * (1 + 2 * group)
    if rank > max_rank:
        rule = f"{count} fused bottlenecks of {group} need rank {rank}, the limit is {max_rank} (--max-lora-rank)"
        raise wrong("reduction_factor", group, rule)
    hidden = site.in_features
    a, b, d = (torch.zeros(rank, *width, dtype=torch.float64) for width in ((hidden,), (hidden,), ()))
    for index, part in enumerate(here):
        each = part.found[place]
        down, down_bias, up, up_bias = bottleneck.tensors(part.file, part.config, each)
        scale = bottleneck.scale(part.file, part.config, each)
        outer = (up.T * scale).double()  # [inner, hidden]
        constant = torch.zeros(hidden).double() if up_bias is None else (up_bias * scale).double()
        keys = torch.cat([constant[None], outer]) @ layer.key.T  # W_k u, then W_k U, [1 + inner, hidden]
        rows = slice(count + index * group, count + index * group + each.inner)
        scores = slice(rows.start + count * group, rows.stop + count * group)
        a[index], d[index] = keys[0] @ layer.query, keys[0] @ layer.query_bias
        a[scores], d[scores] = keys[1:] @ layer.query, keys[1:] @ layer.query_bias
        a[rows] = down.double()
        if down_bias is not None:
            d[rows] = down_bias.double()
        b[index], b[rows] = constant @ layer.value.T, outer @ layer.value.T
    found = [each.float() for each in (a, b, d)]
    if not all(each.isfinite().all() for each in found):
        raise AdapterRefused(f"The numbers of the fusion at {site.name} overflow.")
    activation = Activation("fusion", group=group, count=count, inner=kind)
    return SiteProgram(a=found[0], b=found[1], inner_bias=found[2], activation=activation)
