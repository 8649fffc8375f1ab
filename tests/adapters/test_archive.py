"""Archives: both kinds unpack, and every known attack is refused by the entry's name."""

from __future__ import annotations

import bz2
import gzip
import io
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from veneer.adapters.archive import unpack
from veneer.adapters.names import CONFIG_FILE, CONFIG_LIMIT, WEIGHTS_FILE
from veneer.adapters.staging import Staging
from veneer.errors import AdapterRefused, StorageFull

FILES = {CONFIG_FILE: b'{"r": 8}', WEIGHTS_FILE: random.Random(0).randbytes(200_000)}
LIMIT = 300_000  # bytes of the weights
Make = Callable[[Mapping[str, bytes]], bytes]


def make_zip(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def make_tar(files: Mapping[str, bytes], *infos: tarfile.TarInfo, layout: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, format=layout) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5  # so that Python writes an extended header, as it does for files on a disk
            archive.addfile(info, io.BytesIO(data))
        for info in infos:
            archive.addfile(info)
    return buffer.getvalue()


MAKERS = pytest.mark.parametrize("make", [make_zip, make_tar])


def refusal(data: bytes, folder: Path) -> str:
    with pytest.raises(AdapterRefused) as error:
        unpack(io.BytesIO(data), Staging(folder), LIMIT)
    assert error.value.status == 400
    assert error.value.param == "archive"
    for path in folder.iterdir():  # what was complete may stay in the staging folder, under its own name
        assert path.read_bytes() == FILES[path.name]
    return error.value.message


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@MAKERS
@pytest.mark.parametrize("prefix", ["", "./", "adapter/", "./adapter/"])
def test_unpacks_both_files(make: Make, prefix: str, tmp_path: Path) -> None:
    skipped = unpack(io.BytesIO(make({prefix + k: v for k, v in FILES.items()})), Staging(tmp_path), LIMIT)
    assert contents(tmp_path) == FILES
    assert skipped == ()


@MAKERS
def test_adapterhubs_names(make: Make, tmp_path: Path) -> None:
    """Its weights are stored under the one name; a head beside them would be lost."""
    files = {CONFIG_FILE: FILES[CONFIG_FILE], "adapter.safetensors": FILES[WEIGHTS_FILE]}
    skipped = unpack(io.BytesIO(make(files | {"head_config.json": b"{}"})), Staging(tmp_path), LIMIT)
    assert contents(tmp_path) == FILES
    assert skipped == ("head_config.json",)
    for extra, words in (
        ("model_head.safetensors", "veneer adapters convert FOLDER --output OUT"),
        ("pytorch_model_head.bin", "veneer adapters convert FOLDER --output OUT"),
        ("pytorch_adapter.bin", "pickle files can run code"),
        (WEIGHTS_FILE, "the archive has a second file of that kind"),
    ):
        folder = tmp_path / f"with {extra}"
        folder.mkdir()
        message = refusal(make(files | {extra: b"x"}), folder)
        assert extra in message
        assert words in message


@MAKERS
def test_companions_are_skipped_and_reported(make: Make, tmp_path: Path) -> None:
    extra = {
        "a/README.md": b"x",
        "a/tokenizer.model": b"y" * 10_000_000,
        "__MACOSX/a/._adapter_config.json": b"z",
        f"a/._{WEIGHTS_FILE}": b"z",
    }
    files = extra | {f"a/{k}": v for k, v in FILES.items()}
    skipped = unpack(io.BytesIO(make(files)), Staging(tmp_path), LIMIT)
    assert skipped == ("README.md", "tokenizer.model", "._adapter_config.json", f"._{WEIGHTS_FILE}")
    assert contents(tmp_path) == FILES


def test_folders_and_other_tars(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("adapter/")
    folder.type = tarfile.DIRTYPE
    for number, layout in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT)):
        target = tmp_path / str(number)
        target.mkdir()
        files = {f"adapter/{k}": v for k, v in FILES.items()}
        unpack(io.BytesIO(make_tar(files, folder, layout=layout)), Staging(target), LIMIT)
        assert contents(target) == FILES
    buffer = io.BytesIO(make_zip(FILES, zipfile.ZIP_STORED))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.mkdir("empty")
    target = tmp_path / "zip"
    target.mkdir()
    unpack(buffer, Staging(target), LIMIT)
    assert contents(target) == FILES


