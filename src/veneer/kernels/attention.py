"""Paged attention of a ragged batch: decode rows and prefill chunks of many sequences in one call.

Query i of a sequence stands at position p = kv_len - query_len + i and sees the keys j with

    j <= p    and, with a sliding window,    p - j < window

    out = softmax(cap(scale q k^T)) v    with cap(z) = softcap tanh(z / softcap) when there is a softcap

Keys and values are in pages that a block table lists for each sequence. Slots past kv_len may hold anything,
NaN included: a page keeps what its last owner wrote. Groups of query heads share a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from veneer.kernels.attention_plan import KeyGroup, key_groups, plan
from veneer.kernels.backend import launch_options, resolve


@dataclass(frozen=True)
class PagedBatch:
    """Where a step's rows, keys and values are. Sequences without queries pad a batch and are skipped.

    The host lists choose the launch. A captured graph keeps its launch, so there they are the bounds it was
    captured with and only the tensors' contents change.
    """

    query_start: torch.Tensor  # int32 [sequences + 1], first row of each sequence
    kv_len: torch.Tensor  # int32 [sequences], keys including the new tokens
    block_table: torch.Tensor  # int32 [sequences, pages], any strides
    slot_mapping: torch.Tensor  # int32 or int64 [rows], page * page_size + offset of each new token
    query_lens: Sequence[int]  # host
    kv_lens: Sequence[int]  # host
    _groups: dict[tuple[int, int | None], list[KeyGroup]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def groups(self, page_size: int, window: int | None) -> list[KeyGroup]:
        """The torch path's gathers, built by the first layer of a step and used by the others."""
        key = (page_size, window)
        if key not in self._groups:
            self._groups[key] = key_groups(
                self.query_lens, self.kv_lens, self.block_table.long(), page_size, window
            )
        return self._groups[key]


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store the new tokens' k and v [rows, kv_heads, head_dim] at their slots of the caches.

    Every slot must be valid: rows that pad a captured graph point into a page set aside for them.
    """
    slots = slot_mapping.long()
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slots, v)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend from q [rows, heads, head_dim] to the caches [pages, page_size, kv_heads, head_dim].

    Returns [rows, heads, head_dim]; rows of no sequence are left unwritten. Raises ValueError when the
    shapes do not fit each other.
    """
    run = paged_attention_triton if resolve(q.device).name == "triton" else paged_attention_torch
    return run(q, k_cache, v_cache, batch, scale, window, softcap)


def paged_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Reference of `paged_attention`, and what CPU serving runs.

    Decode rows of similar length share one gather and one call; each prefill chunk has its own. The heads of
    a group are rows of their key-value head (decode) or see an expanded view of it (prefill).
    """
    _check(q, k_cache, v_cache)
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    for group in batch.groups(k_cache.shape[1], window):
        keys, values = (
            cache.view(-1, kv_heads, head_dim).index_select(0, group.slots) for cache in (k_cache, v_cache)
        )
        queries = q[group.rows].view(-1, kv_heads, heads // kv_heads, head_dim)
        if group.decode:  # [sequences, kv_heads, group or keys, head_dim]
            keys, values = (
                side.view(queries.shape[0], -1, kv_heads, head_dim).transpose(1, 2) for side in (keys, values)
            )
            result = _attend(queries, keys, values, group.mask, scale, softcap)
        else:  # [kv_heads, group, queries or keys, head_dim]
            queries = queries.permute(1, 2, 0, 3)
            keys, values = (
                side.transpose(0, 1).unsqueeze(1).expand(-1, queries.shape[1], -1, -1)
                for side in (keys, values)
            )
            result = _attend(queries, keys, values, group.mask, scale, softcap).permute(2, 0, 1, 3)
        out[group.rows] = result.flatten(1, 2)
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    score = (q @ k.transpose(-1, -2)).float() * scale
    score = (softcap * torch.tanh(score / softcap)).masked_fill(~mask, float("-inf"))
    return torch.softmax(score, -1).to(v.dtype) @ v


def paged_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`paged_attention` in Triton: decode rows split over their keys, prefill chunks in tiles of queries."""
    from veneer.kernels.jit.attention import attend, merge

    _check(q, k_cache, v_cache)
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    sequences = len(batch.query_lens)
    for decode in (True, False):
        lens = [length for length in batch.query_lens if length > 0 and (length == 1) == decode]
        if not lens:
            continue
        sizes = plan(
            decode, sequences, max(lens), max(batch.kv_lens), heads, kv_heads, head_dim, q.element_size()
        )
        partial = stats = out
        if sizes.splits > 1:
            shape = (sequences, heads, sizes.splits)
            partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
            stats = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
        attend[(sequences, kv_heads, sizes.programs)](
            q,
            k_cache,
            v_cache,
            out,
            partial,
            stats,
            batch.query_start,
            batch.kv_len,
            batch.block_table,
            scale,
            window or 0,
            softcap or 0.0,
            q.stride(0),
            q.stride(1),
            *batch.block_table.stride(),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            DECODE=decode,
            WINDOWED=window is not None,
            SOFTCAPPED=softcap is not None,
            SPLITS=sizes.splits,
            BLOCK_M=sizes.block_m,
            BLOCK_Q=sizes.block_q,
            BLOCK_N=sizes.block_n,
            BLOCK_D=sizes.block_d,
            num_warps=sizes.num_warps,
            num_stages=2,
            **launch_options(q.device),
        )
        if sizes.splits > 1:
            merge[(sequences, heads)](
                out,
                partial,
                stats,
                batch.query_start,
                HEADS=heads,
                HEAD_DIM=head_dim,
                SPLITS=sizes.splits,
                BLOCK_D=sizes.block_d,
                **launch_options(q.device),
            )
    return out


def _check(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    if k_cache.shape != v_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous and of one shape")
    if q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"q {list(q.shape)} does not fit a cache of {list(k_cache.shape)}")
    if q.shape[2] > 256 or q.shape[2] % 16 or q.stride(2) != 1:
        raise ValueError(f"head_dim {q.shape[2]} must be a multiple of 16 up to 256, with stride 1")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"q is {q.dtype}, the caches {k_cache.dtype} and {v_cache.dtype}; all must be the same"
        )
