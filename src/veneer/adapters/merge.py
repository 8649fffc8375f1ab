"""A merge: the adapter that a recipe makes, written site by site, with its distance from the exact blend.

Memory: the programs of the recipe's parts, and of one site at a time their changes in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from veneer.adapters.blend import check_parts, wrap
from veneer.adapters.cutting import Loss, cut
from veneer.adapters.deltas import weight_change
from veneer.adapters.merging import Merged, merge_site, sites_in
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.changes import check_change, is_product
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.adapters.recipes import Recipe
from veneer.adapters.saving import ProgramWriter
from veneer.errors import AdapterRefused

_AS_SERVED = (
    "some of the merged adapters follow from the base's weights; the result has what they were on the weights as "
    "they are served here. For another quantization of the base merge them again there.",
)


class Report(NamedTuple):
    """What was found out."""

    distance: (
        float | None
    )  # ‖merged - Σ w_i ΔW_i‖ / ‖Σ w_i ΔW_i‖ over all weights; None where nothing is a weight
    warnings: tuple[str, ...]


def merge(
    recipe: Recipe,
    programs: Sequence[Program],
    base: Base,
    max_rank: int,
    folder: Path,
    *,
    keep_rows: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write what the recipe makes of the programs of its parts into `folder`, as an adapter's two files.

    Products lose their directions that are noise unless `keep_rows`, and are told in full where that is smaller.
    `progress` gets how many sites are done, and of how many.

    Raises:
        AdapterRefused: the recipe cannot be followed exactly, or its result cannot be served.
        StorageFull: the disk has no room.
    """
    check_parts(programs, base)
    sites, loss, measured = sites_in(programs), Loss(), 0
    with ProgramWriter(folder) as writer:
        for done, (name, in_tail) in enumerate(sites):
            progress(done, len(sites))
            merged = merge_site(recipe, programs, name, in_tail, base, max_rank)
            part = merged.cut.part if keep_rows else _smaller(merged.cut.part, merged.site, base, max_rank)
            if part.rank > max_rank:
                raise AdapterRefused(
                    f"at {merged.site.name} the result has rank {part.rank}, and --max-lora-rank is {max_rank}; "
                    "send a rank to cut it to, or restart the server with a higher limit"
                )
            writer.add(merged.site, part, in_tail=merged.in_tail)
            measured += _measure(loss, merged._replace(cut=merged.cut._replace(part=part)), base)
        progress(len(sites), len(sites))
        common = wrap(programs, "merged", {})
        writer.finish(common)
    return Report(loss.relative if measured else None, _AS_SERVED if _is_frozen(programs) else ())


def _is_frozen(programs: Sequence[Program]) -> bool:
    """Whether what follows from the base's weights is in the file now as numbers."""
    return any(program.portability == "proportional" for program in programs)


def _smaller(part: SiteProgram, site: Site, base: Base, max_rank: int) -> SiteProgram:
    """The same with as few rows as say it, or in full where that is smaller or the rank is too high."""
    if part.a is None or part.activation is not None:
        return part
    part = cut(part, part.rank, site.name).part
    assert part.a is not None
    assert part.b is not None
    if site.name not in base.sites or is_product(site, part.rank, max_rank):
        return part
    check_change(site, part.rank, max_rank, base)
    change = part.b.T @ part.a
    return replace(part, a=None, b=None, dense=change if part.dense is None else change + part.dense)


def _measure(loss: Loss, merged: Merged, base: Base) -> bool:
    """Add the distance at a site; False where something is no change of a weight."""
    site, parts, made = merged.site, merged.parts, merged.cut.part
    if any(each.part.activation is not None for each in parts):
        return False
    exact = torch.zeros(site.out_features, site.in_features)
    for part, weight in parts:
        exact.add_(weight_change(part, site, base), alpha=weight)
    had = float(torch.linalg.vector_norm(exact, dtype=torch.float64) ** 2)
    exact -= weight_change(made, site, base) if made.tensors else 0
    loss.add(float(torch.linalg.vector_norm(exact, dtype=torch.float64) ** 2), had)
    return True
