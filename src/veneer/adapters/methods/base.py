"""What a method file provides.

A method turns the files of an adapter into a `Program`. It honours each field of the config exactly as the
method's reference library does, or refuses the adapter by the field's name. The table of methods is
`veneer.adapters.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.program import Program, Site


class Norm(NamedTuple):
    """A normalization of the base, y = (weight + offset) x / |x|."""

    weight: torch.Tensor  # [features], float32 on the CPU, as it is stored
    offset: float  # 1 in Gemma, where the stored weight is what is added to 1
    readers: tuple[str, ...]  # the sites that its output is the input of; empty when something else reads it


class Limits(NamedTuple):
    """What the server takes of one adapter, besides its rank."""

    module_bytes: int = (
        256 << 20
    )  # of one module's weight, or of a change of it, in full (--max-module-bytes)
    added_tokens: int = 256  # beyond the base's vocabulary (--max-added-tokens)


class Base(Protocol):
    """What a method may ask about the resident base."""

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        ...

    @property
    def sites(self) -> Mapping[str, Site]: ...

    @property
    def hidden_sites(self) -> Mapping[str, Site]:
        """Places in the decoder layers that are no linear layer, by name (see `program.Site`).

        Empty where the layers have another form than Llama's.
        """
        ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    def weight(self, site: str) -> torch.Tensor:
        """The weight [out, in] of a site as it is served, dequantized: float32 on the CPU, a copy."""
        ...

    def bias(self, site: str) -> torch.Tensor | None:
        """The base's bias [out] of a site, float32 on the CPU, a copy, or None."""
        ...

    @property
    def embedding(self) -> Site:
        """From the base's vocabulary to its hidden size. It comes after all sites in the tables."""
        ...

    @property
    def embedding_scale(self) -> float:
        """By which the base multiplies its embeddings: 1, but in Gemma."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        ...

    def token_rows(self, site: str, ids: torch.Tensor) -> torch.Tensor:
        """The weight's rows [ids, hidden] at the embedding or the output head as served, float32 on the CPU."""
        ...

    @property
    def limits(self) -> Limits: ...

    @property
    def dtype(self) -> torch.dtype:
        """In which adapters are served."""
        ...

    @property
    def norms(self) -> Mapping[str, Norm]:
        """Every norm by its module path."""
        ...


class Method(Protocol):
    """Lower a checkpoint to primitives of at most `max_rank`, or raise `AdapterRefused`."""

    def __call__(self, checkpoint: Checkpoint, base: Base, max_rank: int) -> Program: ...
