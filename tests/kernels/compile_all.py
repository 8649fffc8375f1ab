"""Compiles the kernels that adapters' changes of the base's input and output, or what they share, have a part in.

python tests/kernels/compile_all.py CAPABILITY prints the name of each and the bytes of its machine code; no GPU is
needed. It is a process of its own because a kernel is compiled or interpreted as the environment says when its
module is imported.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from veneer.kernels.jit import epilogue, low_rank, shared, transform

DECODE = {"BLOCK_M": 8, "BLOCK_R": 16}
EPILOGUE = {
    "PARTS": 4,
    "SPLITS": 4,
    "HAS_BIAS": False,
    "ADAPTED": True,
    "SCALED": True,
    "SHARED": False,
    "BLOCK_N": 64,
    **DECODE,
}
WIDE = {"BLOCK_M": 32, "BLOCK_R": 32}  # of steps in which adapters share factors
SHARED = {**EPILOGUE, "SCALED": False, "SHARED": True, "SPLITS": 1, "BLOCK_N": 32, **WIDE}
SHARED_PREFILL = {**SHARED, "SCALED": True, "BLOCK_M": 64, "BLOCK_N": 64}
SHRINK = {"SITES": 3, "SPLITS": 16, "PARTS": 8, "BLOCK_K": 64, "STAGES": 3, "BESIDE": True, **WIDE}
HEADS = {"HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "HAS_Q_NORM": True, "HAS_K_NORM": True}
KERNELS: list[tuple[Any, dict[str, Any], int]] = [  # with their constants and warps
    (epilogue.add_update, {"HAS_RESIDUAL": True, "IN_PLACE": False, **EPILOGUE}, 2),
    (epilogue.gated, {"SITES": 2, "ACTIVATION": "silu", **EPILOGUE}, 2),
    (epilogue.rope, {"SITES": 3, **HEADS, **EPILOGUE}, 2),
    (transform.transform_input, {"SITES": 3, "BLOCK_M": 8, "BLOCK_N": 32, "BLOCK_K": 32}, 2),
    (transform.transform_input, {"SITES": 1, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, 4),
    (transform.transform_output, {"BLOCK_M": 8, "BLOCK_N": 128}, 2),
    (low_rank.shrink, SHRINK, 4),
    (shared.scale_ranks, {"SITES": 3, "PARTS": 8, **WIDE}, 4),
    (epilogue.add_update, {"HAS_RESIDUAL": True, "IN_PLACE": False, **SHARED}, 4),
    (epilogue.gated, {"SITES": 2, "ACTIVATION": "silu", **SHARED}, 4),
    (epilogue.gated, {"SITES": 1, "ACTIVATION": "silu", **SHARED_PREFILL}, 8),
    (epilogue.rope, {"SITES": 3, **HEADS, **SHARED, "BLOCK_N": 64}, 4),
    (epilogue.rope, {"SITES": 3, **HEADS, **SHARED_PREFILL}, 8),
]
FLOAT32, INT32 = ("parts", "planes"), ("tiles", "used", "row_slots", "slot_mapping")
BF16 = (
    "x", "y", "out", "arena", "bias", "residual", "q", "k_cache", "v_cache", "cos", "sin", "q_norm", "k_norm"
)  # fmt: skip


def type_of(name: str, constants: dict[str, Any]) -> str:
    """How Triton writes the type of an argument."""
    if name in constants:
        return "constexpr"
    kinds = {"*fp32": FLOAT32, "*i32": INT32, "*bf16": BF16, "*i64": ("entries",), "fp32": ("eps",)}
    return next((kind for kind, names in kinds.items() if name in names), "i32")


def compile_for(capability: int, kernel: Any, constants: dict[str, Any], warps: int) -> int:
    """Bytes of the machine code. What ptxas cannot take is an error."""
    constants = {**constants, "PDL": capability >= 90}
    signature = {name: type_of(name, constants) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") and name not in INT32
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    return len(compiled.asm["cubin"])


def main() -> None:
    for kernel, constants, warps in KERNELS:
        print(kernel.fn.__name__, compile_for(int(sys.argv[1]), kernel, constants, warps))


if __name__ == "__main__":
    main()
