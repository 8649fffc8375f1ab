"""NF4: the layout against bitsandbytes, the byte permutes bit by bit, the matmul against float64."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import triton
import triton.language  # before the patch: only our own kernels are to be interpreted
from numpy.typing import NDArray
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from veneer.kernels.nf4 import (
    dequantize_nf4,
    nf4_grouped,
    nf4_grouped_torch,
    nf4_matmul,
    nf4_matmul_torch,
    nf4_matmul_triton,
    nf4_planes,
)
from veneer.kernels.nf4_layout import (
    NF4,
    STORED,
    Nf4Codes,
    Nf4Weight,
    codebook,
    pack_nf4,
    pair_table,
    permute_tables,
    read_bitsandbytes,
    unpack_nf4,
)
from veneer.kernels.nf4_plan import FUSED_ROWS, Device, Nf4Plan, make_plan, plan

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.nf4  # noqa: F401

DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
interpreted = pytest.mark.skipif(
    CUDA, reason="kernels are compiled where there is a GPU, and run there by the gpu tests"
)
NF4_ROUNDING = 1.6 * 2**-9  # of the 16 values in bf16
ABSMAX_ROUNDING = 2**-11  # half a unit in the last place of float16, relative to the smallest significand


@dataclass(frozen=True)
class Case:
    rows: int
    outputs: int
    inputs: int
    bias: bool = False


SMALL = [
    Case(0, 64, 64),
    Case(1, 64, 64),
    Case(1, 128, 128, True),
    Case(3, 1, 64, True),
    Case(17, 130, 192),
    Case(16, 200, 576, True),
    Case(65, 70, 320, True),
]
LARGE = [
    Case(1, 6144, 4096),
    Case(16, 4096, 14336, True),
    Case(33, 28672, 4096),
    Case(64, 4097, 4160, True),
    Case(100, 576, 1536),
    Case(128, 49152, 576, True),
    Case(129, 1000, 4096, True),
    Case(777, 4096, 576),
]


def random_codes(outputs: int, inputs: int, seed: int = 0, device: str = DEVICE) -> Nf4Codes:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (outputs, inputs), generator=random, dtype=torch.uint8)
    absmax = torch.rand(outputs, inputs // 64, generator=random) * 0.1 + 1e-3
    return Nf4Codes(codes.to(device), absmax.to(device))


def random_inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(case.rows, case.inputs, generator=random)
    bias = torch.randn(case.outputs, generator=random)
    return x.to(DEVICE, dtype), bias.to(DEVICE, dtype) if case.bias else None


def assert_close(
    actual: torch.Tensor,
    x: torch.Tensor,
    weight: Nf4Weight,
    bias: torch.Tensor | None,
    rms: float,
    worst: float,
) -> None:
    """Limits the root mean square and the worst element of the error, relative to the outputs' RMS."""
    expected = x.double() @ unpack_nf4(weight, torch.float64).T
    expected += 0 if bias is None else bias.double()
    if not expected.numel():
        return
    error, scale = (actual.double() - expected).abs(), expected.square().mean().sqrt()
    assert error.square().mean().sqrt() <= rms * scale
    assert (error / expected.abs().clamp(min=float(scale))).max() <= worst


