"""What tests of blends and merges share: adapters of every kind on a tiny base, and sites computed in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from veneer.adapters.program import EMBEDDING, HEAD, Program, Site, SiteProgram
from veneer.adapters.registry import lower
from veneer.training.conformance.cases import Case, collect

MAX_RANK = 512


def cases() -> dict[str, Case]:
    """Every case of conformance that is served, by its name."""
    return {case.method: case for case in collect() if not case.refused}


class Kinds:
    """Adapters of every kind, each made and lowered once."""

    def __init__(self, base: Any, model: Path, root: Path) -> None:
        self.base, self._root = base, root
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._cases, self._programs = cases(), dict[str, Program]()

    def folder(self, name: str) -> Path:
        folder = self._root / f"{list(self._cases).index(name)}"
        if not folder.exists():
            self._cases[name].write(self._model, folder)
        return folder

    def program(self, name: str) -> Program:
        if name not in self._programs:
            self._programs[name] = lower(self.folder(name), self.base, MAX_RANK, self._cases[name].task)
        return self._programs[name]


def inputs(site: Site, seed: int = 0) -> torch.Tensor:
    """Rows that a site reads; at the embedding every token."""
    if site.name == EMBEDDING:
        return torch.eye(site.in_features, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, site.in_features, generator=generator, dtype=torch.float64)


def outputs(part: SiteProgram | None, site: Site, base: Any, x: torch.Tensor) -> torch.Tensor:
    """What a site gives for rows x, as program.py says it, in float64; at hidden states what is added."""
    part = (part or SiteProgram()).folded()
    y = torch.zeros(len(x), site.out_features, dtype=torch.float64)
    if site.name == EMBEDDING:
        ids = torch.arange(site.in_features)
        y = base.token_rows(EMBEDDING, ids).double() * base.embedding_scale
    elif not site.is_hidden:
        weight, bias = base.weight(site.name).double(), base.bias(site.name)
        turned = x
        if part.rotate_in is not None:
            blocks = x.view(len(x), part.rotate_in.shape[0], -1)
            turned = torch.einsum("rni,nij->rnj", blocks, part.rotate_in.double()).reshape(x.shape)
        y = turned @ weight.T + (0 if bias is None else bias.double())
    if part.scale_out is not None:
        partner = torch.arange(site.out_features)
        if part.pair:
            within = partner % part.pair
            partner = partner - within + (within + part.pair // 2) % part.pair
        cross = torch.zeros(site.out_features) if part.cross_out is None else part.cross_out
        y = y * part.scale_out.double() + y[:, partner] * cross.double()
    if part.tokens is not None and site.name == EMBEDDING:
        y[part.tokens.ids.long()] = part.tokens.rows.double()
    if part.a is not None and part.b is not None:
        inner = x @ part.a.double().T
        if part.inner_bias is not None:
            inner = inner + part.inner_bias.double()
        y = y + activated(part, inner) @ part.b.double()
    if part.bias is not None:
        y = y + part.bias.double()
    if part.dense is not None:
        y = y + x @ part.dense.double().T
    if part.sparse is not None:
        starts, columns = part.sparse.starts.long(), part.sparse.columns.long()
        full = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
        for row in range(site.out_features):
            for place in range(int(starts[row]), int(starts[row + 1])):
                full[row, columns[place]] += part.sparse.values[place].double()
        y = y + x @ full.T
    if part.tokens is not None and site.name == HEAD:
        y[:, part.tokens.ids.long()] = x @ part.tokens.rows.double().T
    return y


def activated(part: SiteProgram, inner: torch.Tensor) -> torch.Tensor:
    """phi. Those that choose among experts go into no sum, so that any function of all ranks stands for them."""
    if part.activation is None:
        return inner
    match part.activation.kind:
        case "relu":
            return inner.relu()
        case "silu":
            return torch.nn.functional.silu(inner)
        case "gelu":
            return torch.nn.functional.gelu(inner)
        case "gelu_tanh":
            return torch.nn.functional.gelu(inner, approximate="tanh")
        case "tanh":
            return inner.tanh()
        case "sigmoid":
            return inner.sigmoid()
        case "leaky_relu":
            return torch.nn.functional.leaky_relu(inner)
        case "softmax":
            return inner.view(len(inner), -1, part.activation.group).softmax(-1).flatten(1)
    return inner * torch.tanh(inner.sum(1, keepdim=True))
