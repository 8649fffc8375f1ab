"""Blends: the exact sum of weighted changes of several adapters, as one program.

    y = f_0(x) + Σ w_i (f_i(x) - f_0(x))        f_0: the site in the base, f_i: with adapter i alone

Most primitives add up in place, times their weights: factors by concatenation, biases, dense and sparse changes,
and transforms by their differences from the identity, as long as all at a site are on the same side of the base's
weight. Where one turns the input and one the output, their changes of the weight are added in full. What has no
weight or no sum is refused by name: virtual tokens, added tokens, other tokens to act on, and activations that
differ at a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from veneer.adapters.deltas import base_rows, output_change, transform_change, weight_change
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import change, sparse_change
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
from veneer.errors import AdapterRefused
from veneer.kernels.tables import ELEMENTWISE


class Weighted(NamedTuple):
    """What an adapter of a blend has at a site."""

    part: SiteProgram
    weight: float


def sites_of(base: Base) -> dict[str, Site]:
    """Every place of a base that programs can change, by name."""
    return {**base.sites, **base.hidden_sites, EMBEDDING: base.embedding}


def check_parts(programs: Sequence[Program], base: Base) -> None:
    """Refuse what has no weighted sum wherever it acts."""
    for program in programs:
        if program.prompt is not None:
            raise AdapterRefused(
                f"an adapter of kind {program.kind} has {program.prompt.tokens} virtual tokens, which no weight "
                "scales and no sum joins; ask for it alone, with weight 1"
            )
        if program.added_tokens(EMBEDDING, base.embedding.in_features):
            raise AdapterRefused(
                f"an adapter of kind {program.kind} adds tokens to the vocabulary, which the base has no rows for "
                "to weigh them against; ask for it alone, with weight 1"
            )
    reaches = {program.reach for program in programs}
    if len(reaches) > 1:
        kinds = ", ".join(dict.fromkeys(program.kind for program in programs))
        raise AdapterRefused(
            f"adapters of the kinds {kinds} act on different tokens of a prompt (activated LoRA, ReFT), so they "
            "are no single change; blend those that act on the same tokens"
        )


def wrap(programs: Sequence[Program], kind: str, sites: Mapping[str, SiteProgram]) -> Program:
    """A program of these sites with all else that the programs have in common."""
    proportional = any(program.portability == "proportional" for program in programs)
    return Program(
        kind=kind,
        sites=sites,
        base_model=programs[0].base_model,
        warnings=tuple(dict.fromkeys(each for program in programs for each in program.warnings)),
        portability="proportional" if proportional else "independent",
        invocation=programs[0].invocation,
        span=programs[0].span,
    )


def blend(programs: Sequence[Program], weights: Sequence[float], base: Base, max_rank: int) -> Program:
    """The sum of the programs' changes times their weights. One program with weight 1 stays as it is.

    `max_rank` bounds products that are looked for in full changes, not the rank of the sum.

    Raises:
        AdapterRefused: the programs have no exact sum.
    """
    if len(programs) == 1 and weights[0] == 1:
        return programs[0]
    check_parts(programs, base)
    known = sites_of(base)
    main, tail = (
        {
            name: blend_site(parts, known[name], base, max_rank)
            for name, parts in at_sites(each, weights).items()
        }
        for each in ([p.sites for p in programs], [p.tail for p in programs])
    )
    return replace(wrap(programs, "blend", main), tail=tail)


def at_sites(
    programs: Sequence[Mapping[str, SiteProgram]], weights: Sequence[float]
) -> dict[str, list[Weighted]]:
    """What there is at each site, in the order of the programs. What they share with others is their own here."""
    found: dict[str, list[Weighted]] = {}
    for program, weight in zip(programs, weights, strict=True):
        for name, part in program.items():
            found.setdefault(name, []).append(Weighted(part.folded(), weight))
    return found


def blend_site(parts: Sequence[Weighted], site: Site, base: Base, max_rank: int) -> SiteProgram:
    """The sum at one site. See `blend`."""
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].part
    tokens = _tokens(parts, site, base)
    parts = _without_many_sparse(parts, site, base, max_rank)
    parts, transform = _transformed(parts, site, base, max_rank)
    factors = _factors(parts, site)
    sparse = next((each for each in parts if each.part.sparse is not None), None)
    return replace(
        transform,
        a=factors.a,
        b=factors.b,
        inner_bias=factors.inner_bias,
        activation=factors.activation,
        bias=_sum((each.part.bias, each.weight) for each in parts),
        dense=_sum((each.part.dense, each.weight) for each in parts),
        sparse=None if sparse is None else _scaled(sparse.part.sparse, sparse.weight),
        tokens=tokens,
    )


# ---- factors --------------------------------------------------------------------------------------


def _factors(parts: Sequence[Weighted], site: Site) -> SiteProgram:
    """The rows of all factors, weights in B, so that the rank is the sum of the ranks."""
    having = [each for each in parts if each.part.a is not None and each.part.b is not None]
    if not having:
        return SiteProgram()
    activation = _common_activation([each.part.activation for each in having], site)
    inner = None
    if any(each.part.inner_bias is not None for each in having):
        inner = torch.cat([_inner(each.part) for each in having])
    return SiteProgram(
        a=torch.cat([each.part.a for each in having if each.part.a is not None]),
        b=torch.cat([each.part.b * each.weight for each in having if each.part.b is not None]),
        inner_bias=inner,
        activation=activation,
    )


def _inner(part: SiteProgram) -> torch.Tensor:
    return torch.zeros(part.rank) if part.inner_bias is None else part.inner_bias


def _common_activation(found: Sequence[Activation | None], site: Site) -> Activation | None:
    """The one of all. Those that look at all ranks of their adapter go with no other."""
    first = found[0]
    joins = first is None or first.kind in (*ELEMENTWISE, "softmax")
    if len(found) > 1 and (not joins or any(other != first for other in found)):
        kinds = ", ".join("none" if each is None else each.kind for each in found)
        raise AdapterRefused(
            f"at {site.name} the adapters have these activations between their factors: {kinds}. Only equal ones "
            "that act on each rank, or on groups of the same size, have a common form; leave one adapter out"
        )
    return first


# ---- transforms -----------------------------------------------------------------------------------


def _transformed(
    parts: Sequence[Weighted], site: Site, base: Base, max_rank: int
) -> tuple[Sequence[Weighted], SiteProgram]:
    """The common transform, and the parts that remain: one more when the transforms have only a sum in full."""
    movers = [each for each in parts if each.part.rotate_in is not None or each.part.scale_out is not None]
    if len(movers) <= 1 and all(each.weight == 1 for each in movers):
        one = movers[0].part if movers else SiteProgram()
        fields = (one.rotate_in, one.scale_out, one.cross_out, one.pair)
        return parts, SiteProgram(
            rotate_in=fields[0], scale_out=fields[1], cross_out=fields[2], pair=fields[3]
        )
    turned = [each for each in movers if each.part.rotate_in is not None]
    scaled = [each for each in movers if each.part.scale_out is not None]
    if not turned and len(pairs := {each.part.pair for each in scaled} - {0}) <= 1:
        return parts, _scale(scaled, max(pairs, default=0))
    if not scaled and (size := _common_block(turned)):
        return parts, SiteProgram(rotate_in=_rotation(turned, site, size))
    weight, bias = base.weight(site.name), base.bias(site.name)
    moved = _sum((transform_change(each.part, weight), each.weight) for each in movers)
    assert moved is not None
    extra = change(site, moved, max_rank, base)
    if bias is not None:
        extra = replace(extra, bias=_sum((output_change(each.part, bias), each.weight) for each in movers))
    return [*parts, Weighted(extra, 1.0)], SiteProgram()


def _scale(parts: Sequence[Weighted], pair: int) -> SiteProgram:
    moved = _sum((each.part.scale_out - 1, each.weight) for each in parts if each.part.scale_out is not None)
    assert moved is not None
    cross = _sum((each.part.cross_out, each.weight) for each in parts)
    return SiteProgram(scale_out=1 + moved, cross_out=cross, pair=pair)


def _common_block(parts: Sequence[Weighted]) -> int:
    """The size of blocks in which all rotations can be written; 0 when there is none among theirs."""
    sizes = {each.part.rotate_in.shape[1] for each in parts if each.part.rotate_in is not None}
    largest = max(sizes)
    return 0 if any(largest % size for size in sizes) else largest


def _rotation(parts: Sequence[Weighted], site: Site, size: int) -> torch.Tensor:
    moved = torch.zeros(site.in_features // size, size, size)
    for part, weight in parts:
        assert part.rotate_in is not None
        own = part.rotate_in.shape[1]
        turn = (part.rotate_in - torch.eye(own)).view(-1, size // own, own, own)
        blocks = moved.view(-1, size // own, own, size // own, own)
        for each in range(size // own):  # along the diagonal
            blocks[:, each, :, each] += weight * turn[:, each]
    return moved + torch.eye(size)


# ---- sums -----------------------------------------------------------------------------------------


def _sum(terms: Iterable[tuple[torch.Tensor | None, float]]) -> torch.Tensor | None:
    """Σ weight · tensor over those that are there."""
    total: torch.Tensor | None = None
    for tensor, weight in terms:
        if tensor is not None:
            total = tensor * weight if total is None else total.add_(tensor, alpha=weight)
    return total


def _scaled(matrix: SparseMatrix | None, weight: float) -> SparseMatrix | None:
    return None if matrix is None else replace(matrix, values=matrix.values * weight)


def _without_many_sparse(
    parts: Sequence[Weighted], site: Site, base: Base, max_rank: int
) -> Sequence[Weighted]:
    """The same with at most one sparse change: the sum of several is one more part."""
    found = [(each.part.sparse, each.weight) for each in parts if each.part.sparse is not None]
    if len(found) < 2:
        return parts
    rows = [torch.repeat_interleave(matrix.starts.long().diff()) for matrix, _ in found]
    columns = [matrix.columns.long() for matrix, _ in found]
    values = [matrix.values.double() * weight for matrix, weight in found]
    places = torch.stack([torch.cat(rows), torch.cat(columns)])
    summed = sparse_change(site, places, torch.cat(values), max_rank, base)
    rest = [Weighted(replace(part, sparse=None), weight) for part, weight in parts]
    return [*rest, Weighted(summed, 1.0)]


def _tokens(parts: Sequence[Weighted], site: Site, base: Base) -> TokenRows | None:
    """Rows of all tokens that have one somewhere: the base's, and what each adapter does to them."""
    found = [each.part.tokens.ids for each in parts if each.part.tokens is not None]
    if not found:
        return None
    ids = torch.tensor(sorted({*torch.cat(found).tolist()}))
    rows = base_rows(site.name, ids, base).double()
    if site.name == HEAD:
        if any(each.part.bias is not None for each in parts):
            raise AdapterRefused(
                f"at {HEAD} one adapter has rows of its own for tokens and one a bias, which has no place in a "
                "row; leave one of them out"
            )
        for part, weight in parts:
            rows += weight * weight_change(part, site, base, ids).double()
    else:
        for part, weight in parts:
            if part.tokens is not None:
                own = part.tokens.ids.long()
                place = torch.searchsorted(ids, own)
                rows[place] += weight * (part.tokens.rows - base_rows(site.name, own, base)).double()
    return TokenRows(ids.int(), rows.float())
