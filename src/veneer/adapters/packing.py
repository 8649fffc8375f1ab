"""Lays the tensors of an adapter out as one blob, so that loading it is one copy to the device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from veneer.adapters.arena import align
from veneer.adapters.program import (
    EMBEDDING,
    HEAD,
    Program,
    Prompt,
    Site,
    SiteProgram,
    SparseMatrix,
    TokenRows,
    shared_tensors,
)
from veneer.adapters.reach import EVERYWHERE, Reach
from veneer.errors import AdapterRefused
from veneer.kernels.tables import (
    A_OFFSET,
    ABSENT,
    ACTIVATION,
    ACTIVATIONS,
    B_OFFSET,
    BIAS_OFFSET,
    DENSE_OFFSET,
    DETAIL,
    ELEMENTWISE,
    GROUP,
    IN_BLOCK,
    IN_OFFSET,
    INNER_OFFSET,
    MAX_BLOCK,
    MAX_CHOICES,
    OFFSETS,
    OUT_OFFSET,
    OUT_PAIR,
    RANK,
    RANK_SCALE,
    SLOTS_EACH,
    SPARSE_OFFSET,
    TOKENS,
    TOKENS_OFFSET,
    UPDATE_SCALE,
    absent_entries,
    int_elements,
)


class PackedPrompt(NamedTuple):
    """Where the virtual tokens of an adapter lie: keys and values (zeros while not computed), then embeddings."""

    start: int  # elements from the start of the blob
    shape: tuple[int, int, int, int, int]  # of keys and values: layers, 2, tokens, kv_heads, head_dim
    hidden: int  # size of an embedding; 0 when the adapter brings keys and values

    def views(self, blob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values [layers, 2, tokens, kv_heads, head_dim] and embeddings [tokens, hidden] in a blob."""
        rest = blob[self.start :]
        kv, tokens = math.prod(self.shape), self.shape[2]
        embeddings = rest[align(kv) :][: tokens * self.hidden].view(tokens, -1) if self.hidden else None
        return rest[:kv].view(self.shape), embeddings


class AddedTokens(NamedTuple):
    """How many tokens beyond the base's vocabulary an adapter has, and how many of these have logits."""

    embeddings: int = 0
    logits: int = 0


NONE_ADDED = AddedTokens()


@dataclass(frozen=True)
class SharedFactors:
    """A and B that several adapters have, in host memory as they will lie in the arena, once for all of them."""

    key: str  # a digest of the content
    blob: torch.Tensor  # as an adapter's

    @property
    def host_bytes(self) -> int:
        return _host_bytes(self.blob)


class SharedLayout(NamedTuple):
    """What must be known of shared factors to place them."""

    key: str
    size: int  # elements, a multiple of the alignment


class Layout(NamedTuple):
    """What must be known of an adapter to place and run it."""

    size: int  # elements of its own, a multiple of the alignment
    prompt: PackedPrompt | None
    reach: Reach = EVERYWHERE
    added: AddedTokens = NONE_ADDED
    shared: SharedLayout | None = None


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in host memory as it will lie in the arena, at its true ranks."""

    blob: torch.Tensor  # [elements] of the engine's dtype, pinned when it goes to a GPU
    entries: torch.Tensor  # int64 [SLOTS_EACH, sites, COLUMNS], of kernels/tables.py, offsets from the blob
    prompt: PackedPrompt | None = None
    reach: Reach = EVERYWHERE
    added: AddedTokens = NONE_ADDED
    shared: SharedFactors | None = None  # where A and B are for which the entries have scales

    @property
    def layout(self) -> Layout:
        shared = None if self.shared is None else SharedLayout(self.shared.key, self.shared.blob.numel())
        return Layout(self.size, self.prompt, self.reach, self.added, shared)

    @property
    def size(self) -> int:
        """Elements of its own, a multiple of the alignment."""
        return self.blob.numel()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory of its own."""
        return _host_bytes(self.blob) + self.entries.nbytes

    def entries_at(self, start: int, shared_start: int = 0) -> torch.Tensor:
        """The entries for a blob that lies at `start` in the arena, int64 [SLOTS_EACH, sites, COLUMNS].

        Its shared factors, if it has some, lie at `shared_start`.
        """
        moved = self.entries.clone()
        offsets = moved[..., OFFSETS]
        moved[..., OFFSETS] = offsets + (offsets != ABSENT) * start
        is_shared = self.entries[..., RANK_SCALE] != ABSENT
        for column in (A_OFFSET, B_OFFSET):
            moved[..., column] += is_shared * (shared_start - start)
        return moved