@MAKERS
@pytest.mark.parametrize(
    "name",
    [
        *("../adapter_config.json", "a/../adapter_config.json", "/etc/passwd", "/adapter_config.json"),
        *("..\\adapter_config.json", "C:adapter_config.json", "a/b/adapter_config.json"),
        *("evil.py", "a/run.sh", ".", "optimizer.pt", "adapter_model.bin", "a/training_args.bin", "x.pkl"),
    ],
)
def test_other_entries_are_refused_by_name(make: Make, name: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    message = refusal(make({name: b"x"} | FILES), inside)
    assert repr(name) in message
    if name.endswith((".pt", ".bin", ".pkl")):
        assert "pickle" in message
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"],
)
def test_links_and_devices_in_a_tar(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo(WEIGHTS_FILE)
    info.type = kind
    info.linkname = "/etc/passwd"
    message = refusal(make_tar({CONFIG_FILE: FILES[CONFIG_FILE]}, info), tmp_path)
    assert WEIGHTS_FILE in message


def test_links_in_a_zip(tmp_path: Path) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        info = zipfile.ZipInfo(WEIGHTS_FILE)
        info.external_attr = (kind | 0o777) << 16
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(info, "/etc/passwd")
        assert "links" in refusal(buffer.getvalue(), tmp_path)


def test_a_sparse_file_in_a_tar(tmp_path: Path) -> None:
    info = tarfile.TarInfo(WEIGHTS_FILE)
    info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
    assert "sparse" in refusal(make_tar({}, info), tmp_path)


def test_encrypted_and_other_compressions_in_a_zip(tmp_path: Path) -> None:
    data = bytearray(make_zip({CONFIG_FILE: b"x"}))
    central = data.index(b"PK\x01\x02")
    data[central + 8] |= 1
    assert "encrypted" in refusal(bytes(data), tmp_path)
    for compression in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        assert CONFIG_FILE in refusal(make_zip(FILES, compression), tmp_path)


@MAKERS
def test_bombs_are_stopped_while_they_stream(make: Make, tmp_path: Path) -> None:
    cases = {WEIGHTS_FILE: LIMIT, CONFIG_FILE: CONFIG_LIMIT, "README.md": 64 << 20}
    for name, limit in cases.items():
        message = refusal(make({name: bytes(limit + 1)}), tmp_path)
        assert repr(name) in message
        assert f"{limit:,} bytes" in message
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_a_zip_declares_are_not_trusted(tmp_path: Path) -> None:
    data = bytearray(make_zip({CONFIG_FILE: FILES[CONFIG_FILE], WEIGHTS_FILE: bytes(LIMIT + 1)}))
    central = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, central + 24, 10)  # uncompressed size
    with pytest.raises(AdapterRefused):
        unpack(io.BytesIO(data), Staging(tmp_path), LIMIT)
    assert list(contents(tmp_path)) == [CONFIG_FILE]


@MAKERS
def test_many_entries(make: Make, tmp_path: Path) -> None:
    files = {f"{number}/README.md": b"" for number in range(65)}
    assert "more than 64 entries" in refusal(make(files), tmp_path)


def peak_of_refusal(data: bytes, folder: Path) -> tuple[str, int]:
    tracemalloc.start()
    try:
        return refusal(data, folder), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_huge_zip_directory_is_not_read(tmp_path: Path) -> None:
    data = make_zip({f"{number:0200}": b"" for number in range(10_000)}, zipfile.ZIP_STORED)
    assert len(data) > 4 << 20
    message, peak = peak_of_refusal(data, tmp_path)
    assert "bytes of headers" in message
    assert peak < 4 << 20


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_huge_tar_header_is_not_read(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = kind
    info.size = 1 << 28
    body = info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 24)
    message, peak = peak_of_refusal(gzip.compress(body, 1), tmp_path)
    assert "bytes of headers" in message
    assert peak < 4 << 20


def test_a_chain_of_tar_headers_ends(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 2
    link = info.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")
    assert "the archive is refused" in refusal(gzip.compress(link * 100_000, 1), tmp_path)


def test_a_long_tail_of_a_tar_is_not_unpacked(tmp_path: Path) -> None:
    tar = gzip.decompress(make_tar(FILES))
    assert "padding" in refusal(gzip.compress(tar + bytes(1 << 24), 1), tmp_path)


@MAKERS
def test_a_second_file_of_one_name(make: Make, tmp_path: Path) -> None:
    assert "second file" in refusal(make(FILES | {f"a/{CONFIG_FILE}": b"{}"}), tmp_path)


def test_twice_the_same_entry(tmp_path: Path) -> None:
    buffer = io.BytesIO(make_zip(FILES))
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(CONFIG_FILE, "{}")
    assert "second file" in refusal(buffer.getvalue(), tmp_path)


@MAKERS
def test_missing_and_scattered_files(make: Make, tmp_path: Path) -> None:
    for name in FILES:
        target = tmp_path / name
        target.mkdir()
        assert f"{name} is missing" in refusal(make({k: v for k, v in FILES.items() if k != name}), target)
    target = tmp_path / "both"
    target.mkdir()
    config, weights = FILES.values()
    assert "another folder" in refusal(
        make({f"a/{CONFIG_FILE}": config, f"b/{WEIGHTS_FILE}": weights}), target
    )


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"\x1f\x8b", b"x" * 1000, bz2.compress(b"x"), b"PK\x05\x06" + bytes(18)]
)
def test_what_is_no_archive(data: bytes, tmp_path: Path) -> None:
    assert "the archive is refused" in refusal(data, tmp_path)


@MAKERS
def test_truncated_archives(make: Make, tmp_path: Path) -> None:
    data = make(FILES)
    for number in range(40):
        target = tmp_path / str(number)
        target.mkdir()
        refusal(data[: len(data) * number // 40], target)


@MAKERS
def test_damaged_archives_never_unpack_to_something_else(make: Make, tmp_path: Path) -> None:
    data = make(
        {f"a/{name}": content[:3000] for name, content in FILES.items()} | {"a/README.md": b"x" * 500}
    )
    expected = {name: content[:3000] for name, content in FILES.items()}
    draw = random.Random(1)
    refused = 0
    for number in range(300):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        target = tmp_path / str(number)
        target.mkdir()
        try:
            unpack(io.BytesIO(damaged), Staging(target), LIMIT)
            assert contents(target) == expected
        except AdapterRefused:
            refused += 1
    assert refused > 150


def test_an_entry_without_a_name(tmp_path: Path) -> None:
    data = bytearray(make_zip({"x": b""} | FILES))
    for magic, length_at in ((b"PK\x03\x04", 26), (b"PK\x01\x02", 28)):
        struct.pack_into("<HH", data, data.index(magic) + length_at, 0, 1)  # the name becomes an extra field
    assert "the archive is refused" in refusal(bytes(data), tmp_path)


def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(StorageFull):
        unpack(io.BytesIO(make_zip(FILES)), Staging(tmp_path), LIMIT)
