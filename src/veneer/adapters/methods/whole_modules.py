"""PEFT's `modules_to_save`, of any type of adapter: linear layers, norms, embedding and head replaced in full.

A linear layer gets the base's output scaled by 0 and its own weight as the change. A norm is read by linear layers
alone, so its new weight scales their inputs by new / old. Of the embedding and the head the rows that differ from
the base's are kept, in any number; so a vocabulary that was resized costs its new rows, and what training moved.
Which modules `modules_to_save` names follows peft's _set_trainable: those whose path ends like one of its names.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/utils/other.py

Keys are `base_model.model.<module>.weight` and `.bias`. PEFT adds the embedding and the head when the vocabulary
was resized, listed or not: `.weight`, or `.base_layer.weight` beside trainable tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from veneer.adapters.checkpoint import Checkpoint, TensorInfo, listed, shown
from veneer.adapters.methods.base import Base, Norm
from veneer.adapters.methods.changes import check_module
from veneer.adapters.methods.common import PREFIX, wrong
from veneer.adapters.methods.token_rows import check_added, check_ids, token_rows
from veneer.adapters.program import EMBEDDING, HEAD, Program, Site, SiteProgram, SparseMatrix, TokenRows
from veneer.errors import AdapterRefused

FIELD = "modules_to_save"
_NAMES_LIMIT = 4096
_COPIES = (".modules_to_save", ".original_module")  # what PEFT writes again of a listed embedding or head
_ROWS = 4096  # of an embedding that are compared at once


@dataclass(frozen=True)
class WholeModules:
    """What a file replaces, and the rest of it for the method.

    Attributes:
        checkpoint, base: without what is replaced: PEFT's tuners leave these modules alone.
        weights, biases: keys of the file, by module path.
    """

    checkpoint: Checkpoint
    base: Base
    weights: Mapping[str, str]
    biases: Mapping[str, str]
    warnings: tuple[str, ...]

    def apply(self, program: Program, checkpoint: Checkpoint, base: Base) -> Program:
        """The method's program with the modules in it; `checkpoint` and `base` are whole. Raises AdapterRefused."""
        if program.invocation:
            raise wrong(FIELD, sorted(self.weights), "with aLoRA it would act before the invocation, too")
        sites, warnings = dict(program.sites), [*program.warnings, *self.warnings]
        for path in self.weights:
            if path in (EMBEDDING, HEAD):
                sites[path] = self._rows(path, sites.get(path), checkpoint, base)
            elif path in base.sites:
                sites[path] = self._linear(path, checkpoint, base)
        scaled = self._scale_inputs(sites, checkpoint, base)
        check_added(sites, base, warnings)
        return replace(
            program,
            sites={path: site for path, site in sites.items() if site.tensors},
            warnings=tuple(warnings),
            portability="proportional" if scaled else program.portability,
        )

    def _linear(self, path: str, checkpoint: Checkpoint, base: Base) -> SiteProgram:
        weight = checkpoint.read(self.weights[path])
        bias = checkpoint.read(self.biases[path]) if path in self.biases else None
        return SiteProgram(dense=weight, scale_out=torch.zeros(len(weight)), bias=bias)

    def _rows(self, path: str, own: SiteProgram | None, checkpoint: Checkpoint, base: Base) -> SiteProgram:
        """The embedding or the head: the rows that differ, or a head in full where most do."""
        weight, vocabulary = checkpoint.read(self.weights[path]), base.embedding.in_features
        found = [
            token_rows(
                path, range(start, min(start + _ROWS, len(weight))), weight[start : start + _ROWS], base
            )
            for start in range(0, len(weight), _ROWS)
        ]
        rows = _joined([each for each in found if each is not None])
        if path == HEAD and rows is not None and int((rows.ids < vocabulary).sum()) > vocabulary // 2:
            added = _joined([TokenRows(rows.ids[keep], rows.rows[keep]) for keep in [rows.ids >= vocabulary]])
            program = SiteProgram(
                dense=weight[:vocabulary].contiguous(), scale_out=torch.zeros(vocabulary), tokens=added
            )
        else:
            program = SiteProgram(tokens=rows)
        if own is None:
            return program
        own = own.folded()
        return replace(program, tokens=_joined([own.tokens, program.tokens]), a=own.a, b=own.b)

    def _scale_inputs(self, sites: dict[str, SiteProgram], checkpoint: Checkpoint, base: Base) -> bool:
        """Scale the inputs of what reads a replaced norm; whether the base's own weights are among it."""
        found = False
        for path, norm in base.norms.items():
            if path in self.weights:
                old, new = norm.weight + norm.offset, checkpoint.read(self.weights[path]) + norm.offset
                _check_norm(path, norm, old)
                for site in norm.readers:
                    sites[site] = _with_input(sites.get(site, SiteProgram()), new / old)
                    found |= sites[site].rotate_in is not None
        return found


def take(checkpoint: Checkpoint, base: Base) -> WholeModules | None:
    """What `checkpoint` replaces in full, and the rest; None when that is nothing.

    Raises:
        AdapterRefused: the field is malformed, a tensor is missing or of a wrong shape, or a module is too large.
    """
    names = _names(checkpoint.config.get(FIELD))
    chosen = _chosen(names, checkpoint, base)
    resized = {path: key for path, key in _resized(checkpoint.header, base).items() if path not in chosen}
    if not chosen and not resized:
        return None
    weights = {path: f"{PREFIX}{path}.weight" for path in chosen} | resized
    biases = {
        path: f"{PREFIX}{path}.bias" for path in chosen if path in base.sites and base.bias(path) is not None
    }
    for path, key in weights.items():
        _check(path, key, biases.get(path), names, checkpoint.header, base)
    keys = {*weights.values(), *biases.values()}
    copies = {
        f"{PREFIX}{path}{part}.weight" for path in weights for part in _COPIES
    } & checkpoint.header.keys()
    rest = copy.copy(checkpoint)
    rest.config = {name: value for name, value in checkpoint.config.items() if name != FIELD}
    rest.header = {key: info for key, info in checkpoint.header.items() if key not in keys | copies}
    warnings = (f"{listed(sorted(copies))}: these copies are not used.",) if copies else ()
    return WholeModules(rest, cast("Base", _Rest(base, weights)), weights, biases, warnings)


