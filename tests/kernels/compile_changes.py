"""Compiles the kernels of dense and sparse changes and of tokens' rows for GPUs that need not be there.

A process of its own, because elsewhere in the tests their modules are interpreted.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from veneer.kernels.jit.dense import add_dense
from veneer.kernels.jit.sparse import add_sparse
from veneer.kernels.jit.token_rows import embed_rows, token_logits

INTS = {"ints": "*i32", "entries": "*i64", "tiles": "*i32", "used": "*i32", "ids": "*i64"}
NUMBERS = ("x", "y", "out", "added", "arena")
ALIGNED = ("x", "out", "added", "arena", "ints", "entries", "slot_stride")  # as where they are launched
BLOCKS: dict[Any, dict[int, dict[str, int]]] = {  # by rows of a tile, as the launchers choose them
    add_dense: {8: {"BLOCK_N": 16, "BLOCK_K": 256}, 64: {"BLOCK_N": 64, "BLOCK_K": 64}},
    add_sparse: {8: {"BLOCK_N": 16, "BLOCK_K": 8}, 64: {"BLOCK_N": 8, "BLOCK_K": 8}},
    embed_rows: {8: {"BLOCK_N": 64, "BLOCK_R": 16}, 64: {"BLOCK_N": 64, "BLOCK_R": 16}},
    token_logits: {8: {"BLOCK_N": 16, "BLOCK_K": 128}, 64: {"BLOCK_N": 32, "BLOCK_K": 64}},
}


def compile_for(kernel: Any, capability: int, dtype: str, tile_rows: int) -> None:
    """Write the code into the folder that is the argument."""
    constants = {"BLOCK_M": tile_rows, "PDL": capability >= 90, "PER_INT": 1 if dtype == "fp32" else 2}
    constants |= BLOCKS[kernel][tile_rows]
    names = kernel.arg_names
    types = {**INTS, **dict.fromkeys(NUMBERS, f"*{dtype}"), **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names}
    places = {(names.index(name),): value for name, value in constants.items() if name in names}
    compiled = triton.compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 3},
    )
    name = f"{kernel.__name__}-{capability}-{dtype}-{tile_rows}.cubin"
    (Path(sys.argv[1]) / name).write_bytes(compiled.asm["cubin"])


def main() -> None:
    for kernel, capability, tile_rows in product(BLOCKS, (80, 90), (8, 64)):
        compile_for(kernel, capability, "bf16", tile_rows)


if __name__ == "__main__":
    main()
