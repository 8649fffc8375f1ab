"""What an adapter is after lowering: primitives at sites, and nothing about the method it came from.

A site is a linear layer of the base, y = W0 x + b. For a row x [in] that uses the adapter:

    y = OUT(W0 x' + b) + B^T phi(A x + d) + beta + D x
                 A: [rank, in], d: [rank], phi: `Activation`, B: [rank, out] with the scale folded in, beta: [out]

    or, in place of B^T phi(A x + d), b * B^T (c * (A x))       c: [rank], b: [out], A and B shared with others

    x' = each block of x times its R_k (x as a row)         R: [in / block, block, block]; block 1 is a diagonal
    OUT(z)_i = scale_i z_i + cross_i z_partner(i)           partner(i) = i ± pair / 2 within its group of `pair`
    D: [out, in], in full or by its few entries. With scale 0 it replaces the base's weight, and beta the bias.

Equal A and B of several adapters that have c and b lie once in memory, and are read once for all their rows.

The embedding and the output head can also have rows of their own for some tokens (`TokenRows`). The embedding's
A x is the column of A of the token.

A site may also be a hidden state of a decoder layer, y = h, where only B^T phi(A x + d) + beta is added (`Site`).

An adapter may also have virtual tokens, which stand in front of every prompt (`Prompt`). Its primitives act on
every token, or on some (reach.py): from the last place on where a prompt has the invocation tokens, and not at all
where it has them nowhere; or on the first and last tokens of a prompt, where the last may have their own (`tail`).

Both factors carry the rank first, so a weighted blend of adapters is the concatenation of their rows.
A new primitive is a new field of `SiteProgram`, packed by residency.py and applied by engine/layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from veneer.adapters.reach import Reach, Span
from veneer.kernels.tables import ELEMENTWISE

HEAD = "lm_head"  # the output head of every served architecture
EMBEDDING = "model.embed_tokens"  # and its embedding


class Site(NamedTuple):
    """A linear layer of the base that adapters can target, its embedding (from a token to its vector), or a hidden
    state of a decoder layer.

    A linear layer's name is its module path in the transformers model, "model.layers.0.self_attn.q_proj". The
    hidden states of a layer L, "model.layers.0", are

        L.self_attn.heads       y: the heads' outputs side by side, before o_proj;  x: the queries after RoPE
        L.self_attn.output      y: what attention gives (after o_proj), before the residual is added;  x: y itself
        L.self_attn.sum         the same y;  x: y + the residual
        L.self_attn.residual    the same y;  x: the residual, which is the layer's input before its norm
        L.mlp.output, L.mlp.sum, L.mlp.residual     the same of the MLP
        L.output                y: the layer's output;  x: y itself

    What several of them add to one y is computed of the y that the base gave.
    """

    name: str
    in_features: int
    out_features: int
    is_hidden: bool = False  # a hidden state: no base product whose input or output could be turned or scaled


@dataclass(frozen=True)
class Activation:
    """What becomes of h = A x + d [rank] before B. What a kind does not name leaves its field at 0 or "".

        relu, silu, gelu, gelu_tanh, tanh, sigmoid, leaky_relu (slope 0.01): of each element
        softmax: over each `group` of neighbours
        arrow: `count` experts of `group` ranks. h = (scores [count], experts [count, group]). The gate of an
            expert is a softmax over the `top_k` largest |scores|, of the lowest number among equals; 0 elsewhere.
            Result: (0 [count], gate h of each expert).
        fusion: `count` bottlenecks of `group` ranks, with phi = `inner`. h = (start [count], bottleneck
            [count, group], key [count, group]). The gate of each is a softmax over start + sum(phi(bottleneck)
            key). Result: (gates [count], gate phi(bottleneck) of each, 0 [count, group]).

    Ranks whose result is 0 have rows of zeros in B.
    """

    kind: str  # of `veneer.kernels.tables.ACTIVATIONS`
    group: int = 0
    count: int = 0  # at most `veneer.kernels.tables.MAX_CHOICES`
    top_k: int = 0
    inner: str = ""  # an elementwise kind; "" is the identity

    @property
    def detail(self) -> int:
        """`top_k`, or the number of `inner`."""
        return self.top_k or ELEMENTWISE.index(self.inner)


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix [out, in] by its entries, row by row. Tensors are contiguous, on the CPU."""

    starts: torch.Tensor  # int32 [out + 1], where the entries of each row begin
    columns: torch.Tensor  # int32 [entries]
    values: torch.Tensor  # float32 [entries]


