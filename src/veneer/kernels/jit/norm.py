"""Device code of RMSNorm. See kernels/norm.py."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.standard import _sum_combine


@triton.jit(do_not_specialize=["eps"])
def rms_norm(x, weight, out, columns, x_stride, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row in each program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    square = tl.reduce(value * value, 0, _sum_combine)
    value *= tl.rsqrt(square / columns + eps) * scale
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)
