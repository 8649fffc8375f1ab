"""RMSNorm against float64."""

from __future__ import annotations

import math

import pytest
import torch

from veneer.kernels.norm import rms_norm, rms_norm_torch, rms_norm_triton

CUDA = torch.cuda.is_available()
if not CUDA:  # a kernel is compiled or interpreted according to this when its module is imported
    import triton.language  # noqa: F401  before the patch: only our own kernels are to be interpreted

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import veneer.kernels.jit.norm  # noqa: F401

SHAPES = [(1, 64), (3, 576), (5, 4096), (65, 5120)]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 4096)])
def test_compiled_matches_float64(shape: tuple[int, int]) -> None:
    check(rms_norm, shape, torch.bfloat16, "cuda", 2**-8)


@pytest.mark.parametrize("kernel", [rms_norm_torch, *([] if CUDA else [rms_norm_triton])])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_interpreted_match_float64(kernel: object, shape: tuple[int, int]) -> None:
    check(kernel, shape, torch.float32, "cpu", 1e-6)


def check(kernel: object, shape: tuple[int, int], dtype: torch.dtype, device: str, limit: float) -> None:
    random = torch.Generator().manual_seed(0)
    wide = torch.randn(shape[0], shape[1] + 8, generator=random).to(device, dtype)
    weight = torch.randn(shape[1], generator=random).to(device, dtype)
    wide[:, shape[1] :] = math.nan
    x = wide[:, : shape[1]]  # rows that are not neighbours
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found = kernel(x, weight, 1e-5)  # type: ignore[operator]
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= limit * exact.abs().clamp(min=1e-3)).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 4\] and the weight \[3\]"):
        rms_norm(torch.ones(2, 4), torch.ones(3), 1e-5)