@dataclass(frozen=True)
class TokenRows:
    """The embeddings of some tokens, or the rows that give their logits. Tensors are contiguous, on the CPU.

    They stand in for the base's, or for tokens that the base does not have: ids beyond its vocabulary.
    """

    ids: torch.Tensor  # int32 [tokens], ascending
    rows: torch.Tensor  # float32 [tokens, hidden]


@dataclass(frozen=True)
class SiteProgram:
    """The primitives of one adapter at one site. Tensors are contiguous, on the CPU, float32."""

    a: torch.Tensor | None = None  # [rank, in]
    b: torch.Tensor | None = None  # [rank, out], scale folded in
    bias: torch.Tensor | None = None  # [out], added to y
    inner_bias: torch.Tensor | None = None  # [rank], d; only with an activation: fold B^T d into bias
    activation: Activation | None = None
    rotate_in: torch.Tensor | None = None  # [in / block, block, block]
    scale_out: torch.Tensor | None = None  # [out]
    cross_out: torch.Tensor | None = None  # [out], only with scale_out
    pair: int = 0  # features of a group of `cross_out`, even; 0 without it
    dense: torch.Tensor | None = None  # [out, in]
    sparse: SparseMatrix | None = None
    tokens: TokenRows | None = None  # at the embedding and the output head alone
    rank_scale: torch.Tensor | None = None  # [rank], c; with it a and b are shared, over sites and adapters
    update_scale: torch.Tensor | None = None  # [out], b; only with rank_scale

    @property
    def is_shared(self) -> bool:
        """Whether a and b are those of other sites and adapters, too: the same tensors at all sites of a shape."""
        return self.rank_scale is not None

    def folded(self) -> SiteProgram:
        """The same with nothing shared: both scales are in b."""
        if self.b is None or self.rank_scale is None or self.update_scale is None:
            return self
        b = self.b * self.rank_scale[:, None] * self.update_scale
        return replace(self, b=b, rank_scale=None, update_scale=None)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        found = [self.a, self.b, self.bias, self.inner_bias, self.rotate_in, self.scale_out, self.cross_out]
        found += [self.dense, self.rank_scale, self.update_scale]
        if self.sparse is not None:
            found += [self.sparse.starts, self.sparse.columns, self.sparse.values]
        if self.tokens is not None:
            found += [self.tokens.ids, self.tokens.rows]
        return tuple(tensor for tensor in found if tensor is not None)

    @property
    def primitives(self) -> frozenset[str]:
        """Names from `PRIMITIVES`."""
        turned, scaled = self.rotate_in is not None, self.scale_out is not None
        diagonal = self.rotate_in is not None and self.rotate_in.shape[1] == 1
        paired = self.cross_out is not None
        has = (
            self.rank > 0,
            self.is_shared,
            self.activation is not None,
            self.bias is not None,
            turned and not diagonal,
            diagonal,
            scaled and not paired,
            paired,
            self.dense is not None,
            self.sparse is not None,
            self.tokens is not None,
        )
        return frozenset(name for name, there in zip(PRIMITIVES, has, strict=True) if there)

    @property
    def is_identity(self) -> bool:
        """True when the output cannot change: the product has a zero factor, sums are 0, factors are 1.

        Rows of tokens count as a change: methods keep only those that differ from the base's.
        """
        added = [self.bias, self.cross_out, self.dense, None if self.sparse is None else self.sparse.values]
        if self.rotate_in is not None:
            added.append(self.rotate_in - torch.eye(self.rotate_in.shape[1]))
        if self.scale_out is not None:
            added.append(self.scale_out - 1)
        product = self.a is not None and self.b is not None and bool(self.b.any())
        if self.activation is None and self.a is not None:
            product = product and bool(self.a.any())
        product = product and all(s is None or bool(s.any()) for s in (self.rank_scale, self.update_scale))
        changed = product or self.tokens is not None
        return not changed and not any(bool(t.any()) for t in added if t is not None)