def poisoned(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Output rows within guard rows, all NaN."""
    return torch.full((case.rows + 2, case.outputs), math.nan, dtype=dtype, device=DEVICE)


def ids(case: Case) -> str:
    return f"{case.rows}x{case.outputs}x{case.inputs}{'+bias' if case.bias else ''}"


# The layout


def test_layout_is_the_fragment_of_the_matrix_unit() -> None:
    plain = random_codes(192, 192, device="cpu")
    weight = pack_nf4(plain)
    assert list(weight.packed.shape) == [4, 2, 2, 128, 4]  # 192 rows are padded to 256, 3 blocks to 4
    random = np.random.default_rng(0)
    for _ in range(2000):
        tile, pair, half, lane, word, nibble = (int(random.integers(size)) for size in (3, 2, 2, 128, 4, 8))
        c, h, d = nibble & 1, nibble >> 1 & 1, nibble >> 2
        row = tile * 64 + lane // 32 * 16 + lane % 32 // 4 + 8 * h
        column = pair * 128 + half * 64 + word * 16 + lane % 4 * 2 + c + 8 * d
        label = int(weight.packed[tile, pair, half, lane, word]) >> (4 * nibble) & 15
        expected = int(plain.codes[row, column]) if column < 192 else 7
        assert STORED[label] == expected


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (64, 64), (130, 192), (2050, 128)])
def test_unpacking_gives_back_the_packed_weight(outputs: int, inputs: int) -> None:
    plain = random_codes(outputs, inputs)
    values = torch.tensor(NF4, device=DEVICE).bfloat16().double()[plain.codes.long()]
    expected = values * plain.absmax.double().repeat_interleave(64, 1)
    actual = unpack_nf4(pack_nf4(plain), torch.float64)
    assert actual.shape == (outputs, inputs)
    assert ((actual - expected).abs() <= ABSMAX_ROUNDING * expected.abs()).all()


@pytest.mark.parametrize("nested", [False, True])
def test_error_against_bitsandbytes_is_about_one_rounding(nested: bool) -> None:
    random = torch.Generator().manual_seed(0)
    dense = (torch.randn(320, 512, generator=random) * 0.02).bfloat16().to(DEVICE)
    data, state = bnb.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=nested)
    weight = pack_nf4(read_bitsandbytes(data, state))
    theirs = bnb.dequantize_4bit(data, state).double()
    ours = unpack_nf4(weight, torch.float64)
    bound = NF4_ROUNDING + ABSMAX_ROUNDING + 2**-8  # the last is bitsandbytes' rounding to bf16
    assert ((ours - theirs).abs() <= bound * theirs.abs()).all()
    assert (ours - theirs).square().mean().sqrt() <= 2**-8 * theirs.square().mean().sqrt()
    state.dtype = torch.float32  # bitsandbytes without its rounding
    exact = bnb.dequantize_4bit(data, state).double()
    assert ((ours - exact).abs() <= (NF4_ROUNDING + ABSMAX_ROUNDING) * exact.abs()).all()


def test_weights_of_any_magnitude_keep_their_precision() -> None:
    for scale in (1e-30, 1e-6, 1.0, 1e6, 1e30):
        plain = random_codes(64, 64)
        plain = Nf4Codes(plain.codes, plain.absmax * scale)
        values = torch.tensor(NF4, device=DEVICE).bfloat16().double()[plain.codes.long()]
        expected = values * plain.absmax.double()
        actual = unpack_nf4(pack_nf4(plain), torch.float64)
        assert ((actual - expected).abs() <= ABSMAX_ROUNDING * expected.abs()).all()
    zero = pack_nf4(Nf4Codes(plain.codes, plain.absmax * 0))
    assert (unpack_nf4(zero, torch.float32) == 0).all()


def test_what_cannot_be_packed_is_refused() -> None:
    dense = torch.randn(64, 64, device=DEVICE).bfloat16()
    with pytest.raises(ValueError, match="the weight is fp4 in blocks of 64"):
        read_bitsandbytes(*bnb.quantize_4bit(dense, blocksize=64, quant_type="fp4"))
    with pytest.raises(ValueError, match="nf4 in blocks of 128"):
        read_bitsandbytes(*bnb.quantize_4bit(dense, blocksize=128, quant_type="nf4"))
    with pytest.raises(ValueError, match="in_features is 96"):
        read_bitsandbytes(
            *bnb.quantize_4bit(dense[:, :32].repeat(1, 3).contiguous(), blocksize=64, quant_type="nf4")
        )
    plain = random_codes(64, 64)
    with pytest.raises(ValueError, match=r"absmax \[64, 2\]"):
        pack_nf4(Nf4Codes(plain.codes, plain.absmax.repeat(1, 2)))
    with pytest.raises(ValueError, match="all must be finite"):
        pack_nf4(Nf4Codes(plain.codes, plain.absmax * math.inf))


# The byte permutes

Words = NDArray[np.uint32]


def prmt(low: Words, high: Words, selector: Words) -> Words:
    """PTX's prmt.b32 in its default mode, as its manual defines it."""
    source = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(selector)
    for byte in range(4):
        pick = selector >> np.uint32(4 * byte) & np.uint32(15)
        value = (source >> (pick & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(
            np.uint32
        ) & np.uint32(255)
        sign = np.where(value >> np.uint32(7) == 1, np.uint32(255), np.uint32(0))
        result |= np.where(pick >= 8, sign, value).astype(np.uint32) << np.uint32(8 * byte)
    return result


def run_ptx(source: str, registers: dict[str, Words], shared: Words | None = None) -> dict[str, Words]:
    """Executes the few instructions that the decodes are made of."""
    shared = np.zeros(0, np.uint32) if shared is None else shared
    for line in source.replace("{\n", "").splitlines():
        instruction, _, rest = line.strip().rstrip(";").partition(" ")
        if instruction in ("", "}", ".reg"):
            continue
        if rest.startswith("{"):  # mov.b32 {low, high}, word
            halves, word = rest[1:].split("}, ")
            low, high = halves.split(", ")
            registers[low], registers[high] = (
                registers[word] & np.uint32(0xFFFF),
                registers[word] >> np.uint32(16),
            )
            continue
        target, *operands = rest.split(", ")
        values = [
            registers[name]
            if name in registers
            else np.full_like(registers["$8"], 0 if name[0] == "[" else int(name, 0))
            for name in operands
        ]
        match instruction:
            case "mov.b32":
                registers[target] = values[0]
            case "xor.b32":
                registers[target] = values[0] ^ values[1]
            case "shr.u32":
                registers[target] = values[0] >> values[1]
            case "prmt.b32":
                registers[target] = prmt(*values)
            case "mad.lo.u32":
                registers[target] = values[0] * values[1] + values[2]
            case "ld.shared.b32":
                registers[target] = shared[registers[operands[0].strip("[]")] // np.uint32(4)]
            case _:
                raise AssertionError(line)
    return registers


def test_both_decodes_are_right_for_all_codes_at_all_places() -> None:
    """Runs the PTX itself on every pair of neighbouring nibbles at every place, among random others."""
    from veneer.kernels.jit.nf4 import DECODE
    from veneer.kernels.jit.nf4_matmul import LOOK_UP

    random = np.random.default_rng(0)
    words = random.integers(0, 1 << 32, 8 * 256, dtype=np.uint32)
    for index in range(words.size):
        place, pair = np.uint32(index // 256 * 4), index % 256
        both = np.uint32(pair) << place | (np.uint32(pair) >> (np.uint32(32) - place) if place > 24 else 0)
        keep = np.uint32(0xFF) << place | (np.uint32(0xFF) >> (np.uint32(32) - place) if place > 24 else 0)
        words[index] = words[index] & ~np.uint32(keep) | np.uint32(both)
    tables = permute_tables(torch.device("cpu"))
    assert (tables == tables[:, :1]).all()
    registers = {"$8": words}
    registers |= {
        f"${9 + index}": np.full_like(words, np.uint32(int(tables[index, 0]) & 0xFFFFFFFF))
        for index in range(8)
    }
    permuted = run_ptx(DECODE.value, registers)
    lane = random.integers(0, 32, words.size).astype(np.uint32)
    entries = pair_table(torch.device("cpu")).numpy().view(np.uint32)
    shared = np.zeros((256, 32), np.uint32)
    shared[:] = entries[:, None]
    looked_up = run_ptx(LOOK_UP.value, {"$8": words, "$9": lane * np.uint32(4)}, shared.reshape(-1))
    bits = codebook(torch.bfloat16, torch.device("cpu")).view(torch.int16).numpy().astype(np.uint16)
    for nibble in range(8):
        expected = bits[words >> np.uint32(4 * nibble) & np.uint32(15)]
        assert (permuted[f"${nibble}"] == expected).all()
        assert (looked_up[f"${nibble}"] == expected).all()


def test_stored_labels_are_a_permutation_whose_halves_agree_in_signs() -> None:
    assert sorted(STORED) == list(range(16))
    bits = codebook(torch.bfloat16, torch.device("cpu")).view(torch.int16).int()
    assert ((bits[:8] ^ bits[8:]) & 0x8080 == 0).all()
    assert torch.equal(
        codebook(torch.float32, torch.device("cpu")), torch.tensor(NF4)[list(STORED)].bfloat16().float()
    )


# The compiled code, for which no GPU is needed


CHOSEN = [plan(rows, 4096, 4096, Device()) for rows in (16, 32, 64, 128)]
WITHOUT_WGMMA = [plan(rows, 4096, 4096, Device(132, False, False)) for rows in (16, 32, 64)]


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [*((sizes, 1) for sizes in CHOSEN + WITHOUT_WGMMA), *((sizes, 3) for sizes in CHOSEN)],
    ids=lambda s: f"{s.block_m}-{s.dependent_launch}" if isinstance(s, Nf4Plan) else str(s),
)
def test_every_plan_compiles_and_keeps_weights_in_registers(
    sizes: Nf4Plan, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights reach the matrix unit without shared memory, products overlap, and enough programs fit.

    It depends on how Triton lowers join, reshape and permute, and on what ptxas makes of it: no result shows it.
    """
    from veneer.kernels.jit.nf4_matmul import matmul

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, some versions of Triton warn
    constants = {"TILES": sizes.tiles, "BLOCK_M": sizes.block_m, "STAGES": sizes.stages, "EVEN": True}
    constants |= {"HAS_BIAS": False, "LOOKUP": sizes.lookup, "WGMMA": sizes.wgmma}
    constants |= {"PDL": sizes.dependent_launch, "GROUPS": groups}
    pointers = {"x": "*bf16", "packed": "*i32", "scales": "*i32", "tables": "*i32", "bias": "*bf16"}
    pointers |= {"out": "*fp32"}
    signature = {
        name: "constexpr"
        if name in constants
        else pointers.get(name, "fp32" if name == "multiplier" else "i32")
        for name in matmul.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(matmul.arg_names)
        if name in pointers or name in ("in_features", "out_features", "pairs")
    }
    places = {(matmul.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        GluonASTSource(matmul, signature, places, aligned),
        target=GPUTarget("cuda", 90 if sizes.dependent_launch else 80, 32),
        options={"num_warps": sizes.warps},
    )
    loop = compiled.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    assert loop.count("warp_group_dot " if sizes.wgmma else "tt.dot ") == 2
    assert "local_alloc" not in loop
    assert "local_store" not in loop
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    cuobjdump = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", tmp_path / "kernel.cubin"]
    code = subprocess.run(cuobjdump, capture_output=True, text=True, check=True).stdout
    # ptxas waits after every product when it cannot tell that they may overlap.
    assert not sizes.wgmma or 4 * code.count("WARPGROUP.DEPBAR") <= code.count("HGMMA")
    registers = int(re.search(r"REG:(\d+)", code)[1])  # type: ignore[index]
    programs = ({32: 2, 64: 2, 128: 2} if sizes.wgmma else {16: 4, 32: 3, 64: 2})[sizes.block_m]
    assert registers * 32 * sizes.warps * programs <= 1 << 16
    shared = compiled.metadata.shared + (32768 if sizes.lookup else 0)
    assert shared * programs <= 227 << 10
    # A launch with a static table opts in to more than 48 KiB only when what is allocated dynamically needs it.
    assert not sizes.lookup or shared <= 48 << 10 or compiled.metadata.shared > 48 << 10


# The matmul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_torch_path_matches_float64(case: Case, dtype: torch.dtype) -> None:
    x, bias = random_inputs(case, dtype)
    weight = pack_nf4(random_codes(case.outputs, case.inputs))
    rms, worst = (1e-6, 1e-5) if dtype == torch.float32 else (2**-8, 2**-7)
    assert_close(nf4_matmul_torch(x, weight, bias), x, weight, bias, rms, worst)


GROUPED = [
    (3, (128, 128, 72)),
    (1, (256, 64)),
    (17, (100, 30)),
    (20, (64, 192)),
    (300, (128, 64, 70)),
    (0, (64,)),
]


@pytest.mark.parametrize(
    "run", [nf4_grouped_torch, pytest.param(nf4_grouped, marks=[pytest.mark.gpu, needs_cuda])]
)
@pytest.mark.parametrize(("rows", "widths"), GROUPED, ids=str)
def test_groups_have_inputs_of_their_own(
    run: Callable[..., torch.Tensor], rows: int, widths: tuple[int, ...]
) -> None:
    """On a GPU in one launch where groups begin with a program's tiles, and in one for each where they do not."""
    x = torch.randn(len(widths), rows, 192, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    codes = random_codes(sum(widths), 192)
    found = run(x, pack_nf4(codes), widths)
    assert found.shape[1:] == (rows, sum(widths))
    starts = [sum(widths[:group]) for group in range(len(widths))]
    for each, start, width, columns in zip(
        x, starts, widths, torch.split(found, list(widths), -1), strict=True
    ):
        part = Nf4Codes(codes.codes[start : start + width], codes.absmax[start : start + width])
        rounding = 4e-3 if CUDA else 1e-6
        assert_close(columns.double().sum(0), each, pack_nf4(part), None, rounding, 8 * rounding)


def test_groups_that_do_not_fit_are_refused() -> None:
    weight = pack_nf4(random_codes(128, 64))
    for shape, widths in (((2, 1, 64), (64, 32)), ((1, 1, 64), (64, 64)), ((4, 1, 64), (32,) * 4)):
        with pytest.raises(ValueError, match="for at most 3 groups of 128 features in all"):
            nf4_grouped(torch.zeros(shape, dtype=DTYPE, device=DEVICE), weight, widths)


def plans(case: Case) -> Iterator[Nf4Plan]:
    for tiles, block_m, splits in ((1, 16, 1), (2, 16, 2), (1, 32, None), (1, 64, 3), (2, 128, 2)):
        sizes = make_plan(
            case.rows, case.outputs, case.inputs, Device(), tiles=tiles, block_m=block_m, splits=splits
        )
        yield sizes
        yield replace(sizes, dependent_launch=False)
        if block_m <= 64:
            yield replace(sizes, wgmma=False)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("case", SMALL + LARGE, ids=ids)
def test_compiled_triton_matches_float64(case: Case) -> None:
    """The output is rounded to bf16 once; over 16 rows multiply weights that were rounded to bf16 as well."""
    x, bias = random_inputs(case, torch.bfloat16)
    weight = pack_nf4(random_codes(case.outputs, case.inputs))
    guarded = poisoned(case, torch.bfloat16)
    nf4_matmul(x, weight, bias, guarded[1:-1])
    assert_close(guarded[1:-1], x, weight, bias, 2.5e-3 if case.rows <= 16 else 4e-3, 2e-2)
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()


@pytest.mark.gpu
@needs_cuda
def test_every_plan_gives_the_same_within_rounding() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("plans with wgmma need compute capability 9")
    for case in (Case(48, 320, 1088, True), Case(130, 130, 1536), Case(3, 4160, 192)):
        x, bias = random_inputs(case, torch.bfloat16)
        weight = pack_nf4(random_codes(case.outputs, case.inputs))
        for sizes in plans(case):
            out = torch.full((case.rows, case.outputs), math.nan, dtype=torch.bfloat16, device=DEVICE)
            nf4_matmul_triton(x, weight, bias, out, sizes=sizes)
            assert_close(out, x, weight, bias, 4e-3 if sizes.wgmma else 2.5e-3, 2e-2)


@pytest.mark.gpu
@needs_cuda
def test_compiled_dequantize_is_the_reference_bit_for_bit() -> None:
    for outputs, inputs in ((64, 64), (130, 192), (4096, 4096)):
        weight = pack_nf4(random_codes(outputs, inputs))
        out = torch.full((outputs, inputs), math.nan, dtype=torch.bfloat16, device=DEVICE)
        dequantize_nf4(weight, out)
        assert torch.equal(out, unpack_nf4(weight, torch.bfloat16))


@interpreted
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (130, 192)])
def test_interpreted_dequantize_is_the_reference(outputs: int, inputs: int) -> None:
    weight = pack_nf4(random_codes(outputs, inputs))
    out = torch.full((outputs, inputs), math.nan)
    dequantize_nf4(weight, out)
    assert torch.equal(out, unpack_nf4(weight, torch.float32))


KERNELS: list[Callable[..., torch.Tensor]] = [nf4_matmul_torch, *([nf4_matmul_triton] if CUDA else [])]
DTYPE = torch.bfloat16 if CUDA else torch.float32


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_do_not_influence_each_other(kernel: Callable[..., torch.Tensor]) -> None:
    case = Case(5, 96, 192)
    x, _ = random_inputs(case, DTYPE)
    weight = pack_nf4(random_codes(case.outputs, case.inputs))
    whole = kernel(x, weight)
    x[2] = math.nan
    broken = kernel(x, weight)
    assert broken[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(broken[others], whole[others])


@pytest.mark.gpu
@needs_cuda
def test_planes_add_up_to_the_product() -> None:
    case = Case(4, 70, 576)
    x, _ = random_inputs(case, DTYPE)
    weight = pack_nf4(random_codes(case.outputs, case.inputs))
    sizes = make_plan(4, 70, 576, Device(), block_m=16, splits=3)
    planes = nf4_planes(x, weight, sizes)
    assert planes.shape == (3, 4, 70)
    assert planes.dtype == torch.float32
    assert_close(planes.sum(0), x, weight, None, 1e-6, 1e-5)
    with pytest.raises(ValueError, match="makes no planes"):
        nf4_planes(x, weight, Nf4Plan(fused=False))


def test_many_rows_use_the_given_scratch() -> None:
    case = Case(FUSED_ROWS + 1, 70, 128, True)
    x, bias = random_inputs(case, DTYPE)
    weight = pack_nf4(random_codes(case.outputs, case.inputs))
    scratch = torch.full((70 * 128 + 5,), math.nan, dtype=DTYPE, device=DEVICE)
    rounding = 4e-3 if CUDA else 1e-6
    out = nf4_matmul_triton(x, weight, bias, scratch=scratch)
    assert_close(out, x, weight, bias, rounding, 8 * rounding)
    assert torch.equal(scratch[:-5].view(70, 128), unpack_nf4(weight, DTYPE))
    assert scratch[-5:].isnan().all()
    with pytest.raises(ValueError, match="at least 8960 elements"):
        nf4_matmul_triton(x, weight, scratch=scratch[:100])


def test_arguments_that_do_not_fit_are_refused() -> None:
    weight = pack_nf4(random_codes(64, 128))
    x = torch.zeros(4, 128, dtype=DTYPE, device=DEVICE)
    with pytest.raises(ValueError, match=r"must be contiguous \[rows, 128\]"):
        nf4_matmul(x[:, :64], weight)
    with pytest.raises(ValueError, match=r"the bias is \[128\]"):
        nf4_matmul(x, weight, x[0])
    with pytest.raises(ValueError, match=r"out is \[4, 128\]"):
        nf4_matmul(x, weight, out=x)
    with pytest.raises(ValueError, match=r"out is \[4, 128\]"):
        dequantize_nf4(weight, x)


# The plan

LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


@pytest.mark.parametrize(("outputs", "inputs"), [*LLAMA, (64, 64), (49152, 576), (576, 1536)])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 128])
@pytest.mark.parametrize("device", [Device(1, False, False), Device(84, False, False), Device()], ids=str)
def test_plan_covers_every_column_once(rows: int, outputs: int, inputs: int, device: Device) -> None:
    sizes = plan(rows, outputs, inputs, device)
    pairs = -(-inputs // 128)
    assert sizes.fused
    assert sizes.splits * sizes.split_pairs >= pairs > (sizes.splits - 1) * sizes.split_pairs
    assert sizes.block_m >= min(rows, 64)


@pytest.mark.parametrize(("outputs", "inputs"), LLAMA)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_plan_fills_the_gpu_evenly(rows: int, outputs: int, inputs: int) -> None:
    """At least 7 warps on each multiprocessor, and the busiest has at most 60 % over the mean."""
    sizes = plan(rows, outputs, inputs, Device())
    programs = outputs // (64 * sizes.tiles) * sizes.splits
    assert sizes.warps * programs >= 7 * 132
    assert -(-programs // 132) <= 1.6 * programs / 132


def test_many_rows_are_not_fused() -> None:
    assert not plan(FUSED_ROWS + 1, 4096, 4096, Device()).fused
