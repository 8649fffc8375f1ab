"""Programs laid out as one blob."""

from __future__ import annotations

import pytest
import torch

from veneer.adapters.arena import ALIGNMENT
from veneer.adapters.packing import pack, packed_size
from veneer.adapters.program import Program, Site, SiteProgram
from veneer.errors import AdapterRefused
from veneer.kernels.tables import ABSENT, RANK

SITES = [Site("q", 24, 40), Site("k", 24, 16), Site("v", 24, 16), Site("o", 40, 24)]


def example() -> Program:
    torch.manual_seed(3)
    return Program(
        "lora",
        {
            "o": SiteProgram(bias=torch.randn(24)),
            "q": SiteProgram(torch.randn(5, 24), torch.randn(5, 40), torch.randn(40)),
            "v": SiteProgram(torch.randn(33, 24), torch.randn(33, 16)),
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_find_every_tensor_at_its_true_rank(dtype: torch.dtype) -> None:
    program = example()
    packed = pack(program, SITES, dtype, pin=False)
    assert packed.blob.dtype == dtype
    assert packed.entries.shape == (4, 4)
    assert packed.entries[:, RANK].tolist() == [5, 0, 33, 0]
    taken = 0
    for index, site in enumerate(SITES):
        part = program.sites.get(site.name, SiteProgram())
        for offset, tensor in zip(
            packed.entries[index, :RANK].tolist(), (part.a, part.b, part.bias), strict=True
        ):
            if tensor is None:
                assert offset == ABSENT
                continue
            assert offset % ALIGNMENT == 0
            found = packed.blob[offset : offset + tensor.numel()].view(tensor.shape)
            assert torch.equal(found, tensor.to(dtype))
            taken += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    assert packed.size == packed_size(program) == taken  # nothing is padded to a largest rank
    assert packed.host_bytes == packed.blob.nbytes + packed.entries.nbytes


def test_padding_is_zero() -> None:
    ones = Program("lora", {"k": SiteProgram(torch.ones(1, 24), torch.ones(1, 16))})
    assert pack(ones, SITES, torch.float32, pin=False).blob.sum() == 40


def test_entries_at_moves_only_what_is_there() -> None:
    packed = pack(example(), SITES, torch.float32, pin=False)
    before = packed.entries.clone()
    moved = packed.entries_at(1280)
    assert torch.equal(packed.entries, before)
    assert torch.equal(moved[:, RANK], before[:, RANK])
    for was, now in zip(before[:, :RANK].flatten().tolist(), moved[:, :RANK].flatten().tolist(), strict=True):
        assert now == (ABSENT if was == ABSENT else was + 1280)


def test_rank_zero_is_absent() -> None:
    empty = Program("lora", {"k": SiteProgram(torch.empty(0, 24), torch.empty(0, 16))})
    packed = pack(empty, SITES, torch.float32, pin=False)
    assert packed.size == 0
    assert packed.entries[1].tolist() == [ABSENT, ABSENT, ABSENT, 0]


def test_a_value_beyond_the_dtype_is_refused_by_site() -> None:
    program = Program("lora", {"v": SiteProgram(torch.full((2, 24), 1e5), torch.ones(2, 16))})
    with pytest.raises(AdapterRefused, match=r"at v .* 100000 .* 65504, .*torch\.float16.*--dtype"):
        pack(program, SITES, torch.float16, pin=False)
    assert pack(program, SITES, torch.bfloat16, pin=False).blob.isfinite().all()


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("nowhere", SiteProgram(bias=torch.ones(4)), "nowhere"),
        ("q", SiteProgram(torch.ones(2, 23), torch.ones(2, 40)), r"A at q is \[2, 23\], not \[2, 24\]"),
        ("q", SiteProgram(torch.ones(2, 24), torch.ones(3, 40)), r"B at q is \[3, 40\], not \[2, 40\]"),
        ("q", SiteProgram(bias=torch.ones(39)), r"bias at q is \[39\], not \[40\]"),
        ("q", SiteProgram(a=torch.ones(2, 24)), "q has only one of A and B"),
    ],
)
def test_a_program_that_does_not_fit_the_sites_is_a_fault(name: str, part: SiteProgram, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(Program("lora", {name: part}), SITES, torch.float32, pin=False)
