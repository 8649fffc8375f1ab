"""Bottlenecks at the hidden states of decoder layers, in a format of our own: y += s·(U phi(D z + d) + u).

`adapter_config.json` says where they are and what they read, with "peft_type": "BOTTLENECK". It covers bottleneck
adapters (https://arxiv.org/abs/1902.00751), sequential and parallel, and interventions at the ends of a prompt
(ReFT, https://arxiv.org/abs/2404.03592); `veneer adapters convert` writes it from pyreft's files.

Keys are `layers.<n>.<place>.{down.weight,up.weight}` [rank, hidden] and [hidden, rank], with `bias` also
`{down.bias,up.bias}` [rank] and [hidden]; what the last tokens of a prompt have instead is at `….<place>.tail.…`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import Refusal, check_rank, read_fields, wrong
from veneer.adapters.names import CONFIG_FILE
from veneer.adapters.program import Activation, Program, Site, SiteProgram
from veneer.adapters.reach import Span
from veneer.errors import AdapterRefused

Kind = Literal["relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu"]
Place = Literal["attention", "mlp", "block"]
Source = Literal["output", "sum", "residual"]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
_MODULES: Mapping[Place, str] = {"attention": "self_attn.", "mlp": "mlp.", "block": ""}


class Positions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tokens of a prompt on which it acts; it then acts on nothing that is generated."""

    first: Count = 0
    last: Count = 0
    tail: bool = False  # the last ones have tensors of their own


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    peft_type: Literal["BOTTLENECK"]
    rank: int
    places: list[Place]
    layers: list[int] | None = None  # None: all
    source: Source = "output"  # what D reads: the place's output, with its residual added, or the residual
    activation: Kind | None = None
    scale: float = 1.0
    bias: bool = True
    positions: Positions | None = None  # None: every token
    base_model_name_or_path: str | None = None


class TrainingOnly(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing yet."""


REFUSED: Mapping[str, Refusal] = {}


def hidden_site(base: Base, layer: int, place: Place, source: Source) -> Site:
    """The site of a place, or `AdapterRefused` when the base's layers have another form than Llama's."""
    name = f"model.layers.{layer}.{_MODULES[place]}{source}"
    if name not in base.hidden_sites:
        raise AdapterRefused(
            f"{CONFIG_FILE}: the base ({base.model_type}) has no hidden state {name}. Adapters behind attention, "
            "the MLP or a whole layer are served on bases with Llama's layers: llama, mistral, qwen2, qwen3, phi3."
        )
    return base.hidden_sites[name]


class Bottleneck(NamedTuple):
    """Tensors of one bottleneck."""

    down: torch.Tensor  # [rank, in]
    down_bias: torch.Tensor | None  # [rank]
    up: torch.Tensor  # [out, rank]
    up_bias: torch.Tensor | None  # [out]


def lower_bottleneck(
    site: Site, tensors: Bottleneck, activation: str, scale: float | torch.Tensor = 1.0
) -> SiteProgram:
    """One bottleneck at a site. `activation` "" is none; `scale` is a number, or one for each feature [out].

    Raises:
        AdapterRefused: a value overflows.
    """
    down, inner, up, outer = tensors
    b = (up.T * scale).contiguous()
    bias = None if outer is None else outer * scale
    if not activation and inner is not None:
        folded = inner @ b
        bias, inner = folded if bias is None else bias + folded, None
    if not all(each.isfinite().all() for each in (b, bias) if each is not None):
        raise AdapterRefused(f"The numbers at {site.name} overflow with the adapter's scale.")
    kind = Activation(activation) if activation else None
    return SiteProgram(a=down.contiguous(), b=b, bias=bias, inner_bias=inner, activation=kind)


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower bottlenecks in our own format. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "BOTTLENECK", "Veneer")
    check_rank(config.rank, max_rank, "rank")
    span = _span(config)
    places = [(layer, place) for layer in _layers(config, base) for place in dict.fromkeys(config.places)]
    if not places or len(set(config.places)) < len(config.places):
        raise wrong("places", config.places, "it must name each of its places once, and at least one")
    sites = {key: hidden_site(base, *key, config.source) for key in places}
    parts = ("", "tail.") if span is not None and span.has_tail else ("",)
    checkpoint.require(
        {
            f"layers.{layer}.{place}.{part}{name}": shape
            for layer, place in places
            for part in parts
            for name, shape in _shapes(config, base.hidden_size).items()
        }
    )

    def read(part: str) -> dict[str, SiteProgram]:
        found = {}
        for (layer, place), site in sites.items():
            names = (f"layers.{layer}.{place}.{part}{name}" for name in _shapes(config, base.hidden_size))
            down, up, *biases = map(checkpoint.read, names)
            tensors = (
                Bottleneck(down, biases[0], up, biases[1]) if biases else Bottleneck(down, None, up, None)
            )
            found[site.name] = lower_bottleneck(site, tensors, config.activation or "", config.scale)
        return found

    return Program(
        kind="bottleneck",
        sites=read(""),
        tail=read("tail.") if len(parts) > 1 else {},
        span=span,
        base_model=config.base_model_name_or_path or "",
    )


def _layers(config: Honoured, base: Base) -> Iterable[int]:
    if config.layers is None:
        return range(base.num_layers)
    for layer in config.layers:
        if not 0 <= layer < base.num_layers or config.layers.count(layer) > 1:
            raise wrong(
                "layers", config.layers, f"each must be there once and from 0 to {base.num_layers - 1}"
            )
    return config.layers


def _span(config: Honoured) -> Span | None:
    if "block" in config.places and config.source != "output":
        raise wrong(
            "source", config.source, 'a whole layer has no residual; with the place "block" it is "output"'
        )
    if config.positions is None:
        return None
    first, last, tail = config.positions.first, config.positions.last, config.positions.tail
    if not first + last or (tail and not (first and last)):
        rule = "there must be first or last tokens, and both for a tail"
        raise wrong("positions", msgspec.to_builtins(config.positions), rule)
    return Span(first, last, tail)


def _shapes(config: Honoured, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "down.weight": (config.rank, hidden),
        "up.weight": (hidden, config.rank),
    }
    if config.bias:
        shapes |= {"down.bias": (config.rank,), "up.bias": (hidden,)}
    return shapes
