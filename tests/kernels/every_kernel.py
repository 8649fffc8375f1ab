"""Launches every kernel on small odd shapes, for a memory checker: it has no assertions of its own.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python tests/kernels/every_kernel.py

Without torch's cache each tensor is an allocation of its own, so that a read one element too far is seen.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from veneer.kernels import (
    activation,
    attention,
    dense,
    epilogue,
    low_rank,
    nf4,
    norm,
    shared,
    sparse,
    token_rows,
    transform,
)
from veneer.kernels.nf4_layout import Nf4Codes, Nf4Weight, pack_nf4
from veneer.kernels.nf4_plan import Device, make_plan
from veneer.kernels.tables import (
    A_OFFSET,
    ACTIVATION,
    ACTIVATIONS,
    ALIGNED,
    B_OFFSET,
    BASE_SLOT,
    DENSE_OFFSET,
    DETAIL,
    GROUP,
    IN_BLOCK,
    IN_OFFSET,
    INNER_OFFSET,
    OUT_OFFSET,
    OUT_PAIR,
    RANK,
    RANK_SCALE,
    SPARSE_OFFSET,
    TOKENS,
    TOKENS_OFFSET,
    UPDATE_SCALE,
    AdapterTables,
    Segment,
    absent_entries,
    find_kin,
    int_elements,
)

BF16 = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def run_nf4() -> None:
    for outputs, inputs in ((70, 192), (130, 1088)):
        codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8, device="cuda")
        weight: Nf4Weight = pack_nf4(Nf4Codes(codes, torch.rand(outputs, inputs // 64, device="cuda")))
        for rows in (1, 3, 17, 50, 129, 300):
            nf4.nf4_matmul(random(rows, inputs), weight, random(outputs))
        for block_m in (16, 32, 64, 128):
            sizes = make_plan(37, outputs, inputs, Device(), block_m=block_m, splits=3)
            for plan in (sizes, replace(sizes, wgmma=False)) if block_m < 128 else (sizes,):
                nf4.nf4_matmul_triton(random(37, inputs), weight, sizes=plan)
    codes = torch.randint(16, (325, 192), dtype=torch.uint8, device="cuda")
    weight = pack_nf4(Nf4Codes(codes, torch.rand(325, 3, device="cuda")))
    for rows in (3, 40, 300):
        for widths in ((128, 128, 69), (256, 69), (100, 225)):
            nf4.nf4_grouped(random(len(widths), rows, 192), weight, widths)


def make_tables(ranks: list[int], sites: list[tuple[int, int]]) -> AdapterTables:
    """An arena that ends where the last scale ends. `sites` are (out, in); the first adapter scales in pairs."""
    entries = absent_entries(len(ranks), len(sites))
    at = 0
    for slot, rank in enumerate(ranks):
        for site, (outputs, inputs) in enumerate(sites):
            places = []
            for size in (rank * inputs, rank * outputs, outputs):
                places.append(at)
                at += -(-size // ALIGNED) * ALIGNED
            entries[slot, site, : RANK + 1] = torch.tensor([*places, rank])
            entries[slot, site, [OUT_OFFSET, OUT_PAIR]] = torch.tensor([at, 0 if slot else 8])
            at += -(-outputs * (1 if slot else 2) // ALIGNED) * ALIGNED
    return AdapterTables(random(at), entries.cuda(), entries)


def make_shared_tables(rank: int, sites: list[tuple[int, int]]) -> AdapterTables:
    """Two adapters that share A and B; the arena ends with the last factors of their own."""
    entries, sizes = absent_entries(2, len(sites)), list[int]()

    def place(size: int) -> int:
        sizes.append(-(-size // ALIGNED) * ALIGNED)
        return sum(sizes[:-1])

    for site, (outputs, inputs) in enumerate(sites):
        entries[:, site, RANK] = rank
        entries[:, site, A_OFFSET], entries[:, site, B_OFFSET] = place(rank * inputs), place(rank * outputs)
        for entry in entries[:, site]:
            entry[RANK_SCALE], entry[UPDATE_SCALE] = place(rank), place(outputs)
    kin = {slot: found for slot, each in enumerate(entries) if (found := find_kin(each))}
    return AdapterTables(random(sum(sizes)), entries.cuda(), entries, kin=kin)


def run_layer(rows: int, segments: list[Segment], ranks: list[int], is_shared: bool = False) -> None:
    """The epilogues of a layer with 4 heads, 2 key-value heads of 16, hidden size 72, MLP of 88."""
    hidden, inner, heads, kv_heads, head_dim = 72, 88, 4, 2, 16
    sites = [(64, hidden), (32, hidden), (32, hidden), (hidden, 64), (inner, hidden), (inner, hidden)]
    sites.append((hidden, inner))
    tables = make_shared_tables(ranks[0], sites) if is_shared else make_tables(ranks, sites)
    tiles = low_rank.make_tiles(segments, rows, len(ranks), torch.device("cuda"), kin=tables.kin)
    workspace = low_rank.Workspace(tables, rows, max(ranks))
    x, cos, sin = random(rows, hidden), random(rows, head_dim), random(rows, head_dim)
    caches = [torch.zeros(rows, 1, kv_heads, head_dim, dtype=BF16, device="cuda") for _ in range(2)]
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")

    def shrink(x: torch.Tensor, site: int, sites: int) -> None:
        low_rank.shrink(x, tables, tiles, site, sites, workspace)
        if is_shared:
            shared.scale_ranks(tables, tiles, site, sites, rows, workspace)

    for count, scaled in ((1, False), (3, False), (1, True), (3, True)):
        dtype = BF16 if count == 1 else torch.float32
        shrink(x, 0, 3)
        parts = random(count, rows, 128, dtype=dtype)
        weight = random(head_dim)
        epilogue.rope(
            parts, tables, tiles, 0, 3, workspace, heads, kv_heads, cos, sin, caches[0], caches[1], slots, None,
            weight, weight, 1e-6, scaled,
        )  # fmt: skip
        shrink(x, 4, 2)
        parts = random(count, rows, 2 * inner, dtype=dtype)
        epilogue.gated(parts, tables, tiles, 4, 2, workspace, "silu", scaled=scaled)
        shrink(random(rows, inner), 6, 1)
        parts = random(count, rows, hidden, dtype=dtype)
        epilogue.add_update(parts, tables, tiles, 6, workspace, residual=x, scaled=scaled)
    low_rank.low_rank(x, random(rows, 64), tables, tiles, 0, workspace)
    norm.rms_norm(x, random(hidden), 1e-5)


def run_transforms() -> None:
    """Blocks, pairs and features that are no multiples of the tiles; the arena ends with the last tensor."""
    for features, block, pair in ((72, 9, 12), (133, 7, 0), (320, 80, 320), (130, 1, 2)):
        entries = absent_entries(1, 2)  # the second is that of a site without anything
        start = -(-features * block // ALIGNED) * ALIGNED
        entries[0, 0, [IN_OFFSET, IN_BLOCK, OUT_OFFSET, OUT_PAIR]] = torch.tensor([0, block, start, pair])
        arena = random(start + (2 if pair else 1) * features)
        tables = AdapterTables(arena, entries.cuda(), entries)
        for rows in (3, 300):
            segments = [Segment(BASE_SLOT, 0, 1), Segment(0, 1, rows)]
            tiles = low_rank.make_tiles(segments, rows, 1, torch.device("cuda"))
            transform.transform_input(random(rows, features), tables, tiles, 0, 2)
            transform.transform_output(random(rows, features), tables, tiles, 0)


def run_activations() -> None:
    """One adapter of each kind, with ranks that are no multiples of the tiles; the arena ends with the last d."""
    inputs, outputs = 72, 40
    settings = {"softmax": (33, 11, 0), "arrow": (35, 4, 3), "fusion": (39, 6, 1)}
    kinds = [(kind, *settings.get(kind, (19, 0, 0))) for kind in ACTIVATIONS[1:]]
    entries = absent_entries(len(kinds), 1)
    at = 0
    for slot, (kind, rank, group, detail) in enumerate(kinds):
        places = []
        for size in (rank * inputs, rank * outputs, rank):
            places.append(at)
            at += -(-size // ALIGNED) * ALIGNED
        entries[slot, 0, [A_OFFSET, B_OFFSET, INNER_OFFSET, RANK]] = torch.tensor([*places, rank])
        entries[slot, 0, [ACTIVATION, GROUP, DETAIL]] = torch.tensor([ACTIVATIONS.index(kind), group, detail])
    tables = AdapterTables(random(at), entries.cuda(), entries)
    for each in (1, 30):
        segments = [Segment(slot, slot * each, (slot + 1) * each) for slot in range(len(kinds))]
        rows = segments[-1].stop + 1
        segments.append(Segment(BASE_SLOT, rows - 1, rows))
        tiles = low_rank.make_tiles(segments, rows, len(kinds), torch.device("cuda"), hidden=True)
        workspace = low_rank.Workspace(tables, rows, 39)
        low_rank.shrink(random(rows, inputs), tables, tiles, 0, 1, workspace)
        activation.activate(tables, tiles, 0, 1, rows, workspace)
        epilogue.add_update(random(1, rows, outputs), tables, tiles, 0, workspace)


def run_changes() -> None:
    """Dense and sparse changes and tokens' rows, of sizes that are no multiples of the tiles."""
    for outputs, inputs, entries_of_row in ((72, 133, 3), (130, 80, 11)):
        count = outputs * entries_of_row
        sizes = {
            DENSE_OFFSET: outputs * inputs,
            SPARSE_OFFSET: sparse.sparse_size(outputs, count, 2),
            TOKENS_OFFSET: int_elements(5, 2) + 5 * inputs,
            A_OFFSET: 5 * outputs,
            B_OFFSET: 5 * inputs,
        }
        entries = absent_entries(1, 1)
        entries[0, 0, [TOKENS, RANK]] = torch.tensor([5, 5])
        at = 0
        for column, size in sizes.items():
            entries[0, 0, column], at = at, at + -(-size // ALIGNED) * ALIGNED
        tables = AdapterTables(random(at), entries.cuda(), entries)
        place = int(entries[0, 0, SPARSE_OFFSET])
        starts = torch.arange(0, count + 1, entries_of_row, dtype=torch.int32)
        tables.ints[place // 2 : place // 2 + outputs + 1] = starts.cuda()
        place += int_elements(outputs + 1, 2)
        tables.ints[place // 2 : place // 2 + count] = torch.randint(inputs, (count,), device="cuda").int()
        place = int(entries[0, 0, TOKENS_OFFSET])
        own = [0, 3, outputs - 1, outputs, outputs + 1]  # the last two are added tokens
        tables.ints[place // 2 : place // 2 + 5] = torch.tensor(own, dtype=torch.int32, device="cuda")
        for rows in (3, 300):
            segments = [Segment(BASE_SLOT, 0, 1), Segment(0, 1, rows)]
            tiles = low_rank.make_tiles(segments, rows, 1, torch.device("cuda"), deltas=True)
            x, y, added = random(rows, inputs), random(rows, outputs), random(rows, 2)
            dense.add_dense(x, y, tables, tiles, 0)
            sparse.add_sparse(x, y, tables, tiles, 0)
            token_rows.token_logits(x, y, added, tables, tiles, 0)
            ids = torch.tensor(own, device="cuda")[torch.arange(rows, device="cuda") % 5]
            token_rows.embed_rows(ids, x, tables, tiles, 0, outputs)


def run_attention() -> None:
    heads, kv_heads, head_dim, page = 4, 2, 32, 4
    query_lens, kv_lens = [1, 1, 7, 33], [1, 29, 7, 40]
    pages = [-(-length // page) for length in kv_lens]
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, count in enumerate(pages):
        table[row, :count] = torch.arange(count) + sum(pages[:row])
    caches = [random(sum(pages), page, kv_heads, head_dim) for _ in range(2)]
    rows = sum(query_lens)
    batch = attention.PagedBatch(
        query_start=torch.tensor([0, 1, 2, 9, 42], dtype=torch.int32, device="cuda"),
        kv_len=torch.tensor(kv_lens, dtype=torch.int32, device="cuda"),
        block_table=table.cuda(),
        slot_mapping=torch.arange(rows, device="cuda"),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )
    new = random(rows, kv_heads, head_dim)
    attention.write_kv(new, new, caches[0], caches[1], batch.slot_mapping)
    for window in (None, 5):
        attention.paged_attention(
            random(rows, heads, head_dim), caches[0], caches[1], batch, 0.2, window, None
        )


def main() -> None:
    torch.manual_seed(0)
    run_nf4()
    run_layer(5, [Segment(BASE_SLOT, 0, 2), Segment(0, 2, 3), Segment(1, 3, 5)], [3, 40])
    run_layer(300, [Segment(BASE_SLOT, 0, 90), Segment(0, 90, 181), Segment(1, 181, 300)], [16, 17])
    run_layer(5, [Segment(BASE_SLOT, 0, 2), Segment(0, 2, 3), Segment(1, 3, 5)], [41, 41], is_shared=True)
    run_layer(300, [Segment(BASE_SLOT, 0, 90), Segment(0, 90, 181), Segment(1, 181, 300)], [41] * 2, True)
    run_transforms()
    run_activations()
    run_changes()
    run_attention()
    torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