def _names(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise wrong(FIELD, value, "it must be a list of names of modules")
    if len(value) > _NAMES_LIMIT:
        raise wrong(FIELD, f"{len(value)} entries", f"the limit is {_NAMES_LIMIT}")
    return value


def _chosen(names: list[str], checkpoint: Checkpoint, base: Base) -> list[str]:
    """The paths of the linear layers, norms, embedding and head that are named, or within a module that is."""
    if not names:
        return []
    known = [*base.sites, EMBEDDING, *base.norms]
    chosen: list[str] = []
    for name in names:
        found = [path for path in known if any(parent.endswith(name) for parent in _parents(path))]
        if not found:
            raise wrong(FIELD, name, f"no layer of the base has this name; it has {listed(known)}")
        chosen += found
    if EMBEDDING in chosen and base.tied and checkpoint.config.get("ensure_weight_tying") is True:
        chosen.append(HEAD)
    return list(dict.fromkeys(chosen))


def _parents(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:stop]) for stop in range(1, len(parts) + 1))


def _resized(header: Mapping[str, TensorInfo], base: Base) -> dict[str, str]:
    """Embedding and head of a larger vocabulary, as PEFT saves them without being told.

    Not those that LoRA targets: their A and B are of the larger vocabulary, too.
    """
    found = {}
    for path in (EMBEDDING, HEAD):
        trained = f"{PREFIX}{path}.trainable_tokens_delta" in header
        for part in ("", ".token_adapter.base_layer", *([".base_layer"] if trained else [])):
            info = header.get(key := f"{PREFIX}{path}{part}.weight")
            if info is not None and len(info.shape) == 2 and info.shape[0] > base.embedding.in_features:
                found[path] = key
    return found


def _check(
    path: str,
    key: str,
    bias: str | None,
    names: list[str],
    header: Mapping[str, TensorInfo],
    base: Base,
) -> None:
    shape = _shape(path, base)
    for tensor, wanted in ((key, shape), (bias, shape[:1])):
        if tensor is None:
            continue
        if tensor not in header:
            raise wrong(FIELD, names, f"the file has no {shown(tensor)}; save the adapter with PEFT")
        found = header[tensor].shape
        if path in (EMBEDDING, HEAD) and len(found) == 2 and found[0] > shape[0] and found[1] == shape[1]:
            check_ids(FIELD, range(shape[0], found[0]), base)
        elif found != wanted:
            raise AdapterRefused(
                f"{shown(tensor)} has {list(found)}, the base needs {list(wanted)}. Train on the base served here."
            )
    if len(shape) > 1:
        check_module(f"{path}, which the adapter replaces,", header[key].shape, base)


def _shape(path: str, base: Base) -> tuple[int, ...]:
    if path == EMBEDDING:
        return base.embedding.in_features, base.embedding.out_features
    if path in base.sites:
        return base.sites[path].out_features, base.sites[path].in_features
    return tuple(base.norms[path].weight.shape)


def _check_norm(path: str, norm: Norm, old: torch.Tensor) -> None:
    if not norm.readers:
        raise wrong(FIELD, path, "its output is not only read by linear layers; leave it out")
    if not old.all():
        raise AdapterRefused(f"The base's {path} has a weight of 0, which no scale turns into another.")


def _joined(parts: Iterable[TokenRows | None]) -> TokenRows | None:
    """Rows of several; where two have one for the same token, that of the first."""
    known = [part for part in parts if part is not None and len(part.ids)]
    if not known:
        return None
    ids, rows = torch.cat([part.ids for part in known]), torch.cat([part.rows for part in known])
    order = ids.argsort(stable=True)
    ids, rows = ids[order], rows[order]
    keep = torch.ones(len(ids), dtype=torch.bool)
    keep[1:] = ids[1:] != ids[:-1]
    return TokenRows(ids[keep].contiguous(), rows[keep].contiguous())


def _with_input(site: SiteProgram, scale: torch.Tensor) -> SiteProgram:
    """The same for an input that is `scale` [in] times as large."""
    site = site.folded()  # what was shared is its own from here on
    turn = torch.ones(len(scale), 1, 1) if site.rotate_in is None else site.rotate_in
    sparse = site.sparse
    if sparse is not None:
        sparse = SparseMatrix(sparse.starts, sparse.columns, sparse.values * scale[sparse.columns.long()])
    tokens = site.tokens
    if tokens is not None:  # at the head
        tokens = TokenRows(tokens.ids, tokens.rows * scale)
    replaced = site.dense is not None and site.scale_out is not None and not site.scale_out.any()
    return replace(
        site,
        a=None if site.a is None else site.a * scale,
        dense=None if site.dense is None else site.dense * scale,
        sparse=sparse,
        tokens=tokens,
        rotate_in=None if replaced else (turn * scale.view(turn.shape[0], turn.shape[1], 1)).contiguous(),
    )


class _Rest:
    """A base without some of its modules, for a method that leaves them alone."""

    def __init__(self, base: Base, without: Iterable[str]) -> None:
        self._base = base
        gone = set(without)
        self.sites: Mapping[str, Site] = {path: each for path, each in base.sites.items() if path not in gone}
        self.norms: Mapping[str, Norm] = {path: each for path, each in base.norms.items() if path not in gone}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)
