"""The smallest kernel, to find out whether Triton can compile and run at all."""

import triton
import triton.language as tl


@triton.jit
def store_one(cell):
    tl.store(cell, 1)