@dataclass(frozen=True)
class Prompt:
    """Virtual tokens in front of a prompt: their keys and values, or what the base makes them of.

    Tensors are contiguous, on the CPU, float32; one of the two is there.
    """

    shape: tuple[int, int, int, int, int]  # of keys and values: layers, 2, tokens, kv_heads, head_dim
    kv: torch.Tensor | None = None  # of `shape`, keys as attention reads them: no RoPE is applied
    embeddings: torch.Tensor | None = None  # [tokens, hidden], the input of the first layer
    takes_positions: bool = True  # False: the prompt begins at position 0 all the same; only with `kv`

    @property
    def tokens(self) -> int:
        return self.shape[2]

    @property
    def num_elements(self) -> int:
        """Numbers stored: keys and values are, also when they are computed."""
        return math.prod(self.shape) + (0 if self.embeddings is None else self.embeddings.numel())


PRIMITIVES = (
    "low_rank",
    "shared_factors",
    "activation",
    "bias",
    "rotation",
    "input_scale",
    "output_scale",
    "output_rotation",
    "dense",
    "sparse",
    "token_rows",
)
KV_PREFIX, EMBEDDING_PREFIX = "kv_prefix", "embedding_prefix"  # the primitives of a `Prompt`

Portability = Literal["independent", "proportional"]
"""What becomes of an adapter on another quantization of its base. "independent": its change of the weights is
in the file. "proportional": it follows from the base's weights, so it carries their quantization noise."""


@dataclass(frozen=True)
class Program:
    """An adapter lowered to primitives."""

    kind: str
    sites: Mapping[str, SiteProgram]
    base_model: str = ""  # the base's name according to the adapter's config
    warnings: tuple[str, ...] = field(default=())
    portability: Portability = "independent"
    prompt: Prompt | None = None
    invocation: tuple[int, ...] = ()  # token ids; empty: it acts on every row
    tasks: int = 0  # how many the file has; this is one of them. 0: it knows no tasks
    span: Span | None = None  # it acts on the ends of a prompt alone
    tail: Mapping[str, SiteProgram] = field(default_factory=dict)  # at a prompt's last tokens instead
    error: float | None = None  # of a blend that was cut to a rank: what was lost of its products, relative

    @property
    def reach(self) -> Reach:
        """What the scheduler must know of it."""
        tokens = 0 if self.prompt is None else self.prompt.tokens
        placed = self.prompt is None or self.prompt.takes_positions
        return Reach(tokens, placed, self.invocation, self.span)

    @property
    def parts(self) -> tuple[SiteProgram, ...]:
        """What is at all the sites, those of the tail included."""
        return (*self.sites.values(), *self.tail.values())

    @property
    def rank(self) -> int:
        """The largest rank over the sites."""
        return max((site.rank for site in self.parts), default=0)

    def added_tokens(self, site: str, vocabulary: int) -> int:
        """How many tokens beyond the base's vocabulary have a row at the embedding or the output head."""
        found = self.sites.get(site)
        return 0 if found is None or found.tokens is None else int((found.tokens.ids >= vocabulary).sum())

    @property
    def primitives(self) -> tuple[str, ...]:
        used = frozenset[str]().union(*(site.primitives for site in self.parts))
        found = [name for name in PRIMITIVES if name in used]
        if self.prompt is not None:
            found.append(KV_PREFIX if self.prompt.embeddings is None else EMBEDDING_PREFIX)
        return tuple(found)

    @property
    def is_identity(self) -> bool:
        """True when nothing can change the output. Virtual tokens always can: they take part in attention."""
        return self.prompt is None and all(site.is_identity for site in self.parts)

    def num_bytes(self, itemsize: int) -> int:
        """Bytes on the device with numbers of `itemsize` bytes: over all sites, and of the virtual tokens.

        What is shared counts in full, once.
        """
        shared = shared_tensors(self)
        at_sites = sum(
            tensor.numel() * (itemsize if tensor.is_floating_point() else tensor.itemsize)
            for site in self.parts
            for tensor in site.tensors
            if id(tensor) not in shared
        )
        at_sites += itemsize * sum(tensor.numel() for tensor in shared.values())
        return at_sites + (0 if self.prompt is None else self.prompt.num_elements * itemsize)


def shared_tensors(program: Program) -> dict[int, torch.Tensor]:
    """The shared factors of a program, each once, by their ids."""
    parts = [part for part in program.parts if part.is_shared]
    return {id(tensor): tensor for part in parts for tensor in (part.a, part.b) if tensor is not None}
