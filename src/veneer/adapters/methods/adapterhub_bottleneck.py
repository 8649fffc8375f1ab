"""AdapterHub's bottleneck adapters: Houlsby, Pfeiffer, AdapterPlus, parallel and Compacter are one config there.

With h the output of attention or the MLP, x its residual and up(z) = s ⊙ (U phi(D z + d) + u), a layer gives

    sequential   r + up(z) + x·[original_ln_after]    z = h + x if original_ln_before else h
                                                      r = h if residual_before_ln else z
    parallel     up(x) + h + x·[original_ln_after]

which is served where it is h + x + up(z). In Compacter D and U are Σ_i rule_i ⊗ W_i (https://arxiv.org/abs/2106.04647).
https://github.com/adapter-hub/adapters/blob/v1.3.0/src/adapters/methods/modeling.py

Keys are `model.layers.<n>.{attention,output}_adapters.adapters.<name>.` and `adapter_down.0.{weight,bias}`,
`adapter_up.{weight,bias}`, `scaling`; of Compacter `W_left`, `W_right` or `W`, `b`, `phm_rule…` instead, those that
its layers share at `model.shared_parameters.<name>.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.adapterhub import GATED, LIBRARY, File, activation_kind, read
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.bottleneck import Bottleneck, Source, hidden_site, lower_bottleneck
from veneer.adapters.methods.common import Refusal, read_fields, wrong
from veneer.adapters.program import Program, Site, SiteProgram

_NORM = "a layer norm inside the adapter is not served"
LOCATIONS: Mapping[str, Literal["attention", "mlp"]] = {
    "attention_adapters": "attention",
    "output_adapters": "mlp",
}
_PHM_LIMIT = 64
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with the library's defaults."""

    architecture: None = None
    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | dict[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    is_parallel: bool = False
    scaling: Any = 1.0
    leave_out: list[int] = msgspec.field(default_factory=list)
    phm_layer: bool = False
    phm_dim: Positive = 4
    phm_rank: Positive = 1
    phm_bias: bool = True
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False


class TrainingOnly(msgspec.Struct, frozen=True, kw_only=True):
    """Fields without effect on a decoder's inference, given those that are refused."""

    adapter_residual_before_ln: bool = False
    cross_adapter: bool = False
    dropout: float = 0.0
    hypercomplex_nonlinearity: str | None = None
    init_weights: str | None = None
    init_weights_seed: int | None = None
    inv_adapter_reduction_factor: float | None = None
    learn_phm: bool = True
    phm_c_init: str | None = None
    phm_init_range: float | None = None
    stochastic_depth: float = 0.0


REFUSED: Mapping[str, Refusal] = {
    "inv_adapter": Refusal((None,), "invertible adapters change the embeddings of all tokens"),
    "ln_after": Refusal((False,), _NORM),
    "ln_before": Refusal((False,), _NORM),
    "use_gating": GATED,
}


class Located(NamedTuple):
    """A bottleneck of the file and where it acts."""

    layer: int
    location: str  # of LOCATIONS
    inner: int  # size of the bottleneck


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower AdapterHub's bottlenecks. See `veneer.adapters.methods.base.Method`."""
    file = read(checkpoint, base)
    config = read_config(file)
    found = locate(file, config)
    check_ranks(found, max_rank)
    file.require(shapes(file, config, found))
    sites: dict[str, SiteProgram] = {}
    for each in found:
        site = site_of(file, each, source(config))
        activation = activation_kind(file, config.non_linearity)
        sites[site.name] = lower_bottleneck(
            site, tensors(file, config, each), activation, scale(file, config, each)
        )
    return Program(
        kind="adapterhub_bottleneck",
        sites=sites,
        base_model=file.base_model,
        warnings=tuple(file.warnings),
    )


def read_config(file: File) -> Honoured:
    """The method's config, when a layer's output with it is h + x + up(z)."""
    config = read_fields(file.fields, Honoured, TrainingOnly, REFUSED, "BnConfig", LIBRARY)
    activation_kind(file, config.non_linearity)
    if type(config.scaling) is not float and config.scaling not in ("learned", "channel"):
        raise wrong(
            "scaling", config.scaling, 'the library takes a number with a point, "learned" or "channel"'
        )
    if config.residual_before_ln == "post_add" and not config.is_parallel:
        raise wrong(
            "residual_before_ln", "post_add", "the library fails with it on layers without a norm behind"
        )
    before, after, residual = config.original_ln_before, config.original_ln_after, config.residual_before_ln
    both_residuals = before and not residual and not config.is_parallel  # r is h + x
    if after == both_residuals:
        times = "twice" if after else "not"
        rule = (
            f"with original_ln_before = {before}, residual_before_ln = {residual} and is_parallel = "
            f"{config.is_parallel} the layer's residual is added {times}, which is not served"
        )
        raise wrong("original_ln_after", after, rule)
    return config


def source(config: Honoured) -> Source:
    """What the bottleneck reads."""
    if config.is_parallel:
        return "residual"
    return "sum" if config.original_ln_before else "output"


def locate(file: File, config: Honoured) -> list[Located]:
    """The bottlenecks that the config asks for, in the order of the layers."""
    has = {"attention_adapters": config.mh_adapter, "output_adapters": config.output_adapter}
    found = [
        Located(layer, location, _inner(file, config, layer))
        for layer in file.layers(config.leave_out)
        for location in LOCATIONS
        if has[location]
    ]
    if not found:
        raise wrong(
            "leave_out", config.leave_out, "no layer is left; mh_adapter or output_adapter must be true"
        )
    return found


def check_ranks(found: list[Located], max_rank: int) -> None:
    if (largest := max(each.inner for each in found)) > max_rank:
        rule = f"it makes a bottleneck of {largest}, the limit is {max_rank} (--max-lora-rank)"
        raise wrong("reduction_factor", largest, rule)


def site_of(file: File, each: Located, reads: Source) -> Site:
    return hidden_site(file.base, each.layer, LOCATIONS[each.location], reads)


def _inner(file: File, config: Honoured, layer: int) -> int:
    factor = config.reduction_factor
    if isinstance(factor, Mapping):
        chosen = factor.get(str(layer), factor.get("default"))
        if chosen is None:
            raise wrong("reduction_factor", dict(factor), f'it has neither layer {layer} nor "default"')
        factor = chosen
    hidden = file.base.hidden_size
    if not 0 < factor < float("inf") or hidden / factor > 1 << 20:
        raise wrong(
            "reduction_factor", factor, "it must be above 0 and leave a bottleneck of a sensible size"
        )
    inner = max(int(hidden // factor), 1)
    if config.phm_layer and config.phm_dim > _PHM_LIMIT:  # its rule has phm_dim cubed numbers
        raise wrong("phm_dim", config.phm_dim, f"the limit is {_PHM_LIMIT}")
    if config.phm_layer and (inner % config.phm_dim or hidden % config.phm_dim):
        raise wrong("phm_dim", config.phm_dim, f"it must divide the sizes {hidden} and {inner}")
    return inner


# ---- tensors ---------------------------------------------------------------------------------------


def _key(file: File, each: Located, rest: str) -> str:
    return file.key(f"model.layers.{each.layer}.{each.location}", "adapters", rest)


def _shared(file: File, rest: str) -> str:
    return file.key("", "shared_parameters", rest)


def shapes(file: File, config: Honoured, found: list[Located]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file with its shape."""
    hidden = file.base.hidden_size
    wanted: dict[str, tuple[int, ...]] = {}
    for each in found:
        if config.scaling in ("learned", "channel"):
            wanted[_key(file, each, "scaling")] = (1,) if config.scaling == "learned" else (hidden,)
        for part, (size, out) in _projections(hidden, each).items():
            if not config.phm_layer:
                wanted[_key(file, each, f"{part}.weight")] = (out, size)
                wanted[_key(file, each, f"{part}.bias")] = (out,)
                continue
            if config.phm_bias:
                wanted[_key(file, each, f"{part}.b")] = (out,)
            for key, shape in _phm(file, config, each, part, size, out).values():
                if wanted.setdefault(key, shape) != shape:
                    raise wrong(
                        "shared_W_phm", True, "the layers that share it have bottlenecks of several sizes"
                    )
    return wanted


def _projections(hidden: int, each: Located) -> dict[str, tuple[int, int]]:
    return {"adapter_down.0": (hidden, each.inner), "adapter_up": (each.inner, hidden)}


def _phm(
    file: File, config: Honoured, each: Located, part: str, size: int, out: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that W and the rule of one Compacter projection are made of: name -> (key, shape)."""
    axes, rank = config.phm_dim, config.phm_rank
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    weights: dict[str, tuple[int, ...]] = {"W": (axes, size // axes, out // axes)}
    if config.factorized_phm_W:
        weights = {"W_left": (axes, size // axes, rank), "W_right": (axes, rank, out // axes)}
    rules: dict[str, tuple[int, ...]] = {"phm_rule": (axes, axes, axes)}
    if config.factorized_phm_rule:
        rules = {"phm_rule_left": (axes, axes, 1), "phm_rule_right": (axes, 1, axes)}
    for name, shape in weights.items():
        shared = name.replace("W", f"W_{'down' if 'down' in part else 'up'}")
        key = _shared(file, shared) if config.shared_W_phm else _key(file, each, f"{part}.{name}")
        found[name] = (key, shape)
    for name, shape in rules.items():
        key = _shared(file, name) if config.shared_phm_rule else _key(file, each, f"{part}.{name}")
        found[name] = (key, shape)
    return found


def tensors(file: File, config: Honoured, each: Located) -> Bottleneck:
    """D [inner, hidden], d, U [hidden, inner] and u."""
    found: list[torch.Tensor | None] = []
    bias = "b" if config.phm_layer else "bias"
    for part, (size, out) in _projections(file.base.hidden_size, each).items():
        if config.phm_layer:
            made = _phm(file, config, each, part, size, out)
            found.append(_kron({name: file.checkpoint.read(key) for name, (key, _) in made.items()}))
        else:
            found.append(file.checkpoint.read(_key(file, each, f"{part}.weight")))
        has_bias = config.phm_bias or not config.phm_layer
        found.append(file.checkpoint.read(_key(file, each, f"{part}.{bias}")) if has_bias else None)
    down, down_bias, up, up_bias = found
    assert down is not None
    assert up is not None
    return Bottleneck(down, down_bias, up, up_bias)


def _kron(made: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight [out, in] of a Compacter projection: the sum of Kronecker products, of which none is made."""
    weights = made["W"] if "W" in made else made["W_left"] @ made["W_right"]
    rules = made["phm_rule"] if "phm_rule" in made else made["phm_rule_left"] @ made["phm_rule_right"]
    axes, rows, columns = weights.shape
    whole = torch.einsum("irs,iab->rasb", rules, weights)
    return whole.reshape(axes * rows, axes * columns).T


def scale(file: File, config: Honoured, each: Located) -> float | torch.Tensor:
    if type(config.scaling) is float:
        return config.scaling
    return file.checkpoint.read(_key(file, each, "scaling"))
