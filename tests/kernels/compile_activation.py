"""Compiles the activation kernel for GPUs that need not be there, into the folder that is its argument.

A process of its own, because elsewhere in the tests its module is interpreted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from veneer.kernels.jit.activation import activate
from veneer.kernels.tables import MAX_CHOICES

POINTERS = {"planes": "*fp32", "out": "*fp32", "entries": "*i64", "tiles": "*i32", "used": "*i32"}
ALIGNED = ("planes", "out", "arena", "entries", "rank_stride", "slot_stride")  # as where they are launched


def compile_for(capability: int, dtype: str, tile_rows: int) -> None:
    """Write the code into the folder that is the argument."""
    constants = {
        "SITES": 3,
        "PARTS": 2,
        "BLOCK_M": tile_rows,
        "BLOCK_R": 32,
        "CHOICES": MAX_CHOICES,
        "PDL": capability >= 90,
    }
    pointers = {**POINTERS, "arena": dtype}
    names = activate.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED}
    places = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(activate, signature, places, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 8 if tile_rows > 8 else 2},
    )
    (Path(sys.argv[1]) / f"{capability}-{dtype[1:]}-{tile_rows}.cubin").write_bytes(compiled.asm["cubin"])


def main() -> None:
    for capability, tile_rows in ((80, 8), (90, 64)):
        compile_for(capability, "*bf16", tile_rows)


if __name__ == "__main__":
    main()
