"""An adapter's folder: hostile, damaged and wrong files are refused before a tensor is read."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from veneer.adapters.checkpoint import HEADER_LIMIT, Checkpoint, read_header, shown
from veneer.adapters.names import CONFIG_FILE, CONFIG_LIMIT, WEIGHTS_FILE
from veneer.errors import AdapterRefused

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    save_file(TENSORS, tmp_path / WEIGHTS_FILE)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterRefused) as error:
        Checkpoint(folder)
    return error.value.message


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]} | changes


def test_reads_what_was_saved(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.config == {"peft_type": "LORA"}
    assert checkpoint.header == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
    checkpoint.require({"a": (2, 3), "b": (4,)})
    assert torch.equal(checkpoint.read("a"), TENSORS["a"])
    assert torch.equal(checkpoint.read("b"), TENSORS["b"].float())


def test_tensors_do_not_depend_on_the_file(folder: Path) -> None:
    tensor = Checkpoint(folder).read("a")
    (folder / WEIGHTS_FILE).write_bytes(b"\0" * (folder / WEIGHTS_FILE).stat().st_size)
    assert torch.equal(tensor, TENSORS["a"])


def test_headers_of_every_length_are_read(tmp_path: Path) -> None:
    """Some lengths, multiples of 8, look like the first bytes of a pickle: 640 is 0x280."""
    for letters in range(8, 1500, 8):
        (tmp_path / WEIGHTS_FILE).write_bytes(save({"x" * letters: torch.zeros(2)}))
        assert list(read_header(tmp_path / WEIGHTS_FILE)) == ["x" * letters]


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"a": (2, 3)}, ["1 tensor cannot be served", "'b'", "because b"]),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, ["1 tensor missing", "'c'"]),
        ({"a": (3, 2), "b": (4,)}, ["1 tensor of a wrong shape", "'a' has [2, 3]", "[3, 2]"]),
        ({}, ["2 tensors cannot be served", "'a', 'b'"]),
    ],
)
def test_require_names_every_difference(
    shapes: dict[str, tuple[int, ...]], named: list[str], folder: Path
) -> None:
    with pytest.raises(AdapterRefused) as error:
        Checkpoint(folder).require(shapes, lambda name: f"because {name}")
    for words in named:
        assert words in error.value.message


def test_long_names_do_not_fill_the_message(folder: Path) -> None:
    save_file({"n" * 100_000: torch.zeros(1)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused) as error:
        Checkpoint(folder).require({})
    assert len(error.value.message) < 1000
    assert len(shown("x" * 1000)) < 250


# ---- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{'r': 8}", "not valid JSON"),
        (b'{"r": 8} x', "not valid JSON"),
        (b'{"r": 8, "r": 100000}', "'r' occurs twice"),
        (b'{"x": {"r": 8, "r": 9}}', "'r' occurs twice"),
        (b'{"lora_alpha": NaN}', "NaN"),
        (b'{"lora_alpha": -Infinity}', "Infinity"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"r": "\xff"}', "not valid JSON"),
        (b'{"r": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\uDFFF": 8}', "surrogates not allowed"),
        (b'{"r": ' + b"[" * 200_000, "not valid JSON"),
        (b'{"r": "' + b"x" * CONFIG_LIMIT + b'"}', f"limit is {CONFIG_LIMIT}"),
    ],
)
def test_bad_configs(text: bytes, named: str, folder: Path) -> None:
    (folder / CONFIG_FILE).write_bytes(text)
    message = refusal(folder)
    assert CONFIG_FILE in message
    assert named in message
    assert len(message) < 500


def test_missing_files_are_named(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    assert f"{WEIGHTS_FILE} is missing" in refusal(folder)
    (folder / CONFIG_FILE).unlink()
    assert f"{CONFIG_FILE} is missing" in refusal(folder)


# ---- pickles --------------------------------------------------------------------------------------


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(300)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make",
    [torch_zip, *(lambda p=p: pickle.dumps({"a": list(range(100))}, protocol=p) for p in (2, 3, 4, 5))],
    ids=["torch", "2", "3", "4", "5"],
)
def test_pickles_are_refused_whatever_they_are_called(make: Callable[[], bytes], folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(make())
    message = refusal(folder)
    assert "holds a pickle" in message
    assert "safe_serialization=True" in message
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    message = refusal(folder)
    assert "adapter_model.bin is refused" in message
    assert "safe_serialization=True" in message


# ---- the header -----------------------------------------------------------------------------------


def test_truncated_files_are_refused_at_every_length(folder: Path) -> None:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    for length in range(len(whole)):
        (folder / WEIGHTS_FILE).write_bytes(whole[:length])
        assert "truncated" in refusal(folder), length


def test_a_tail_is_refused(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("ab") as file:
        file.write(b"\0")
    assert "bytes after its last tensor" in refusal(folder)


@pytest.mark.parametrize(
    ("header", "data", "named"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' at byte 4 overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "'b' at byte 12 leaves a hole"),
        ({"a": entry(4, 8)}, 8, "leaves a hole"),
        ({"a": entry(0, 8)}, 4, "is truncated"),
        ({"a": entry(0, 8, shape=[3])}, 8, "cannot fill"),
        ({"a": entry(0, 8, shape=[2], data_offsets=[8, 0])}, 8, "cannot fill"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "malformed"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "malformed"),
        ({"a": entry(0, 8, shape=[True, 2])}, 8, "malformed"),
        ({"a": entry(0, 8, shape="2")}, 8, "malformed"),
        ({"a": entry(0, 8, shape=[10**4000] * 50)}, 8, "malformed"),
        ({"a": entry(0, 8, shape=[1] * 9)}, 8, "malformed"),
        ({"a": entry(0, 8, data_offsets=[0])}, 8, "malformed"),
        ({"a": entry(0, 8, data_offsets=[0, None])}, 8, "malformed"),
        ({"a": entry(0, 8, dtype="I8")}, 8, "dtype 'I8'"),
        ({"a": entry(0, 8, dtype="F64")}, 8, "dtype 'F64'"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "dtype ['F32']"),
        ({"a": entry(0, 8) | {"more": 1}}, 8, "exactly dtype, shape and data_offsets"),
        ({"a": 1}, 0, "exactly dtype, shape and data_offsets"),
        (b'{"a": 1, "a": 2}', 0, "'a' occurs twice"),
        (b"[]", 0, "no JSON object"),
        (b" {}", 0, "no JSON object"),
        (b"{", 0, "not valid JSON"),
        (b"", 0, "no JSON object"),
    ],
)
def test_bad_headers(header: Any, data: int, named: str, folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(raw(header, bytes(data)))
    assert named in refusal(folder)


def test_a_long_header_is_refused_unread(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(HEADER_LIMIT + 100)
    assert f"the limit is {HEADER_LIMIT}" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype, folder: Path) -> None:
    save_file({"bad": torch.tensor([1, value], dtype=dtype)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match="'bad' holds NaN or infinite values"):
        Checkpoint(folder).read("bad")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
def test_indices_are_read_as_int64(dtype: torch.dtype, folder: Path) -> None:
    save_file({"at": torch.tensor([[0, 3], [7, 1]], dtype=dtype)}, folder / WEIGHTS_FILE)
    indices = Checkpoint(folder).read_indices("at", 8)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [[0, 3], [7, 1]]


@pytest.mark.parametrize(
    "values", [torch.tensor([0, 8]), torch.tensor([-1, 2]), torch.tensor([0.5]), torch.tensor([float("nan")])]
)
def test_indices_out_of_range_are_refused(values: torch.Tensor, folder: Path) -> None:
    save_file({"at": values}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match="'at' must hold whole numbers from 0 to 7"):
        Checkpoint(folder).read_indices("at", 8)


def test_each_row_of_indices_has_its_limit(folder: Path) -> None:
    save_file({"at": torch.tensor([[0, 3], [7, 1]])}, folder / WEIGHTS_FILE)
    assert Checkpoint(folder).read_indices("at", 4, 8).tolist() == [[0, 3], [7, 1]]
    with pytest.raises(AdapterRefused, match="from 0 to 6; its values go from 1 to 7"):
        Checkpoint(folder).read_indices("at", 4, 7)


def test_integers_are_no_weights(folder: Path) -> None:
    save_file({"weight": torch.tensor([1, 2])}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterRefused, match="'weight' has dtype I64; it must be one of F32, F16, BF16"):
        Checkpoint(folder).read("weight")
