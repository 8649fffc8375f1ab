"""PROGRAM, a type of our own: primitives as they are (adapters/program.py), as merges leave them that are no LoRA.

The config says what is no tensor:

    peft_type     "PROGRAM"
    portability   "independent" or "proportional", as of the adapters it was made of
    invocation    token ids from which on it acts; [] is everywhere
    span          null, or {"first": 3, "last": 2, "has_tail": true}
    activations   tensor's place -> {"kind", "group", "count", "top_k", "inner"}
    pairs         tensor's place -> features of a group of cross_out

A place is <module>, or tail.<module> for what acts on a prompt's last tokens. Keys are `base_model.model.<place>.`
and a name of `NAMES`, all of float numbers but sparse.starts, sparse.columns and tokens.ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint, shown
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import check_module
from veneer.adapters.methods.common import CAUSAL, PREFIX, Common, Refusal, check_need, read_fields, wrong
from veneer.adapters.methods.token_rows import check_added, check_ids
from veneer.adapters.packing import check_site
from veneer.adapters.program import (
    EMBEDDING,
    HEAD,
    Activation,
    Program,
    Site,
    SiteProgram,
    SparseMatrix,
    TokenRows,
)
from veneer.adapters.reach import Span
from veneer.errors import AdapterRefused

KIND = "PROGRAM"
TAIL = "tail."
A, B = "lora_A.weight", "lora_B.weight"  # B as PEFT stores it, [out, rank]
VECTORS = ("bias", "inner_bias", "scale_out", "cross_out")
_FLOATS = (A, B, *VECTORS, "rotate_in", "dense", "sparse.values", "tokens.rows")
_WHOLE = ("sparse.starts", "sparse.columns", "tokens.ids")
NAMES = (*_FLOATS, *_WHOLE)
_TokenId = Annotated[int, msgspec.Meta(ge=0)]


class SpanConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    first: _TokenId
    last: _TokenId
    has_tail: bool = False


class ActivationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: str
    group: _TokenId = 0
    count: _TokenId = 0
    top_k: _TokenId = 0
    inner: str = ""


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that count."""

    peft_type: Literal["PROGRAM"]
    base_model_name_or_path: str | None = None
    portability: Literal["independent", "proportional"] = "independent"
    invocation: Annotated[list[_TokenId], msgspec.Meta(max_length=64)] = []
    span: SpanConfig | None = None
    activations: dict[str, ActivationConfig] = {}
    pairs: dict[str, int] = {}


REFUSED: Mapping[str, Refusal] = {"task_type": CAUSAL}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Read the primitives. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, Common, REFUSED, "PROGRAM adapter")
    known = {**base.sites, **base.hidden_sites, EMBEDDING: base.embedding}
    names: dict[str, list[str]] = {}  # by place
    for key in checkpoint.header:
        place, name = _split(key)
        if place.removeprefix(TAIL) not in known:
            raise AdapterRefused(f"{shown(key)}: the base has no layer {shown(place.removeprefix(TAIL))}")
        names.setdefault(place, []).append(name)
    for field, of_config in (("activations", config.activations), ("pairs", config.pairs)):
        if idle := sorted(of_config.keys() - names.keys()):
            raise wrong(field, idle[0], "the file has no tensor at this place")
    span = None if config.span is None else Span(config.span.first, config.span.last, config.span.has_tail)
    if any(token >= base.embedding.in_features for token in config.invocation):
        raise wrong("invocation", config.invocation, "these must be tokens of the base")
    if any(place.startswith(TAIL) for place in names) != (span is not None and span.has_tail):
        raise wrong(
            "span", checkpoint.config.get("span"), "has_tail must be true if there are tensors of a tail"
        )
    if span is not None and not (
        span.first + span.last and (not span.has_tail or (span.first and span.last))
    ):
        raise wrong(
            "span", checkpoint.config.get("span"), "there must be first or last tokens; both for a tail"
        )
    main, tail = (
        {
            place.removeprefix(TAIL): _read(
                checkpoint, place, known[place.removeprefix(TAIL)], set(names[place]), config, base, max_rank
            )
            for place in names
            if place.startswith(TAIL) == in_tail
        }
        for in_tail in (False, True)
    )
    warnings: list[str] = []
    check_added(main, base, warnings)
    return Program(
        kind="program",
        sites=main,
        tail=tail,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
        portability=config.portability,
        invocation=tuple(config.invocation),
        span=span,
    )


def _split(key: str) -> tuple[str, str]:
    """The place and the name of a tensor."""
    for name in NAMES:
        if key.startswith(PREFIX) and key.endswith(f".{name}"):
            return key[len(PREFIX) : -len(name) - 1], name
    raise AdapterRefused(
        f"{shown(key)} is no tensor of a PROGRAM: keys are {PREFIX}<layer>. and one of {', '.join(NAMES)}"
    )


