"""Device code of small uploads. See kernels/upload.py."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["source", "out"])
def copy(source, out, count, BLOCK: tl.constexpr):
    """out[i] = source[i], int32, past all caches: the host may have written it since the last launch."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    tl.store(out + i, tl.load(source + i, mask=inside, cache_modifier=".cv"), mask=inside)
