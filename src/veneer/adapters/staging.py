"""Adapter files on disk: a private folder that fills up, its digest, and the moves that survive a crash.

A folder appears in the store, and disappears from it, by one rename. Whatever else is interrupted happens
inside the staging folder, which is emptied when the store opens.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sqlalchemy.exc import DBAPIError

from veneer.adapters.names import CONFIG_FILE, CONFIG_LIMIT, FILES, TEXT_FILES, WANTED, WEIGHTS_FILE
from veneer.errors import AdapterRefused, Conflict, InvalidRequest, StorageFull, TooLarge

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SPARE = 1 << 20  # bytes; a delete writes some tens of pages
_SQLITE_FULL = 13
_POSTGRES_FULL = "53100"


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder that nobody else sees, to be filled with an adapter's files."""

    path: Path

    def write(self, filename: str, chunks: Iterable[bytes], limit: int) -> int:
        """Write a file of an adapter, at most `limit` bytes; an error leaves nothing. Returns its size.

        Raises `TooLarge` beyond the limit, `StorageFull` when the disk is, `InvalidRequest` on a second
        file of that name.
        """
        if filename not in FILES and filename not in TEXT_FILES:
            raise ValueError(f"{filename!r} is not a file of an adapter")
        target = self.path / filename
        try:
            return write_file(target, chunks, limit)
        except FileExistsError:
            raise InvalidRequest(f"{filename} was sent twice; send each file once", param="files") from None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file: of `FILES`, then of those of `TEXT_FILES` that are there, in their order.

        Raises `AdapterRefused` when one of `FILES` is missing or something else is there.
        """
        found = {entry.name: entry for entry in os.scandir(self.path)}
        for filename in FILES:
            if filename not in found:
                raise AdapterRefused(
                    f"{filename} is missing; an adapter is {' and '.join(FILES)}", param="files"
                )
        for name, entry in found.items():
            if name not in (*FILES, *TEXT_FILES) or not entry.is_file(follow_symlinks=False):
                raise AdapterRefused(f"{name!r} does not belong to an adapter; send {WANTED}", param="files")
        return {name: found[name].stat().st_size for name in (*FILES, *TEXT_FILES) if name in found}

    def digest(self) -> str:
        """The adapter's identity: sha256 over, for each file in the order of `sizes`, its name, a zero byte,
        its length as eight bytes (big-endian) and the sha256 of its content."""
        whole = hashlib.sha256()
        for filename, size in self.sizes().items():
            with (self.path / filename).open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
            whole.update(filename.encode() + b"\0" + size.to_bytes(8, "big") + content.digest())
        return whole.hexdigest()

    def sync(self) -> None:
        """Bring the files and the folder to the disk."""
        with storage_errors("the adapter"):
            for filename in self.sizes():
                sync(self.path / filename)
            sync(self.path)


def file_limits(weights: int) -> dict[str, int]:
    """How many bytes each file of an adapter may have, when its weights may have so many."""
    return {CONFIG_FILE: CONFIG_LIMIT, WEIGHTS_FILE: weights, **TEXT_FILES}


def write_file(target: Path, chunks: Iterable[bytes], limit: int, *, param: str = "files") -> int:
    """Write a new file of at most `limit` bytes and bring it to the disk; an error leaves nothing.

    Returns its size. Raises `TooLarge` beyond the limit, `StorageFull` when the disk is, `FileExistsError`.
    """
    with storage_errors(target.name), target.open("xb") as file:
        try:
            size = _copy(target.name, chunks, limit, file.fileno(), param)
            os.fsync(file.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return size


def _copy(filename: str, chunks: Iterable[bytes], limit: int, descriptor: int, param: str) -> int:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"{filename} is larger than the {limit:,} bytes allowed for it", param=param)
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    return size


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Report a full disk, a spent quota or a full database as `StorageFull`."""
    try:
        yield
    except (OSError, DBAPIError) as error:
        if not _is_full(error):
            raise
        raise StorageFull(
            f"the store's disk has no room for {what}; free disk space, or delete adapters or files, then try again"
        ) from error


def _is_full(error: OSError | DBAPIError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    primary = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # the rest is the extended code
    return primary == _SQLITE_FULL or getattr(error.orig, "sqlstate", None) == _POSTGRES_FULL


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def sync(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path, trash: Path) -> None:
    """Remove a folder at once: one rename into `trash`, synced, before its files go one by one."""
    doomed = trash / secrets.token_hex(8)  # needs no new folder, so it works on a full disk
    folder.rename(doomed)
    sync(folder.parent)
    remove(doomed)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; one that is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fault(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with a stored adapter's files, or None when all are there with the right sizes."""
    for filename, size in sizes.items():
        try:
            found = (folder / filename).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return f"{filename} is missing from the store"
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            return f"{filename} has {found.st_size:,} bytes in the store instead of {size:,}"
    return None


def keep_spare(path: Path, staging: Path) -> None:
    """Occupy `SPARE` bytes at `path` if there is room."""
    if path.exists():
        return
    draft = staging / secrets.token_hex(8)
    try:
        with draft.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, SPARE)
        draft.rename(path)
    except OSError as error:
        remove(draft)
        if not _is_full(error):
            raise


def lock_root(root: Path) -> IO[str]:
    """Hold the root for this process; the system lets go when the process ends, however it ends."""
    file = (root / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(20).strip()
        file.close()
        raise Conflict(
            f"the adapter store {root} is open in another process (pid {holder or 'unknown'}); "
            f"one process owns a store: stop that one or choose another folder"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    with suppress(OSError):  # only for the message above; a full disk must not keep the store closed
        file.flush()
    return file