def _host_bytes(blob: torch.Tensor) -> int:
    """PyTorch takes pinned memory in powers of two, and they count in full."""
    return 1 << (blob.nbytes - 1).bit_length() if blob.is_pinned() else blob.nbytes


def shared_size(program: Program, itemsize: int) -> int:
    """The same as `packed_size` of the factors that it shares with other programs; 0 when it shares none."""
    return sum(align(_room(tensor, itemsize)) for tensor in shared_tensors(program).values())


def packed_size(program: Program, itemsize: int) -> int:
    """Elements of `itemsize` bytes that `pack` will take for itself, known before anything is allocated."""
    at_sites = sum(
        align(sum(_room(tensor, itemsize) for tensor in tensors))
        for site in program.parts
        for _, tensors in _tensors(site)
    )
    return at_sites + _prompt_size(program.prompt)


def pack(program: Program, sites: Sequence[Site], dtype: torch.dtype, pin: bool) -> PackedAdapter:
    """Copy a program into a zeroed blob, what it shares into another; each tensor aligned, converted to `dtype`.

    `sites` are the base's, in the order of the tables. Raises `AdapterRefused` for a value that `dtype` cannot
    hold, and ValueError for a program that does not fit the sites: that is a fault of the method that made it.
    """
    if unknown := {*program.sites, *program.tail} - {site.name for site in sites}:
        raise ValueError(f"the program has tensors at {sorted(unknown)}, which the base does not have")
    blob = torch.zeros(packed_size(program, dtype.itemsize), dtype=dtype, pin_memory=pin)
    entries = absent_entries(SLOTS_EACH, len(sites))
    shared, places = _pack_shared(program, dtype, pin)
    offset = 0
    for parts, table in zip((program.sites, program.tail), entries, strict=True):
        for index, site in enumerate(sites):
            if part := parts.get(site.name):
                offset = _pack_site(part, site, table[index], blob, offset, places)
    prompt = _pack_prompt(program.prompt, blob, offset)
    vocabulary = next((site.out_features for site in sites if site.name == HEAD), 0)
    added = AddedTokens(*(program.added_tokens(site, vocabulary) for site in (EMBEDDING, HEAD)))
    return PackedAdapter(blob, entries, prompt, program.reach, added, shared)


def _pack_shared(
    program: Program, dtype: torch.dtype, pin: bool
) -> tuple[SharedFactors | None, dict[int, int]]:
    """The shared factors, if there are some, and where in their blob each tensor lies, by its id."""
    tensors = shared_tensors(program)
    if not tensors:
        return None, {}
    blob = torch.zeros(shared_size(program, dtype.itemsize), dtype=dtype, pin_memory=pin)
    places, offset = {}, 0
    for name, tensor in tensors.items():
        places[name] = offset
        offset = _put_all((tensor,), blob, offset, "in its shared projections")
    return SharedFactors(hashlib.sha256(blob.view(torch.uint8).numpy().data).hexdigest(), blob), places


def _pack_site(
    part: SiteProgram,
    site: Site,
    entry: torch.Tensor,
    blob: torch.Tensor,
    offset: int,
    shared: Mapping[int, int],
) -> int:
    """Write the tensors from `offset` on, and where they lie into `entry`; returns the offset after them.

    `shared` are the places of tensors that lie elsewhere, by their ids.
    """
    _check_shapes(part, site)
    if part.is_shared:
        entry[A_OFFSET], entry[B_OFFSET] = shared[id(part.a)], shared[id(part.b)]
    entry[RANK], entry[OUT_PAIR] = part.rank, part.pair
    entry[IN_BLOCK] = 0 if part.rotate_in is None else part.rotate_in.shape[1]
    entry[TOKENS] = 0 if part.tokens is None else len(part.tokens.ids)
    if (found := part.activation) is not None:
        numbers = (ACTIVATIONS.index(found.kind), found.group, found.detail)
        entry[[ACTIVATION, GROUP, DETAIL]] = torch.tensor(numbers)
    for column, tensors in _tensors(part):
        entry[column] = offset
        offset = _put_all(tensors, blob, offset, f"at {site.name}")
    return offset


