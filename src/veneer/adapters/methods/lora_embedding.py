"""What PEFT's LORA does at the embedding, and for tokens that it trains in whole.

LoRA on the embedding adds s·B A[:, token]; `ensure_weight_tying` adds the same to a head that is tied to it.
`trainable_token_indices` replaces rows of the embedding, of the output head, or, where these are tied, of both.
https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/layer.py, utils/other.py

Keys are `<embedding>.lora_embedding_A` [r, vocabulary], `lora_embedding_B` [hidden, r], and
`<module>.token_adapter.trainable_tokens_delta` [n, hidden]: despite the name they are the new rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from veneer.adapters.checkpoint import Checkpoint, listed
from veneer.adapters.methods.base import Base
from veneer.adapters.methods.common import PREFIX, wrong
from veneer.adapters.methods.token_rows import check_ids, token_rows
from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.program import EMBEDDING, HEAD, SiteProgram, TokenRows
from veneer.errors import AdapterRefused

FIELD = "trainable_token_indices"
_DELTA = ".token_adapter.trainable_tokens_delta"
_A, _B = f"{PREFIX}{EMBEDDING}.lora_embedding_A", f"{PREFIX}{EMBEDDING}.lora_embedding_B"
_HEAD_A, _HEAD_B = f"{PREFIX}{HEAD}.lora_A.weight", f"{PREFIX}{HEAD}.lora_B.weight"


def trained_tokens(
    indices: Sequence[int] | Mapping[str, Sequence[int]] | None, base: Base
) -> dict[str, Sequence[int]]:
    """The tokens with rows of their own at the embedding and the head, as peft's set_additional_trainable_modules.

    Raises AdapterRefused.
    """
    if indices is None:
        return {}
    named = indices if isinstance(indices, Mapping) else {EMBEDDING: indices}
    found: dict[str, Sequence[int]] = {}
    for name, ids in named.items():
        sites = [site for site in (EMBEDDING, HEAD) if site.endswith(name)]
        if len(sites) != 1 or sites[0] in found:
            raise wrong(
                FIELD, name, f"tokens have rows at {listed((EMBEDDING, HEAD))} alone, named once each"
            )
        check_ids(FIELD, ids, base)
        found[sites[0]] = ids
    return found


def token_shapes(tokens: Mapping[str, Sequence[int]], base: Base) -> dict[str, tuple[int, ...]]:
    """The tensors of `tokens`. A tied head whose tokens are the embedding's has none of its own."""
    return {
        f"{PREFIX}{site}{_DELTA}": (len(ids), base.hidden_size)
        for site, ids in tokens.items()
        if site == EMBEDDING or not shares_rows(tokens, base)
    }


def shares_rows(tokens: Mapping[str, Sequence[int]], base: Base) -> bool:
    """Whether the rows of the embedding are the head's, too."""
    own = tokens.get(EMBEDDING)
    return base.tied and own is not None and tokens.get(HEAD, own) == own


def read_tokens(
    checkpoint: Checkpoint, tokens: Mapping[str, Sequence[int]], base: Base
) -> dict[str, TokenRows | None]:
    """The rows by site."""
    values = {
        site: checkpoint.read(f"{PREFIX}{site}{_DELTA}")
        for site in tokens
        if site == EMBEDDING or not shares_rows(tokens, base)
    }
    found = {site: token_rows(site, tokens[site], rows, base) for site, rows in values.items()}
    if shares_rows(tokens, base):
        found[HEAD] = token_rows(HEAD, tokens[EMBEDDING], values[EMBEDDING], base)
    return found


def embedding_shapes(
    rank: int, base: Base, ties: bool, header: Mapping[str, object]
) -> dict[str, tuple[int, ...]]:
    """The tensors of LoRA on the embedding; with `ties` the file may have the head's, which are the same."""
    vocabulary, hidden = base.embedding.in_features, base.embedding.out_features
    shapes: dict[str, tuple[int, ...]] = {_A: (rank, vocabulary), _B: (hidden, rank)}
    copies = {_HEAD_A: (rank, hidden), _HEAD_B: (vocabulary, rank)} if ties else {}
    return shapes | {key: shape for key, shape in copies.items() if key in header}


def read_embedding(checkpoint: Checkpoint, scale: float, base: Base, ties: bool) -> dict[str, SiteProgram]:
    """The programs of LoRA on the embedding, and of the head that `ties` to it."""
    a, b = checkpoint.read(_A), checkpoint.read(_B)
    programs = {EMBEDDING: SiteProgram(a=a, b=(b.T * (scale * base.embedding_scale)).contiguous())}
    if ties:
        for key, own in ((_HEAD_A, b.T), (_HEAD_B, a.T)):
            if key in checkpoint.header and not torch.equal(checkpoint.read(key), own):
                raise AdapterRefused(
                    f"{WEIGHTS_FILE}: {key!r} is not what ensure_weight_tying makes of the embedding's tensors; "
                    "save the adapter again with PEFT."
                )
        programs[HEAD] = SiteProgram(a=b.T.contiguous(), b=a * scale)
    return programs
