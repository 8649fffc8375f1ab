"""Where an adapter can come from besides an upload: a folder of this machine, or the Hugging Face hub.

Both only bring an adapter's files into a staging folder; the store knows neither. Other files of a source are
never read, pickled weights least of all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from veneer.adapters.names import (
    ADAPTERHUB_WEIGHTS,
    FILES,
    HEAD_ADVICE,
    HEAD_FILES,
    TEXT_FILES,
    WEIGHTS_FILE,
)
from veneer.adapters.staging import Staging, file_limits, storage_errors
from veneer.errors import (
    AdapterRefused,
    EngineUnavailable,
    Forbidden,
    InvalidRequest,
    NotFound,
    TooLarge,
    VeneerError,
)

CHUNK = 1 << 20  # bytes
PICKLED = ("adapter_model.bin", "pytorch_adapter.bin")


def from_folder(path: str, allowed_roots: Sequence[Path], staging: Staging, max_bytes: int) -> None:
    """Copy an adapter from a folder below one of `allowed_roots`; links are followed as far as those reach.

    `max_bytes` limits the weights. Raises `Forbidden` outside the roots (whether or not something is there),
    `NotFound` for a folder that does not exist, `AdapterRefused` for one that holds no adapter, `TooLarge`.
    """
    roots = [root.resolve() for root in allowed_roots]
    folder = _allowed(Path(path), path, roots)
    if not folder.is_dir():
        raise NotFound(f"there is no folder {path!r}", param="lora_path", code="adapter_not_found")
    wanted = [*FILES, *(filename for filename in TEXT_FILES if (folder / filename).exists())]
    files = {filename: _allowed(folder / filename, path, roots) for filename in wanted}
    theirs = _allowed(folder / ADAPTERHUB_WEIGHTS, path, roots)
    if not files[WEIGHTS_FILE].exists() and theirs.exists():
        files[WEIGHTS_FILE] = theirs
        if heads := [name for name in HEAD_FILES if (folder / name).exists()]:
            raise _head(heads[0], path)
    _copy(files, path, staging, max_bytes)


def _allowed(target: Path, path: str, roots: Sequence[Path]) -> Path:
    try:
        resolved = target.resolve()
    except (ValueError, OSError, RuntimeError):  # a zero byte, half a surrogate, a loop of links
        raise InvalidRequest(f"{path[:200]!r} is not a path", param="lora_path") from None
    if not target.is_absolute():
        raise InvalidRequest(
            f"{path[:200]!r} is a relative path; give the absolute path of a folder", param="lora_path"
        )
    if not any(resolved.is_relative_to(root) for root in roots):
        raise Forbidden(
            f"{path[:200]!r} is not below a folder that adapters may be loaded from; "
            f"allow its folder with --adapter-dir when starting the server, or upload the files",
            param="lora_path",
        )
    return resolved


def from_hub(
    repo: str,
    staging: Staging,
    max_bytes: int,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> str:
    """Copy an adapter from a hub repository, by way of the hub's cache. Returns the commit it came from.

    All files come from one commit, and their sizes are checked before they are downloaded. Without a
    connection, files that are in the cache are used, and the adapter has no others.

    Raises `InvalidRequest` for a malformed id, `NotFound`
    for an unknown repository or revision, `AdapterRefused` when it holds no adapter, `TooLarge`,
    `EngineUnavailable` (`hub_unavailable`) when the hub cannot be asked.
    """
    # Here: few servers need it, and it would slow every start.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    files: dict[str, Path] = {}
    commit = revision  # the config by the name asked for, so that the cache remembers what that points to
    connected = False
    with _hub_errors(repo, revision), storage_errors("a download from the hub"):
        for filename, limit in file_limits(max_bytes).items():
            fetch = partial(hf_hub_download, repo, revision=commit, endpoint=endpoint, cache_dir=cache_dir)
            found = _name_on_hub(filename, fetch)
            try:
                told = fetch(found, dry_run=True)
            except EntryNotFoundError as error:
                # A connection that was there and broke does not say that the repository lacks the file.
                if filename in FILES or (connected and isinstance(error, LocalEntryNotFoundError)):
                    raise
                continue
            connected = connected or told.will_download
            _check_size(found, told.file_size or 0, limit)
            cached = Path(fetch(found))
            commit = cached.parent.name  # <cache>/…/snapshots/<commit>/<filename>
            files[filename] = cached.resolve()
    _copy(files, repo, staging, max_bytes)
    return str(commit)


def _name_on_hub(filename: str, fetch: Callable[..., Any]) -> str:
    """What a repository calls the file: the weights have another name when AdapterHub's library saved them."""
    if filename != WEIGHTS_FILE or _is_on_hub(filename, fetch) or not _is_on_hub(ADAPTERHUB_WEIGHTS, fetch):
        return filename
    if heads := [name for name in HEAD_FILES if _is_on_hub(name, fetch)]:
        raise _head(heads[0], "the repository")
    return ADAPTERHUB_WEIGHTS


