"""The file of tensors: every type and odd shape to the bit, pieces, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from veneer.engine import tensor_file
from veneer.engine.tensor_file import read_header, read_tensors, write_tensors

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def read(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        return read_tensors(file, read_header(file), torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
def test_every_type_and_shape_comes_back(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "_PIECE", 1 << 10)  # several pieces, and tensors that end within one
    torch.manual_seed(0)
    odd = torch.randn(101, device=device).bfloat16()
    tensors = {
        "scalar": torch.tensor(2.5, device=device),
        "odd": odd[1:8],  # seven items, not aligned to a word
        "even": odd[1:101],
        "empty": torch.empty(0, 4, device=device),
        "across": torch.randn(70, 30, device=device).t(),
        "half": torch.randn(3, 5, device=device).half(),
        "words": torch.randint(-(2**31), 2**31, (33, 100), device=device).int(),
        "long": torch.arange(9, device=device),
    }
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, {"any": ["thing", 1.5]})
    found = read(path, device)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].device == tensor.device
        assert torch.equal(found[name], tensor), name
    with path.open("rb") as file:
        assert read_header(file).manifest == {"any": ["thing", 1.5]}
    with safe_open(path, "pt") as other:
        assert all(torch.equal(other.get_tensor(name), tensor.cpu()) for name, tensor in tensors.items())


def test_a_type_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'x' is torch.complex64; kept are F32, F16"):
        write_tensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_ends_early_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(100)}, {})
    with path.open("r+b") as file:
        header = read_header(file)
        file.truncate(header.size - 4)
        with pytest.raises(ValueError, match="it ends at byte"):
            read_tensors(file, header, torch.device("cpu"))