def _put_all(tensors: Sequence[torch.Tensor], blob: torch.Tensor, offset: int, where: str) -> int:
    """Put tensors one after the other, the next free alignment comes back. int32 keep their bits."""
    start = offset
    for tensor in tensors:
        room = _room(tensor, blob.itemsize)
        target = blob[offset : offset + room]
        if tensor.is_floating_point():
            _put(tensor, target[: tensor.numel()], where)
        else:
            target.view(torch.int32)[: tensor.numel()] = tensor
        offset += room
    return start + align(offset - start)


def _room(tensor: torch.Tensor, itemsize: int) -> int:
    """Elements of `itemsize` bytes that a tensor takes where another one follows."""
    return tensor.numel() if tensor.is_floating_point() else int_elements(tensor.numel(), itemsize)


def _put(tensor: torch.Tensor, target: torch.Tensor, where: str) -> None:
    """Convert a tensor into its part of a blob. Raises `AdapterRefused` when a value does not fit."""
    target.copy_(tensor.reshape(-1))
    if target.isfinite().all():
        return
    if not tensor.isfinite().all():  # what a method computed of finite numbers
        raise AdapterRefused(f"{where} the adapter's numbers overflow float32; its values are too large.")
    raise AdapterRefused(
        f"{where} the adapter's largest value {tensor.abs().max().item():.6g} is beyond "
        f"{torch.finfo(target.dtype).max:.6g}, the largest that the server's {target.dtype} holds; "
        "serve with --dtype float32"
    )


def _prompt_size(prompt: Prompt | None) -> int:
    if prompt is None:
        return 0
    embeddings = 0 if prompt.embeddings is None else prompt.embeddings.numel()
    return align(math.prod(prompt.shape)) + align(embeddings)


def _pack_prompt(prompt: Prompt | None, blob: torch.Tensor, start: int) -> PackedPrompt | None:
    if prompt is None:
        return None
    packed = PackedPrompt(start, prompt.shape, 0 if prompt.embeddings is None else prompt.embeddings.shape[1])
    kv, embeddings = packed.views(blob)
    for tensor, target in ((prompt.kv, kv), (prompt.embeddings, embeddings)):
        if tensor is not None and target is not None:
            if tensor.shape != target.shape:
                raise ValueError(f"a prompt's tensor is {list(tensor.shape)}, not {list(target.shape)}")
            _put(tensor, target.view(-1), "in its virtual tokens")
    return packed


def _tensors(part: SiteProgram) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """The tensors of the adapter's own as they are stored, those of each column of the tables together."""
    turn, scale = part.rotate_in, part.scale_out
    if turn is not None:
        turn = turn - torch.eye(turn.shape[1])
    if scale is not None:
        scale = torch.stack([scale - 1] if part.cross_out is None else [scale - 1, part.cross_out])
    columns = (A_OFFSET, B_OFFSET, BIAS_OFFSET, INNER_OFFSET, IN_OFFSET, OUT_OFFSET, DENSE_OFFSET)
    factors = (None, None) if part.is_shared else (part.a, part.b)
    single = (
        *factors,
        part.bias,
        part.inner_bias,
        turn,
        scale,
        part.dense,
        part.rank_scale,
        part.update_scale,
    )
    for column, tensor in zip((*columns, RANK_SCALE, UPDATE_SCALE), single, strict=True):
        if tensor is not None and tensor.numel():
            yield column, (tensor,)
    if part.sparse is not None:
        yield SPARSE_OFFSET, (part.sparse.starts, part.sparse.columns, part.sparse.values)
    if part.tokens is not None:
        yield TOKENS_OFFSET, (part.tokens.ids, part.tokens.rows)


def check_site(part: SiteProgram, site: Site) -> None:
    """Raise ValueError unless the program fits the site. For tensors that come from outside as they are."""
    _check_shapes(part, site)


