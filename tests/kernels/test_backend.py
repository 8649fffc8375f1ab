"""Which kernels run where, and that the reason is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from veneer.kernels import backend


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    backend.resolve.cache_clear()
    yield
    backend.resolve.cache_clear()


def test_cpu_runs_torch_also_beside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.resolve(torch.device("cpu")).name == "torch"
    assert "cpu" in backend.resolve(torch.device("cpu")).reason


def test_an_old_gpu_runs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    choice = backend.resolve(torch.device("cuda", 0))
    assert choice == ("torch", "Triton kernels need compute capability 8.0, and cuda:0 has 7.5")


def test_a_triton_that_cannot_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "_probe", fail)
    choice = backend.resolve(torch.device("cuda", 0))
    assert choice.name == "torch"
    assert choice.reason.endswith("RuntimeError: Failed to find C compiler")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_modern_gpu_runs_triton() -> None:
    choice = backend.resolve(torch.device("cuda", 0))
    assert choice.name == "triton", choice.reason
