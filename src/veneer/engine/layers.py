"""The places where requests differ inside the base's forward pass: linear layers, embedding and attention.

The base stays transformers' own model. Its linear layers are wrapped by `AdaptedLinear`, its embedding by
`AdaptedEmbedding`, its attention goes
through `paged_attention_forward` (registered with transformers' AttentionInterface). Both read the step's
tables from one `StepContext`, which the runner fills before each forward. Layers of packed NF4 also have a fused
form (fused.py), which reads the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from veneer.engine.packed import FusedPart
from veneer.kernels.attention import PagedBatch, paged_attention, write_kv
from veneer.kernels.dense import add_dense
from veneer.kernels.low_rank import Workspace, low_rank
from veneer.kernels.sparse import add_sparse
from veneer.kernels.tables import AdapterTables, RowTiles
from veneer.kernels.token_rows import embed_rows, token_logits
from veneer.kernels.transform import transform_input, transform_output

ATTENTION_NAME = "veneer_paged"


@dataclass
class StepContext:
    """What the layers need to know of the current step. One per base; its tensors are static on CUDA."""

    tables: AdapterTables | None = None
    rows: RowTiles | None = None  # rows of the hidden states
    head_rows: RowTiles | None = None  # rows of the output head (one for each sampled sequence)
    workspace: Workspace | None = None
    kv_cache: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # by layer
    batch: PagedBatch | None = None
    heads_sites: Sequence[int] = ()  # by layer, the site of its attention heads; empty where there are none
    added: torch.Tensor | None = None  # [rows, tokens], logits of tokens that adapters add
    fused: bool = True  # whether layers that have a fused form may run it
    # In a step of a merged copy (hot.py), by site what computes in place of the base's linear: no row has a slot.
    copy: Mapping[int, nn.Module] | None = None

    @property
    def runs_fused(self) -> bool:
        """Whether they run it in this step: all that the fused form leaves out stands here."""
        rows = self.rows
        return self.fused and rows is not None and not (rows.deltas or rows.hidden)


class AdaptedLinear(nn.Module):
    """A frozen linear layer of the base with each row's own adapter.

    y = OUT(W0 x' + b) + B^T phi(A x + d) + beta + D x. adapters/program.py says what x', OUT, phi and D are; A and
    D read the x that came in.

    Attributes:
        base: the layer as loaded (nn.Linear, or bitsandbytes' 4- or 8-bit layer); y = W0 x + b.
        site: its index in `Base.sites`, which is its row in the adapter tables.
    """

    def __init__(self, base: nn.Module, site: int, context: StepContext, *, is_head: bool) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.is_head = is_head
        self.step = context

    @property
    def weight(self) -> Any:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.step.head_rows if self.is_head else self.step.rows
        if rows is None or not rows.adapted:
            linear = self.base if self.step.copy is None else self.step.copy.get(self.site, self.base)
            plain: torch.Tensor = linear(x)
            return plain
        tables, workspace = self.step.tables, self.step.workspace
        assert tables is not None  # the runner sets all three
        assert workspace is not None
        flat = x.reshape(-1, x.shape[-1])
        turned = rows.turned(self.site)
        y = self._turned(flat, tables, rows).view(*x.shape[:-1], -1) if turned else self.base(x)
        out: torch.Tensor = y.view(-1, y.shape[-1])
        if rows.scaled(self.site):
            transform_output(out, tables, rows, self.site)
        low_rank(flat, out, tables, rows, self.site, workspace)
        dense, sparse = tables.delta_at(rows.segments, self.site) if rows.deltas else (False, False)
        if dense:
            add_dense(flat, out, tables, rows, self.site)
        if sparse:
            add_sparse(flat, out, tables, rows, self.site)
        if self.is_head and tables.has_tokens(rows.segments, self.site):
            assert self.step.added is not None
            token_logits(flat, out, self.step.added, tables, rows, self.site)
        return y

    def _turned(self, x: torch.Tensor, tables: AdapterTables, rows: RowTiles) -> torch.Tensor:
        """W0 x' + b [rows, out]."""
        (turned,) = transform_input(x.contiguous(), tables, rows, self.site)
        found: torch.Tensor = (
            self.base.alone(turned) if isinstance(self.base, FusedPart) else self.base(turned)
        )
        return found


class AdaptedEmbedding(nn.Module):
    """The frozen embedding of the base; tokens for which a row's adapter has its own, or an update, get that.

    Attributes:
        base: the layer as loaded, nn.Embedding or one that also scales.
        site: its index in the adapter tables.
    """

    def __init__(self, base: nn.Embedding, site: int, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.step = context

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[1, rows] -> [1, rows, hidden]."""
        rows, tables, vocabulary = self.step.rows, self.step.tables, self.base.num_embeddings
        if (
            rows is None
            or tables is None
            or not (rows.adapted and tables.has_tokens(rows.segments, self.site))
        ):
            plain: torch.Tensor = self.base(ids)
            return plain
        found: torch.Tensor = self.base(ids.clamp(max=vocabulary - 1))  # tokens of adapters may lie beyond
        flat = found.view(-1, found.shape[-1])
        embed_rows(ids.reshape(-1), flat, tables, rows, self.site, vocabulary)
        return found


def paged_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed ragged batch over the paged KV cache.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim], after RoPE.
    Returns [1, tokens, heads, head_dim]. The mask is implied by the step's tables. An adapter's part at the heads
    is added to it.
    """
    step: StepContext = module.veneer_step  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    assert step.batch is not None
    k_cache, v_cache = step.kv_cache[layer]
    write_kv(_rows(key), _rows(value), k_cache, v_cache, step.batch.slot_mapping)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows = _rows(query)
    out = paged_attention(rows, k_cache, v_cache, step.batch, scale, sliding_window, softcap)
    if step.rows is not None and step.rows.hidden and step.heads_sites:
        add_hidden(rows.flatten(1), out.flatten(1), step, step.heads_sites[layer])
    return out.unsqueeze(0), None


def add_hidden(x: torch.Tensor, y: torch.Tensor, step: StepContext, site: int) -> None:
    """Add the adapters' parts at a hidden state to y [rows, out], in place; x: [rows, in], contiguous."""
    tables, rows, workspace = step.tables, step.rows, step.workspace
    assert tables is not None  # the runner sets all three
    assert rows is not None
    assert workspace is not None
    if tables.hidden_at(rows.segments, site):
        low_rank(x, y, tables, rows, site, workspace)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, head_dim] -> contiguous [tokens, heads, head_dim]."""
    return x.squeeze(0).transpose(0, 1).contiguous()


AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