def _check_shapes(part: SiteProgram, site: Site) -> None:
    """Kernels trust the tables: a wrong shape would read another adapter's memory."""
    of_weights = (part.rotate_in, part.scale_out, part.dense, part.sparse, part.tokens)
    if site.is_hidden and any(each is not None for each in of_weights):
        raise ValueError(f"{site.name} is a hidden state, which has only A, B and bias")
    rank, block = part.rank, 1 if part.rotate_in is None else part.rotate_in.shape[-1]
    if site.in_features % block or block > MAX_BLOCK:
        raise ValueError(
            f"rotate_in at {site.name} has blocks of {block}; they must divide {site.in_features} and be at "
            f"most {MAX_BLOCK}"
        )
    wanted = {
        "A": (part.a, (rank, site.in_features)),
        "B": (part.b, (rank, site.out_features)),
        "bias": (part.bias, (site.out_features,)),
        "inner_bias": (part.inner_bias, (rank,)),
        "rotate_in": (part.rotate_in, (site.in_features // block, block, block)),
        "scale_out": (part.scale_out, (site.out_features,)),
        "cross_out": (part.cross_out, (site.out_features,)),
        "dense": (part.dense, (site.out_features, site.in_features)),
        "rank_scale": (part.rank_scale, (rank,)),
        "update_scale": (part.update_scale, (site.out_features,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} at {site.name} is {list(tensor.shape)}, not {list(shape)}")
    if (part.a is None) != (part.b is None):
        raise ValueError(f"{site.name} has only one of A and B")
    if part.is_shared != (part.update_scale is not None) or (part.is_shared and not rank):
        raise ValueError(f"{site.name} must have A, B, rank_scale and update_scale, or neither scale")
    if part.is_shared and (part.activation is not None or site.is_hidden or site.name == EMBEDDING):
        raise ValueError(
            f"{site.name} has scales, which are for products at linear layers without activation"
        )
    paired = part.cross_out is not None
    if (paired and part.scale_out is None) or paired != (part.pair > 0):
        raise ValueError(f"{site.name} must have scale_out, cross_out and pair, or no cross_out and no pair")
    if paired and (part.pair % 2 or site.out_features % part.pair):
        raise ValueError(
            f"pair at {site.name} is {part.pair}; it must be even and divide {site.out_features}"
        )
    _check_activation(part, site)
    if part.sparse is not None:
        _check_sparse(part.sparse, site)
    if part.tokens is not None:
        _check_tokens(part.tokens, site)


def _check_sparse(matrix: SparseMatrix, site: Site) -> None:
    starts, columns, values = matrix.starts, matrix.columns, matrix.values
    if starts.shape != (site.out_features + 1,) or columns.shape != values.shape or columns.ndim != 1:
        shapes = [list(each.shape) for each in (starts, columns, values)]
        raise ValueError(
            f"sparse at {site.name} is {shapes}, not [{site.out_features + 1}] and two of a length"
        )
    whole = {starts.dtype, columns.dtype} == {torch.int32}
    ordered = (
        whole and bool((starts.diff() >= 0).all()) and [int(starts[0]), int(starts[-1])] == [0, len(columns)]
    )
    if not ordered or ((columns < 0) | (columns >= site.in_features)).any():
        raise ValueError(f"sparse at {site.name} has starts or columns out of order or out of range")


def _check_tokens(tokens: TokenRows, site: Site) -> None:
    hidden = site.in_features if site.name == HEAD else site.out_features
    ids = tokens.ids
    if tokens.rows.shape != (len(ids), hidden) or ids.dtype != torch.int32 or not len(ids):
        raise ValueError(f"tokens at {site.name} are {list(ids.shape)} and {list(tokens.rows.shape)}")
    if int(ids[0]) < 0 or not (ids.diff() > 0).all():
        raise ValueError(f"the ids of tokens at {site.name} must ascend from 0 or more")


def _check_activation(part: SiteProgram, site: Site) -> None:
    """The fields of an activation say which ranks a kernel reads."""
    found, rank = part.activation, part.rank
    if found is None:
        if part.inner_bias is not None:
            raise ValueError(f"inner_bias at {site.name} needs an activation; fold B^T d into bias")
        return
    sizes: dict[str, int] = dict.fromkeys(ELEMENTWISE[1:], rank) | {
        "softmax": rank // max(found.group, 1) * found.group,
        "arrow": found.count * (1 + found.group),
        "fusion": found.count * (1 + 2 * found.group),
    }
    chooses, elementwise = found.kind in ("arrow", "fusion"), found.kind in ELEMENTWISE
    wrong = (
        rank == 0
        or sizes.get(found.kind) != rank
        or (found.group > 0) == elementwise
        or (found.count > 0) != chooses
        or found.count > MAX_CHOICES
        or not (found.kind == "arrow") <= found.top_k <= (found.count if found.kind == "arrow" else 0)
        or found.inner not in (ELEMENTWISE if found.kind == "fusion" else ("",))
    )
    if wrong:
        raise ValueError(f"{found} at {site.name} does not fit rank {rank}")
