"""Programs laid out as one blob."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from veneer.adapters.arena import ALIGNMENT
from veneer.adapters.packing import pack, packed_size, shared_size
from veneer.adapters.program import Activation, Program, Prompt, Site, SiteProgram, SparseMatrix, TokenRows
from veneer.adapters.reach import Reach, Span
from veneer.errors import AdapterRefused
from veneer.kernels.tables import (
    A_OFFSET,
    ABSENT,
    ACTIVATION,
    ACTIVATIONS,
    B_OFFSET,
    COLUMNS,
    DETAIL,
    GROUP,
    IN_BLOCK,
    IN_OFFSET,
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

SITES = [Site("q", 24, 40), Site("k", 24, 16), Site("v", 24, 16), Site("o", 40, 24), Site("dense", 24, 8)]


def example() -> Program:
    torch.manual_seed(3)
    return Program(
        "lora",
        {
            "o": SiteProgram(bias=torch.randn(24)),
            "q": SiteProgram(torch.randn(5, 24), torch.randn(5, 40), torch.randn(40)),
            "v": SiteProgram(
                torch.randn(33, 24),
                torch.randn(33, 16),
                inner_bias=torch.randn(33),
                activation=Activation("arrow", group=10, count=3, top_k=2),
            ),
            "dense": SiteProgram(dense=torch.randn(8, 24)),
            "k": SiteProgram(
                rotate_in=torch.randn(3, 8, 8), scale_out=torch.randn(16), cross_out=torch.randn(16), pair=4
            ),
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_find_every_tensor_at_its_true_rank(dtype: torch.dtype) -> None:
    program = example()
    packed = pack(program, SITES, dtype, pin=False)
    assert packed.blob.dtype == dtype
    assert packed.entries.shape == (SLOTS_EACH, 5, COLUMNS)
    entries, tail = packed.entries
    assert torch.equal(tail, absent_entries(5))
    assert entries[:, RANK].tolist() == [5, 0, 33, 0, 0]
    assert entries[:, IN_BLOCK].tolist() == [0, 8, 0, 0, 0]
    assert entries[:, OUT_PAIR].tolist() == [0, 4, 0, 0, 0]
    assert entries[2, [ACTIVATION, GROUP, DETAIL]].tolist() == [ACTIVATIONS.index("arrow"), 10, 2]
    assert not entries[[0, 1, 3, 4]][:, [ACTIVATION, GROUP, DETAIL]].any()
    taken = 0
    for index, site in enumerate(SITES):
        part = program.sites.get(site.name, SiteProgram())
        turn = None if part.rotate_in is None else part.rotate_in - torch.eye(8)
        scales = None
        if part.scale_out is not None and part.cross_out is not None:
            scales = torch.stack((part.scale_out - 1, part.cross_out))
        stored = (
            part.a,
            part.b,
            part.bias,
            turn,
            scales,
            part.dense,
            None,
            None,
            part.inner_bias,
            None,
            None,
        )
        for offset, tensor in zip(entries[index, OFFSETS].tolist(), stored, strict=True):
            if tensor is None:
                assert offset == ABSENT
                continue
            assert offset % ALIGNMENT == 0
            found = packed.blob[offset : offset + tensor.numel()].view(tensor.shape)
            assert torch.equal(found, tensor.to(dtype))
            taken += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    assert packed.size == packed_size(program, dtype.itemsize) == taken  # nothing is padded to a largest rank
    assert packed.host_bytes == packed.blob.nbytes + packed.entries.nbytes


def test_bfloat16_holds_what_differs_from_the_identity() -> None:
    """1.001 itself would be rounded to 1."""
    part = SiteProgram(rotate_in=torch.full((24, 1, 1), 1.001), scale_out=torch.full((40,), 0.999))
    packed = pack(Program("ia3", {"q": part}), SITES, torch.bfloat16, pin=False)
    for column, size, change in ((IN_OFFSET, 24, 0.001), (OUT_OFFSET, 40, -0.001)):
        offset = int(packed.entries[0, 0, column])
        found = packed.blob[offset : offset + size].float()
        assert torch.allclose(found, torch.tensor(change), rtol=2**-8)


def test_primitives_and_identity() -> None:
    turn, ones = torch.eye(8).repeat(3, 1, 1), torch.ones(16)
    same = Program("x", {"k": SiteProgram(rotate_in=turn, scale_out=ones, cross_out=0 * ones, pair=2)})
    assert same.is_identity
    assert same.primitives == ("rotation", "output_rotation")
    assert same.num_bytes(2) == 2 * (3 * 64 + 32)
    for part, names in (
        (SiteProgram(rotate_in=2 * turn), ("rotation",)),
        (SiteProgram(rotate_in=torch.full((24, 1, 1), 0.5)), ("input_scale",)),
        (SiteProgram(scale_out=2 * ones), ("output_scale",)),
        (SiteProgram(scale_out=ones, cross_out=ones, pair=2), ("output_rotation",)),
        (SiteProgram(bias=ones), ("bias",)),
        (SiteProgram(torch.ones(2, 24), torch.ones(2, 16)), ("low_rank",)),
        (SiteProgram(dense=torch.ones(16, 24)), ("dense",)),
        (SiteProgram(sparse=matrix()), ("sparse",)),
        (SiteProgram(tokens=tokens()), ("token_rows",)),
    ):
        program = Program("x", {"k": part})
        assert not program.is_identity
        assert program.primitives == names


def matrix() -> SparseMatrix:
    """[16, 24] with 5 entries, in rows 0 and 3."""
    starts = torch.tensor([0, 2, 2, 2, *[5] * 13], dtype=torch.int32)
    return SparseMatrix(starts, torch.tensor([0, 23, 1, 2, 9], dtype=torch.int32), torch.arange(5) + 0.5)


def tokens() -> TokenRows:
    return TokenRows(torch.tensor([3, 40, 70_001], dtype=torch.int32), torch.arange(48.0).view(3, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_numbers_keep_their_bits(dtype: torch.dtype) -> None:
    program = Program("x", {"v": SiteProgram(sparse=matrix(), tokens=tokens())})
    packed = pack(program, SITES, dtype, pin=False)
    [sparse, rows] = packed.entries[0, 2, [SPARSE_OFFSET, TOKENS_OFFSET]].tolist()
    assert packed.entries[0, :, TOKENS].tolist() == [0, 0, 3, 0, 0]
    at = sparse
    for stored in (matrix().starts, matrix().columns):
        place = at * dtype.itemsize // 4
        assert packed.blob.view(torch.int32)[place : place + len(stored)].equal(stored)
        at += int_elements(len(stored), dtype.itemsize)
    assert packed.blob[at : at + 5].equal(matrix().values.to(dtype))
    place = rows * dtype.itemsize // 4
    assert packed.blob.view(torch.int32)[place : place + 3].equal(tokens().ids)
    at = rows + int_elements(3, dtype.itemsize)
    assert packed.blob[at : at + 48].equal(tokens().rows.flatten().to(dtype))
    assert packed.size == packed_size(program, dtype.itemsize)
    assert program.num_bytes(2) == (17 + 5 + 3) * 4 + (5 + 48) * 2


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (SiteProgram(dense=torch.ones(24, 16)), r"dense at v is \[24, 16\], not \[16, 24\]"),
        (SiteProgram(sparse=replace(matrix(), starts=matrix().starts[1:])), "sparse at v is"),
        (
            SiteProgram(sparse=replace(matrix(), starts=matrix().starts.flip(0))),
            "out of order or out of range",
        ),
        (SiteProgram(sparse=replace(matrix(), columns=matrix().columns + 1)), "out of order or out of range"),
        (SiteProgram(sparse=replace(matrix(), columns=matrix().columns - 1)), "out of order or out of range"),
        (
            SiteProgram(sparse=replace(matrix(), starts=matrix().starts.long())),
            "out of order or out of range",
        ),
        (SiteProgram(tokens=replace(tokens(), rows=torch.ones(3, 24))), "tokens at v are"),
        (SiteProgram(tokens=replace(tokens(), ids=tokens().ids.flip(0))), "must ascend"),
        (SiteProgram(tokens=replace(tokens(), ids=tokens().ids - 4)), "must ascend"),
    ],
)
def test_kernels_are_given_no_wrong_table(part: SiteProgram, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pack(Program("x", {"v": part}), SITES, torch.float32, pin=False)


def test_padding_is_zero() -> None:
    ones = Program("lora", {"k": SiteProgram(torch.ones(1, 24), torch.ones(1, 16))})
    assert pack(ones, SITES, torch.float32, pin=False).blob.sum() == 40


def test_entries_at_moves_only_what_is_there() -> None:
    packed = pack(example(), SITES, torch.float32, pin=False)
    before = packed.entries.clone()
    moved = packed.entries_at(1280)
    assert torch.equal(packed.entries, before)
    sizes = [RANK, IN_BLOCK, OUT_PAIR]
    assert torch.equal(moved[..., sizes], before[..., sizes])
    for was, now in zip(
        before[..., OFFSETS].flatten().tolist(), moved[..., OFFSETS].flatten().tolist(), strict=True
    ):
        assert now == (ABSENT if was == ABSENT else was + 1280)


def test_rank_zero_is_absent() -> None:
    empty = Program("lora", {"k": SiteProgram(torch.empty(0, 24), torch.empty(0, 16))})
    packed = pack(empty, SITES, torch.float32, pin=False)
    assert packed.size == 0
    assert torch.equal(packed.entries, absent_entries(SLOTS_EACH, 5))


def test_a_value_beyond_the_dtype_is_refused_by_site() -> None:
    program = Program("lora", {"v": SiteProgram(torch.full((2, 24), 1e5), torch.ones(2, 16))})
    with pytest.raises(AdapterRefused, match=r"at v .* 100000 .* 65504, .*torch\.float16.*--dtype"):
        pack(program, SITES, torch.float16, pin=False)
    assert pack(program, SITES, torch.bfloat16, pin=False).blob.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_overflowed_in_lowering_is_refused_in_every_dtype(dtype: torch.dtype) -> None:
    program = Program("ia3", {"v": SiteProgram(scale_out=torch.full((16,), float("inf")))})
    with pytest.raises(AdapterRefused, match="at v the adapter's numbers overflow float32"):
        pack(program, SITES, dtype, pin=False)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("nowhere", SiteProgram(bias=torch.ones(4)), "nowhere"),
        ("q", SiteProgram(torch.ones(2, 23), torch.ones(2, 40)), r"A at q is \[2, 23\], not \[2, 24\]"),
        ("q", SiteProgram(torch.ones(2, 24), torch.ones(3, 40)), r"B at q is \[3, 40\], not \[2, 40\]"),
        ("q", SiteProgram(bias=torch.ones(39)), r"bias at q is \[39\], not \[40\]"),
        ("q", SiteProgram(a=torch.ones(2, 24)), "q has only one of A and B"),
        ("q", SiteProgram(rotate_in=torch.ones(4, 5, 5)), r"blocks of 5; they must divide 24 and be at most"),
        ("q", SiteProgram(rotate_in=torch.ones(3, 6, 6)), r"rotate_in at q is \[3, 6, 6\], not \[4, 6, 6\]"),
        ("q", SiteProgram(scale_out=torch.ones(2)), r"scale_out at q is \[2\], not \[40\]"),
        ("q", SiteProgram(cross_out=torch.ones(40), pair=4), "q must have scale_out, cross_out and pair"),
        ("q", SiteProgram(scale_out=torch.ones(40), pair=4), "q must have scale_out, cross_out and pair"),
        (
            "q",
            SiteProgram(scale_out=torch.ones(40), cross_out=torch.ones(40), pair=6),
            "pair at q is 6; it must be even and divide 40",
        ),
    ],
)
def test_a_program_that_does_not_fit_the_sites_is_a_fault(name: str, part: SiteProgram, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(Program("lora", {name: part}), SITES, torch.float32, pin=False)


def activated(rank: int, activation: Activation | None, inner: int | None = None) -> SiteProgram:
    inner_bias = None if inner is None else torch.ones(inner)
    return SiteProgram(
        torch.ones(rank, 24), torch.ones(rank, 40), inner_bias=inner_bias, activation=activation
    )


FITTING = [
    activated(7, Activation("gelu_tanh"), 7),
    activated(12, Activation("softmax", group=4)),
    activated(12, Activation("arrow", group=3, count=3, top_k=3)),
    activated(14, Activation("fusion", group=3, count=2, inner="relu"), 14),
    activated(14, Activation("fusion", group=3, count=2)),
]


@pytest.mark.parametrize("part", FITTING)
def test_activations_that_fit_the_rank_are_packed(part: SiteProgram) -> None:
    packed = pack(Program("some", {"q": part}), SITES, torch.float32, pin=False)
    assert part.activation is not None
    assert packed.entries[0, 0, ACTIVATION] == ACTIVATIONS.index(part.activation.kind)


@pytest.mark.parametrize(
    "part",
    [
        activated(7, Activation("gelu", group=7)),
        activated(7, Activation("cubic")),
        activated(7, Activation("")),
        activated(12, Activation("softmax")),
        activated(12, Activation("softmax", group=5)),
        activated(12, Activation("softmax", group=4, count=3)),
        activated(12, Activation("arrow", group=3, count=3)),
        activated(12, Activation("arrow", group=3, count=3, top_k=4)),
        activated(12, Activation("arrow", group=2, count=4, top_k=-1)),
        activated(13, Activation("arrow", group=3, count=3, top_k=2)),
        activated(66, Activation("arrow", group=1, count=33, top_k=2)),
        activated(14, Activation("fusion", group=3, count=2, inner="softmax")),
        activated(14, Activation("fusion", group=3, count=2, top_k=1)),
        activated(15, Activation("fusion", group=3, count=2)),
        activated(7, Activation("gelu", inner="relu")),
    ],
)
def test_activations_that_do_not_fit_the_rank_are_a_fault(part: SiteProgram) -> None:
    with pytest.raises(ValueError, match=r"Activation\(.*\) at q does not fit rank \d+"):
        pack(Program("some", {"q": part}), SITES, torch.float32, pin=False)


def test_an_inner_bias_needs_an_activation_of_its_rank() -> None:
    with pytest.raises(ValueError, match="inner_bias at q needs an activation; fold"):
        pack(Program("some", {"q": activated(7, None, 7)}), SITES, torch.float32, pin=False)
    with pytest.raises(ValueError, match=r"inner_bias at q is \[6\], not \[7\]"):
        pack(Program("some", {"q": activated(7, Activation("relu"), 6)}), SITES, torch.float32, pin=False)


def test_nothing_of_weights_is_at_a_hidden_state() -> None:
    site = Site("hidden", 24, 24, is_hidden=True)
    with pytest.raises(ValueError, match="hidden is a hidden state, which has only A, B and bias"):
        pack(
            Program("some", {"hidden": SiteProgram(scale_out=torch.ones(24))}),
            [site],
            torch.float32,
            pin=False,
        )


def test_what_is_named_and_what_can_change_nothing() -> None:
    b = torch.ones(2, 40)
    sigmoid = SiteProgram(torch.zeros(2, 24), b, activation=Activation("sigmoid"))  # phi(0) is not 0
    assert Program("some", {"q": sigmoid}).primitives == ("low_rank", "activation")
    assert not sigmoid.is_identity
    assert SiteProgram(torch.zeros(2, 24), b).is_identity
    assert SiteProgram(torch.ones(2, 24), 0 * b, activation=Activation("sigmoid")).is_identity


SHAPE = (3, 2, 5, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_virtual_tokens_come_after_the_tensors_of_sites(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    kv, embeddings = torch.randn(SHAPE), torch.randn(5, 24)
    sites = example().sites
    plain = pack(Program("lora", sites), SITES, dtype, pin=False)
    for prompt in (Prompt(SHAPE, kv=kv), Prompt(SHAPE, embeddings=embeddings)):
        program = Program("both", sites, prompt=prompt)
        packed = pack(program, SITES, dtype, pin=False)
        assert tuple(packed.layout) == (packed.size, packed.prompt, Reach(virtual=5), (0, 0), None)
        assert packed.size == packed_size(program, dtype.itemsize)
        assert packed.entries.equal(plain.entries)
        assert packed.blob[: plain.size].equal(plain.blob)
        assert packed.prompt is not None
        arena = torch.cat([torch.full((48,), 7).to(dtype), packed.blob])
        found, inputs = packed.prompt.views(arena[48:])
        assert found.data_ptr() == arena[48 + plain.size :].data_ptr()
        if prompt.kv is not None:
            assert found.equal(kv.to(dtype))
            assert inputs is None
        else:
            assert found.equal(torch.zeros(SHAPE, dtype=dtype))
            assert inputs is not None
            assert inputs.equal(embeddings.to(dtype))
            assert (inputs.storage_offset() - 48) % ALIGNMENT == 0
            found.fill_(9)
            assert inputs.equal(embeddings.to(dtype))
    assert plain.prompt is None


def test_the_layout_says_where_the_adapter_acts() -> None:
    span = Span(3, 2, has_tail=True)
    unplaced = Prompt(SHAPE, kv=torch.ones(SHAPE), takes_positions=False)
    for program, reach in (
        (Program("plain", {}), Reach()),
        (Program("activated", {}, invocation=(4, 2)), Reach(invocation=(4, 2))),
        (Program("ends", {}, span=span), Reach(span=span)),
        (Program("prefix", {}, prompt=unplaced), Reach(virtual=5, virtual_positions=False)),
    ):
        assert pack(program, SITES, torch.float32, pin=False).layout.reach == reach


def test_a_tail_has_entries_of_its_own() -> None:
    torch.manual_seed(5)
    head = {"q": SiteProgram(torch.randn(2, 24), torch.randn(2, 40))}
    tail = {name: SiteProgram(torch.randn(3, 24), torch.randn(3, 16)) for name in ("k", "v")}
    program = Program("ends", head, span=Span(1, 1, has_tail=True), tail=tail)
    assert (program.rank, program.num_bytes(4)) == (3, 4 * (2 * 64 + 2 * 3 * 40))
    packed = pack(program, SITES, torch.float32, pin=False)
    assert packed.size == packed_size(program, 4)
    assert packed.entries[:, :, RANK].tolist() == [[2, 0, 0, 0, 0], [0, 3, 3, 0, 0]]
    at = int(packed.entries[1, 2, OFFSETS[0]])
    assert packed.blob[at : at + 72].view(3, 24).equal(tail["v"].tensors[0])
    assert not Program("ends", {}, tail=tail).is_identity
    with pytest.raises(ValueError, match="nowhere"):
        pack(Program("ends", {}, tail={"nowhere": tail["k"]}), SITES, torch.float32, pin=False)


def test_virtual_tokens_must_fit_type_and_shape() -> None:
    prompt = Prompt(SHAPE, embeddings=torch.full((5, 24), 1e6))
    with pytest.raises(AdapterRefused, match="in its virtual tokens the adapter's largest value 1e\\+06"):
        pack(Program("prompt", {}, prompt=prompt), SITES, torch.float16, pin=False)
    with pytest.raises(ValueError, match=r"\[5, 3, 2, 2, 8\], not \[3, 2, 5, 2, 8\]"):
        pack(
            Program("prefix", {}, prompt=Prompt(SHAPE, kv=torch.zeros(5, 3, 2, 2, 8))),
            SITES,
            torch.float32,
            pin=False,
        )


def test_shared_factors_are_a_blob_of_their_own_with_a_key_of_their_content() -> None:
    torch.manual_seed(5)
    a, b = torch.randn(3, 24), torch.randn(3, 16)

    def program(scale: float, a: torch.Tensor = a, both: bool = True) -> Program:
        part = SiteProgram(
            a, b, rank_scale=torch.full((3,), scale), update_scale=torch.full((16,), 1 - scale)
        )
        return Program("vera", {"k": part, **({"v": part} if both else {})})

    first, second = (pack(program(scale), SITES, torch.bfloat16, pin=False) for scale in (0.25, 0.5))
    assert first.shared is not None
    assert second.shared is not None
    assert first.shared.key == second.shared.key
    assert first.shared.blob.numel() == shared_size(program(0.0), 2) == 2 * ALIGNMENT  # once for both sites
    assert first.size == packed_size(program(0.0), 2) == 4 * ALIGNMENT
    assert program(0.0).num_bytes(2) == 2 * (3 * 24 + 3 * 16 + 2 * (3 + 16))
    entries = first.entries_at(1024, 4096)
    assert torch.equal(entries[0, 1, [A_OFFSET, B_OFFSET]], entries[0, 2, [A_OFFSET, B_OFFSET]])
    for blob, start, column, tensor in (
        (first.shared.blob, 4096, A_OFFSET, a),
        (first.shared.blob, 4096, B_OFFSET, b),
        (first.blob, 1024, RANK_SCALE, torch.full((3,), 0.25)),
        (first.blob, 1024, UPDATE_SCALE, torch.full((16,), 0.75)),
    ):
        at = int(entries[0, 2, column]) - start
        assert blob[at : at + tensor.numel()].equal(tensor.flatten().bfloat16())
    other = pack(program(0.25, a + 1), SITES, torch.bfloat16, pin=False)
    assert other.shared is not None
    assert other.shared.key != first.shared.key
    alone = pack(program(0.25, both=False), SITES, torch.bfloat16, pin=False)
    assert alone.shared is not None
    assert alone.shared.key == first.shared.key
    assert pack(example(), SITES, torch.float32, pin=False).shared is None


def test_folded_is_the_same_product_with_nothing_shared() -> None:
    torch.manual_seed(6)
    a, b, c, d = torch.randn(3, 24), torch.randn(3, 16), torch.randn(3), torch.randn(16)
    part = SiteProgram(a, b, rank_scale=c, update_scale=d)
    folded, x = part.folded(), torch.randn(24)
    assert part.primitives == {"low_rank", "shared_factors"}
    assert folded.primitives == {"low_rank"}
    assert folded.a is not None
    assert folded.b is not None
    torch.testing.assert_close(x @ folded.a.T @ folded.b, d * ((c * (a @ x)) @ b))
    assert folded.folded() is folded
    for zero in (replace(part, rank_scale=0 * c), replace(part, update_scale=0 * d)):
        assert zero.is_identity
    assert not part.is_identity


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"rank_scale": torch.ones(2)}, "rank_scale at k"),
        ({"update_scale": torch.ones(24)}, "update_scale at k"),
        ({"update_scale": None}, "or neither scale"),
        ({"a": None, "b": None, "rank_scale": torch.ones(0)}, "or neither scale"),
        ({"activation": Activation("relu")}, "without activation"),
    ],
)
def test_scales_belong_to_a_product(part: dict[str, Any], named: str) -> None:
    whole = SiteProgram(
        torch.ones(3, 24), torch.ones(3, 16), rank_scale=torch.ones(3), update_scale=torch.ones(16)
    )
    with pytest.raises(ValueError, match=named):
        pack(Program("x", {"k": replace(whole, **part)}), SITES, torch.float32, pin=False)
