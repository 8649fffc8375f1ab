"""PEFT's TRAINABLE_TOKENS: rows of the embedding, or of the output head, are replaced.

With tied embeddings the rows of the embedding are the head's, too; the file may hold both.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/trainable_tokens/layer.py

Keys are `base_model.model.<module>.trainable_tokens_delta` [n, hidden]: despite the name they are the new rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
import torch

from veneer.adapters.checkpoint import Checkpoint, listed
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import CAUSAL, PREFIX, Common, Refusal, read_fields, wrong
from veneer.adapters.methods.token_rows import check_added, check_ids, token_rows, with_tokens
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.program import EMBEDDING, HEAD, Program
from veneer.errors import AdapterRefused

_PART = ".trainable_tokens_delta"


class Honoured(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what the adapter computes, with peft's defaults."""

    peft_type: Literal["TRAINABLE_TOKENS"]
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    token_indices: list[int] = []


class TrainingOnly(Common, frozen=True, kw_only=True):
    """Fields without effect on inference."""

    init_weights: bool = True


REFUSED: Mapping[str, Refusal] = {"task_type": CAUSAL}


def lower(checkpoint: Checkpoint, base: Base, max_rank: int) -> Program:
    """Lower a PEFT trainable tokens. See `veneer.adapters.methods.base.Method`."""
    config = read_fields(checkpoint.config, Honoured, TrainingOnly, REFUSED, "TrainableTokensConfig")
    check_ids("token_indices", config.token_indices, base)
    warnings: list[str] = []
    chosen = _choose(config, checkpoint)
    shape = (len(config.token_indices), base.hidden_size)
    shapes = {f"{PREFIX}{site}{_PART}": shape for site in chosen}
    shared = base.tied and EMBEDDING in chosen
    if shared:  # PEFT writes them again, under a longer name where the head was named, too
        shapes.pop(f"{PREFIX}{HEAD}{_PART}", None)
        names = (f"{PREFIX}{HEAD}{_PART}", f"{PREFIX}{HEAD}.base_layer{_PART}")
        copies = [name for name in names if name in checkpoint.header]
        shapes |= dict.fromkeys(copies, shape)
    checkpoint.require(shapes, lambda key: f"token_indices and target_modules name only {listed(shapes)}")
    read = {site: checkpoint.read(f"{PREFIX}{site}{_PART}") for site in chosen if not shared or site != HEAD}
    if shared:
        for copy in copies:
            if not torch.equal(checkpoint.read(copy), read[EMBEDDING]):
                raise AdapterRefused(
                    f"{WEIGHTS_FILE}: {copy!r} differs from the embedding's rows, and the base's embeddings are "
                    "tied. Save the adapter from a base with tied embeddings."
                )
        read[HEAD] = read[EMBEDDING]
    found = {site: token_rows(site, config.token_indices, values, base) for site, values in read.items()}
    programs = with_tokens({}, found)
    check_added(programs, base, warnings)
    return Program(
        kind="trainable_tokens",
        sites=programs,
        base_model=config.base_model_name_or_path or "",
        warnings=tuple(warnings),
    )


def _choose(config: Honoured, checkpoint: Checkpoint) -> list[str]:
    """The embedding, the output head or both. A regular expression is not run, the file's keys tell."""
    targets, modules = config.target_modules, (EMBEDDING, HEAD)
    if targets is None:
        return [EMBEDDING]
    if isinstance(targets, str):
        chosen = [name for name in modules if f"{PREFIX}{name}{_PART}" in checkpoint.header]
        # of tied embeddings the file has both, and only one was named
        return chosen if targets not in modules else [targets]
    chosen = [name for name in modules if any(f".{name}".endswith(f".{target}") for target in targets)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in modules)]
    if unknown or not chosen:
        raise wrong("target_modules", targets, f"tokens have rows at {listed(modules)} alone")
    return chosen