def _read(
    checkpoint: Checkpoint,
    place: str,
    site: Site,
    names: set[str],
    config: Honoured,
    base: Base,
    max_rank: int,
) -> SiteProgram:
    """What is at a place, with the shapes that packing demands."""
    for group in (
        (A, B),
        ("sparse.starts", "sparse.columns", "sparse.values"),
        ("tokens.ids", "tokens.rows"),
    ):
        if missing := [name for name in group if name not in names and names & set(group)]:
            raise AdapterRefused(f"{place} has no {missing[0]}; {', '.join(group)} belong together")
    keys = {name: f"{PREFIX}{place}.{name}" for name in names}
    _check_sizes({name: checkpoint.header[key].shape for name, key in keys.items()}, site, base, max_rank)

    def optional(name: str) -> torch.Tensor | None:
        return checkpoint.read(keys[name]) if name in keys else None

    own, b = config.activations.get(place), optional(B)
    part = SiteProgram(
        a=optional(A),
        b=None if b is None else b.T.contiguous(),
        activation=None if own is None else Activation(**msgspec.structs.asdict(own)),
        rotate_in=optional("rotate_in"),
        pair=config.pairs.get(place, 0),
        dense=optional("dense"),
        sparse=_sparse(checkpoint, keys, site) if "sparse.values" in keys else None,
        tokens=_tokens(checkpoint, keys, base) if "tokens.rows" in keys else None,
        bias=optional("bias"),
        inner_bias=optional("inner_bias"),
        scale_out=optional("scale_out"),
        cross_out=optional("cross_out"),
    )
    if part.tokens is not None and site.name not in (EMBEDDING, HEAD):
        raise AdapterRefused(f"{place}: rows of tokens are at {EMBEDDING} and {HEAD} alone")
    if site.name == EMBEDDING and names - {A, B, "tokens.ids", "tokens.rows"}:
        raise AdapterRefused(f"{place}: the embedding has products and rows of tokens alone")
    try:
        check_site(part, site)
    except (ValueError, KeyError) as error:
        raise AdapterRefused(f"{place}: {error}") from error
    return part


def _check_sizes(shapes: Mapping[str, tuple[int, ...]], site: Site, base: Base, max_rank: int) -> None:
    """Numbers of axes and what is large, before anything is read."""
    axes = dict.fromkeys(NAMES, 1) | {A: 2, B: 2, "dense": 2, "tokens.rows": 2, "rotate_in": 3}
    for name, shape in shapes.items():
        if len(shape) != axes[name] or not all(shape):
            raise AdapterRefused(
                f"{site.name}: {name} is {list(shape)}; it must have {axes[name]} axes, none of 0"
            )
    if A in shapes:
        check_need(site, shapes[A][0], max_rank, A, list(shapes[A]))
        if shapes[B][1] != shapes[A][0]:
            raise AdapterRefused(
                f"{site.name}: {A} is {list(shapes[A])} and {B} {list(shapes[B])}; ranks differ"
            )
    if "dense" in shapes:
        check_module(f"dense at {site.name}", shapes["dense"], base)


def _sparse(checkpoint: Checkpoint, keys: Mapping[str, str], site: Site) -> SparseMatrix:
    values = checkpoint.read(keys["sparse.values"])
    starts = checkpoint.read_indices(keys["sparse.starts"], len(values) + 1)
    columns = checkpoint.read_indices(keys["sparse.columns"], site.in_features)
    return SparseMatrix(starts.int(), columns.int(), values)


def _tokens(checkpoint: Checkpoint, keys: Mapping[str, str], base: Base) -> TokenRows:
    ids = checkpoint.read_indices(keys["tokens.ids"], 2**31 - 1)
    check_ids("tokens.ids", ids.tolist(), base)
    return TokenRows(ids.int(), checkpoint.read(keys["tokens.rows"]))


def tensors_of(part: SiteProgram) -> dict[str, torch.Tensor]:
    """What `_read` reads, by name."""
    found = {A: part.a, "rotate_in": part.rotate_in, "dense": part.dense}
    found |= {name: getattr(part, name) for name in VECTORS}
    if part.b is not None:
        found[B] = part.b.T.contiguous()
    if part.sparse is not None:
        found |= {f"sparse.{name}": getattr(part.sparse, name) for name in ("starts", "columns", "values")}
    if part.tokens is not None:
        found |= {"tokens.ids": part.tokens.ids, "tokens.rows": part.tokens.rows}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
