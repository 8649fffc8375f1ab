"""Merges: what a recipe makes of several adapters, site by site, on their true changes of the base's weights.

    linear           Σ w_i ΔW_i, as blend.py has it: exactly, and for every kind that has a sum
    magnitude_prune  the largest `density` of each ΔW_i, then the sum
    dare_linear      each entry with probability `density`, over it, then the sum     https://arxiv.org/abs/2311.03099
    ties, dare_ties  pruned one way or the other; a sign is elected for each entry, and of those that have it the
                     weighted mean is taken                                           https://arxiv.org/abs/2306.01708

The formulas are those of peft.utils.merge_utils. PEFT applies them to A and B by themselves, whose product is not
what they say of ΔW; here they are applied to ΔW, and to changes of biases alike. A recipe with a rank cuts what
comes out to the closest products of that rank (PEFT's methods that end in _svd).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import torch

from veneer.adapters.blend import Weighted, blend_site, check_parts, sites_of, wrap
from veneer.adapters.cutting import Cut, Loss, cut, product
from veneer.adapters.deltas import base_rows, bias_change, weight_change
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import change, sparse_change
from veneer.adapters.program import EMBEDDING, Program, Site, SiteProgram, TokenRows
from veneer.adapters.recipes import DRAWS, ELECTS, Recipe
from veneer.errors import AdapterRefused


class Merged(NamedTuple):
    """What a recipe makes of a site."""

    site: Site
    in_tail: bool  # it is of the tail (`Program.tail`)
    parts: list[Weighted]
    cut: Cut


def sites_in(programs: Sequence[Program]) -> list[tuple[str, bool]]:
    """The names of all sites that programs change, and whether of their tails."""
    return [
        (name, in_tail)
        for in_tail in (False, True)
        for name in dict.fromkeys(name for program in programs for name in _sites(program, in_tail))
    ]


def merge_site(
    recipe: Recipe, programs: Sequence[Program], name: str, in_tail: bool, base: Base, max_rank: int
) -> Merged:
    """What the recipe makes of a site. `programs` are those of its parts, which `check_parts` has let through.

    Raises:
        AdapterRefused: the recipe cannot be followed exactly.
    """
    site = sites_of(base)[name]
    having = [
        (part, sites[name].folded())
        for part, sites in zip(recipe.parts, (_sites(p, in_tail) for p in programs), strict=True)
        if name in sites
    ]
    parts = [Weighted(program, part.weight) for part, program in having]
    if recipe.method != "linear":
        seeds = [f"{recipe.seed}/{i}/{part.key}/{name}/{in_tail}" for i, (part, _) in enumerate(having)]
        made = _entrywise(recipe, parts, seeds, site, base, max_rank)
    else:
        found = blend_site(parts, site, base, max_rank)
        made = Cut(found, 0.0, 0.0) if recipe.rank is None else cut(found, recipe.rank, name)
    return Merged(site, in_tail, parts, made)


def _sites(program: Program, in_tail: bool) -> Mapping[str, SiteProgram]:
    return program.tail if in_tail else program.sites


def follow(
    recipe: Recipe, programs: Sequence[Program], base: Base, max_rank: int, max_elements: int
) -> Program:
    """All of it as one program of at most `max_elements` numbers; its `error` is what its rank cost.

    Raises:
        AdapterRefused: the recipe cannot be followed exactly, or the result is too large or of too high a rank.
    """
    check_parts(programs, base)
    loss, elements = Loss(), 0
    found: tuple[dict[str, SiteProgram], dict[str, SiteProgram]] = ({}, {})
    for name, in_tail in sites_in(programs):
        site, _, _, (part, lost, had) = merge_site(recipe, programs, name, in_tail, base, max_rank)
        loss.add(lost, had)
        elements += sum(tensor.numel() for tensor in part.tensors)
        if elements > max_elements:
            raise AdapterRefused(
                f"{recipe.method} of these {len(programs)} adapters takes more than the {max_elements} numbers "
                f"that --adapter-memory holds, reached at {site.name}; send max_rank, which makes products of it"
            )
        if part.rank > max_rank:
            raise AdapterRefused(
                f"at {site.name} the ranks of the {len(programs)} adapters add up to {part.rank}, and "
                f"--max-lora-rank is {max_rank}; send max_rank to cut the sum, or restart with a higher limit"
            )
        found[in_tail][site.name] = part
    program = replace(wrap(programs, "blend", found[False]), tail=found[True])
    return program if recipe.rank is None else replace(program, error=loss.relative)


# ---- changes entry by entry -----------------------------------------------------------------------


def _entrywise(
    recipe: Recipe, parts: Sequence[Weighted], seeds: Sequence[str], site: Site, base: Base, max_rank: int
) -> Cut:
    weights = [weight for _, weight in parts]
    changes = [weight_change(part, site, base) for part, _ in parts]
    merged = combine(recipe, changes, weights, [f"{seed}/weight" for seed in seeds])
    del changes
    biases = [bias_change(part, site, base) for part, _ in parts]
    bias = None
    if any(each is not None for each in biases):
        known = [torch.zeros(site.out_features) if each is None else each for each in biases]
        bias = combine(recipe, known, weights, [f"{seed}/bias" for seed in seeds])
    made = _in_form(recipe, merged, site, base, max_rank)
    return made._replace(part=replace(made.part, bias=bias))


def _in_form(recipe: Recipe, merged: torch.Tensor, site: Site, base: Base, max_rank: int) -> Cut:
    """The change of a site in the form of the fewest bytes that the site takes."""
    if recipe.rank is not None:
        return product(merged, recipe.rank)
    if site.is_hidden:
        made = product(merged, max_rank)
        if made.lost > (1e-6**2) * made.had:
            raise AdapterRefused(
                f"{recipe.method} at the hidden state {site.name} is of a rank over {max_rank} (--max-lora-rank), "
                "and a hidden state takes products alone; send max_rank"
            )
        return made
    if site.name == EMBEDDING:
        return Cut(_as_rows(merged, base), 0.0, 0.0)
    places = merged.nonzero().T
    entries = places.shape[1] * (4 + base.dtype.itemsize)
    if entries < merged.numel() * base.dtype.itemsize:
        return Cut(sparse_change(site, places, merged[tuple(places)], max_rank, base), 0.0, 0.0)
    return Cut(change(site, merged, max_rank, base), 0.0, 0.0)


def _as_rows(merged: torch.Tensor, base: Base) -> SiteProgram:
    """A change of the embedding [hidden, vocabulary] as rows of the tokens that it changes."""
    ids = merged.any(0).nonzero()[:, 0]
    if not len(ids):
        return SiteProgram()
    return SiteProgram(tokens=TokenRows(ids.int(), base_rows(EMBEDDING, ids, base) + merged[:, ids].T))


def combine(
    recipe: Recipe, changes: Sequence[torch.Tensor], weights: Sequence[float], seeds: Sequence[str]
) -> torch.Tensor:
    """What the recipe's method makes of tensors of one shape. `seeds`: what random entries of each follow from."""
    if recipe.method in DRAWS:
        kept = [_drawn(each, recipe.density, seed) for each, seed in zip(changes, seeds, strict=True)]
    else:
        kept = [_largest(each, recipe.density) for each in changes]
    if recipe.method not in ELECTS:
        total = torch.zeros_like(kept[0])
        for each, weight in zip(kept, weights, strict=True):
            total.add_(each, alpha=weight)
        return total
    return _elected(kept, weights, recipe.sign)


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The entries of the largest magnitudes; zeros elsewhere."""
    if density == 1:
        return tensor
    flat = tensor.flatten()
    chosen = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen]).view(tensor.shape)


def _drawn(tensor: torch.Tensor, density: float, seed: str) -> torch.Tensor:
    """Random entries over their probability, the same for the same seed; zeros elsewhere."""
    if density == 1:
        return tensor
    number = int.from_bytes(blake2b(seed.encode(), digest_size=8).digest(), "little", signed=True)
    drawn = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(number)) < density
    return tensor * drawn / density


def _elected(kept: Sequence[torch.Tensor], weights: Sequence[float], method: str) -> torch.Tensor:
    """At each entry the weighted mean of those that have the sign of their sum, or of their majority."""
    votes = torch.zeros_like(kept[0])
    for each in kept:
        votes += each if method == "total" else each.sign()
    positive = votes >= 0
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for each, weight in zip(kept, weights, strict=True):
        agrees = torch.where(positive, each > 0, each < 0)
        total.add_(each * agrees, alpha=weight)
        count += agrees
    return total / count.clamp_(min=1)
