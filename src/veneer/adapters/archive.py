"""Unpacks an uploaded .zip or .tar.gz into a staging folder. Imports no torch.

An archive holds an adapter's files at its root or in one folder. What other tools put beside them
(`_COMPANIONS`) is skipped and reported; anything else, pickles above all, is refused by name. Nothing an
archive says is trusted: sizes are counted while they stream, headers are read from a small allowance, and
a file is written under the name it is expected to have, never under a path of the archive.
"""

from __future__ import annotations

import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from veneer.adapters.names import CONFIG_FILE, FILES, HEAD_ADVICE, HEAD_FILES, WANTED, stored_name
from veneer.adapters.staging import Staging, file_limits
from veneer.errors import AdapterRefused

_ENTRY_LIMIT = 64
_HEADER_LIMIT = 1 << 20  # bytes of headers: of a zip's directory, or before each file of a tar
_COMPANION_LIMIT = 64 << 20  # bytes of all skipped files together
_CHUNK = 1 << 16
_COMPANIONS = {
    ".DS_Store",
    ".gitattributes",
    "LICENSE",
    "LICENSE.txt",
    "README.md",
    "head_config.json",
    "merges.txt",
    "tokenizer.model",
    "trainer_state.json",
    "vocab.json",
}
_FINDER_FOLDER = "__MACOSX"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
# What the libraries raise on bytes that are no archive. A full disk is an OSError and passes.
_MALFORMED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    ValueError,
)


class _Entry(NamedTuple):
    name: str
    is_file: bool
    is_folder: bool
    chunks: Iterator[bytes]


def unpack(archive: BinaryIO, staging: Staging, max_bytes: int) -> tuple[str, ...]:
    """Write the files of the adapter in `archive` (seekable) into `staging`.

    Args:
        max_bytes: limit of the weights, uncompressed.

    Returns:
        The names of the companions that were skipped.

    Raises:
        AdapterRefused: the archive is malformed, too large or holds something else; the entry is named.
        StorageFull: the disk is.
    """
    limits = file_limits(max_bytes)
    found: dict[str, PurePosixPath] = {}
    skipped: list[str] = []
    spare = _COMPANION_LIMIT
    with _readable():
        for count, entry in enumerate(_entries(archive), start=1):
            if count > _ENTRY_LIMIT:
                raise _refused("the archive", f"it has more than {_ENTRY_LIMIT} entries")
            path = _checked_path(entry)
            if entry.is_folder:
                continue
            if (name := stored_name(path.name)) in limits and not _is_finder_copy(path):
                if name in found:
                    raise _refused(entry.name, f"the archive has a second file of that kind, {found[name]}")
                found[name] = path
                staging.write(name, _limited(entry, limits[name]), limits[name])
            elif path.name in _COMPANIONS or _is_finder_copy(path):
                spare -= sum(len(chunk) for chunk in _limited(entry, spare))
                skipped.append(path.name)
            elif path.name in HEAD_FILES:
                raise _refused(entry.name, HEAD_ADVICE)
            elif path.suffix in _PICKLES:
                raise _refused(entry.name, "pickle files can run code; save with safe_serialization=True")
            else:
                raise _refused(entry.name, f"it does not belong to an adapter ({WANTED})")
    for filename in FILES:
        if filename not in found:
            raise _refused("the archive", f"{filename} is missing from it")
    for path in found.values():
        if path.parent != found[CONFIG_FILE].parent:
            raise _refused(str(path), f"{found[CONFIG_FILE]} stands in another folder")
    return tuple(skipped)


def _refused(name: str, reason: str) -> AdapterRefused:
    what = name if name == "the archive" else f"archive entry {name[:200]!r}"
    return AdapterRefused(
        f"{what} is refused: {reason}. Pack an adapter's files alone, at the root or in one folder.",
        param="archive",
    )


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except _MALFORMED as error:
        raise _refused("the archive", f"it is damaged ({type(error).__name__}: {error})") from error


def _checked_path(entry: _Entry) -> PurePosixPath:
    """The entry's path, when it is a plain file or folder at the root or one folder below."""
    name = entry.name
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise _refused(name, "its path leaves the archive or is no plain relative path")
    if not (entry.is_file or entry.is_folder):
        raise _refused(name, "links, devices and sparse or encrypted files are not read")
    if len(path.parts) > (1 if entry.is_folder else 2) and path.parts[0] != _FINDER_FOLDER:
        raise _refused(name, "it stands deeper than one folder")
    return path


def _is_finder_copy(path: PurePosixPath) -> bool:
    """Whether the file is what macOS adds for a file's attributes."""
    return path.name.startswith("._") or path.parts[:1] == (_FINDER_FOLDER,)


def _limited(entry: _Entry, limit: int) -> Iterator[bytes]:
    size = 0
    for chunk in entry.chunks:
        size += len(chunk)
        if size > limit:
            raise _refused(entry.name, f"it unpacks to more than the {limit:,} bytes allowed for it")
        yield chunk


class _Allowance:
    """A file of which only `left` more bytes may be read, so that no declared length is ever allocated."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file = file
        self.left = _HEADER_LIMIT
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise _refused("the archive", f"it has more than {_HEADER_LIMIT} bytes of headers or padding")
        return data


def _entries(archive: BinaryIO) -> Iterator[_Entry]:
    archive.seek(0)
    magic = archive.read(4)
    archive.seek(0)
    if magic == b"PK\x03\x04":
        return _zip_entries(archive)
    if magic.startswith(b"\x1f\x8b"):
        return _tar_entries(archive)
    raise _refused("the archive", f"it is neither .zip nor .tar.gz (it begins with {magic.hex(' ')})")


def _zip_entries(archive: BinaryIO) -> Iterator[_Entry]:
    file = _Allowance(archive)
    with zipfile.ZipFile(file) as zipped:
        for info in zipped.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            # Only what deflate needs: other methods may ask for gigabytes of memory.
            plain = (
                info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
            )
            is_file = not info.is_dir() and kind in (0, stat.S_IFREG) and plain
            is_folder = info.is_dir() and kind in (0, stat.S_IFDIR)
            yield _Entry(info.orig_filename, is_file, is_folder, _zip_chunks(zipped, info, file))


def _zip_chunks(zipped: zipfile.ZipFile, info: zipfile.ZipInfo, file: _Allowance) -> Iterator[bytes]:
    file.left = info.compress_size + _HEADER_LIMIT
    with zipped.open(info) as data:
        yield from iter(partial(data.read, _CHUNK), b"")


def _tar_entries(archive: BinaryIO) -> Iterator[_Entry]:
    with gzip.GzipFile(fileobj=archive, mode="rb") as unzipped:
        file = _Allowance(unzipped)
        with tarfile.TarFile(fileobj=file) as packed:  # type: ignore[arg-type]
            while (info := packed.next()) is not None:
                is_file = info.isreg() and not info.issparse()
                yield _Entry(info.name, is_file, info.isdir(), _tar_chunks(packed, info, file))
                file.left = _HEADER_LIMIT
        file.read()  # the padding; gzip compares its checksum at the end


def _tar_chunks(packed: tarfile.TarFile, info: tarfile.TarInfo, file: _Allowance) -> Iterator[bytes]:
    file.left = info.size + _HEADER_LIMIT
    if data := packed.extractfile(info):
        yield from iter(partial(data.read, _CHUNK), b"")
