"""Rows of the embedding and the output head that an adapter brings for some tokens, also for tokens it adds.

The values of a file replace the base's rows. Rows that are the base's in the type that is served are left out, so
what remains is what the adapter changes. Ids from the base's vocabulary's size on are tokens that the adapter adds:
they must follow each other from there, as a resized vocabulary has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import wrong
from veneer.adapters.program import EMBEDDING, HEAD, Program, SiteProgram, TokenRows
from veneer.errors import AdapterRefused


def check_ids(field: str, ids: Sequence[int], base: Base) -> None:
    """Refuse a config's `field` unless its token ids are distinct and can be served."""
    vocabulary, limit = base.embedding.in_features, base.limits.added_tokens
    if not ids:
        raise wrong(field, list(ids), "it must name a token")
    if len(ids) > vocabulary + limit:  # before anything is made of each of them
        rule = f"the base has {vocabulary} tokens, and an adapter may add {limit} (--max-added-tokens)"
        raise wrong(field, f"{len(ids)} tokens", rule)
    if len(set(ids)) != len(ids) or min(ids) < 0:
        raise wrong(field, list(ids), "it must name tokens once each, by ids from 0 on")
    added = sorted(token for token in ids if token >= vocabulary)
    if len(added) > limit or (added and added[-1] >= vocabulary + limit):
        rule = (
            f"the base has the ids 0 to {vocabulary - 1}, and an adapter may add {limit} (--max-added-tokens)"
        )
        raise wrong(field, added[-1], rule)
    if added != list(range(vocabulary, vocabulary + len(added))):
        rule = f"added tokens must follow each other from {vocabulary} on, the end of the base's vocabulary"
        raise wrong(field, added, rule)


def token_rows(site: str, ids: Sequence[int], values: torch.Tensor, base: Base) -> TokenRows | None:
    """What of `values` [ids, hidden] differs from the base at the embedding or the head; None when nothing does."""
    order = torch.tensor(ids, dtype=torch.int64).argsort()
    known, rows = torch.tensor(ids, dtype=torch.int64)[order], values[order]
    own = known < base.embedding.in_features
    same = rows[own].to(base.dtype).float() == base.token_rows(site, known[own])
    keep = torch.ones(len(known), dtype=torch.bool)
    keep[own] = ~same.all(1)
    if not keep.any():
        return None
    scale = base.embedding_scale if site == EMBEDDING else 1.0
    return TokenRows(known[keep].int(), (rows[keep] * scale).contiguous())


def with_tokens(
    programs: Mapping[str, SiteProgram], found: Mapping[str, TokenRows | None]
) -> dict[str, SiteProgram]:
    """Programs by site, with rows of tokens at the embedding and the head."""
    combined = dict(programs)
    for site, tokens in found.items():
        if tokens is not None:
            combined[site] = replace(combined.get(site, SiteProgram()), tokens=tokens)
    return combined


def check_added(programs: Mapping[str, SiteProgram], base: Base, warnings: list[str]) -> None:
    """Refuse tokens that could be generated and not be read; warn of those that cannot be generated."""
    vocabulary, found = base.embedding.in_features, Program("", programs)
    read, told = (found.added_tokens(site, vocabulary) for site in (EMBEDDING, HEAD))
    if told > read:
        raise AdapterRefused(
            f"The adapter has an output row and no embedding for token {vocabulary + read}; the base has the ids 0 "
            f"to {vocabulary - 1}. Save both."
        )
    if told < read:
        warnings.append(
            f"The tokens from {vocabulary + told} to {vocabulary + read - 1} have embeddings and no output rows: "
            "they can stand in prompts and are never generated."
        )