def _is_on_hub(filename: str, fetch: Callable[..., Any]) -> bool:
    from huggingface_hub import errors

    try:
        fetch(filename, dry_run=True)
    except errors.EntryNotFoundError:  # also when there is no connection and it is not in the cache
        return False
    return True


def _head(name: str, where: str) -> AdapterRefused:
    return AdapterRefused(f"{where[:200]!r} has {name}: {HEAD_ADVICE}", param="lora_path")


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    where = f"{repo[:200]!r}" + (f" at revision {revision[:200]!r}" if revision else "")
    try:
        yield
    except errors.HFValidationError as error:
        raise InvalidRequest(f"{where} is not a hub id: {error}", param="lora_path") from error
    except errors.LocalEntryNotFoundError as error:  # before its parent EntryNotFoundError
        raise EngineUnavailable(
            f"the Hugging Face hub cannot be reached and {where} is not in its cache; check the connection "
            f"and HF_ENDPOINT, HF_HUB_OFFLINE, or upload the files",
            code="hub_unavailable",
        ) from error
    except errors.EntryNotFoundError as error:
        raise AdapterRefused(
            f"{where} on the hub holds no adapter: it needs {' and '.join(FILES)} (pickled weights such as "
            f"{PICKLED[0]} are not read; save the adapter as safetensors)",
            param="lora_path",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(
            f"{where} is not on the Hugging Face hub, or it is private or gated; check the id and revision, "
            f"and set HF_TOKEN for a repository that needs it",
            param="lora_path",
            code="adapter_not_found",
        ) from error
    except VeneerError:
        raise
    except Exception as error:  # the client passes on what its transport raises, of whichever library
        raise EngineUnavailable(
            f"the Hugging Face hub did not send {where} ({type(error).__name__}); try again later, or upload "
            f"the files",
            code="hub_unavailable",
        ) from error


def _copy(files: Mapping[str, Path], source: str, staging: Staging, max_bytes: int) -> None:
    limits = file_limits(max_bytes)
    for filename, path in files.items():
        with _open_regular(path, filename, source) as file:
            _check_size(filename, os.fstat(file.fileno()).st_size, limits[filename])
            staging.write(filename, iter(partial(file.read, CHUNK), b""), limits[filename])


def _open_regular(path: Path, filename: str, source: str) -> BinaryIO:
    """Open a resolved path: a link there now was put there since, and a pipe must not make us wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        reason = f"{source[:200]!r} has no readable {filename} ({error.strerror})"
        if pickled := [name for name in PICKLED if path.with_name(name).exists()]:
            reason += f"; its {pickled[0]} is a pickle, which is never read: save the adapter as safetensors"
        raise AdapterRefused(reason, param="lora_path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterRefused(f"{filename} in {source[:200]!r} is not a regular file", param="lora_path")
    return os.fdopen(descriptor, "rb")


def _check_size(filename: str, size: int, limit: int) -> None:
    if size > limit:
        raise TooLarge(
            f"{filename} has {size:,} bytes; at most {limit:,} are allowed for it", param="lora_path"
        )
