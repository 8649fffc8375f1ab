"""`veneer adapters …`: a small client of a running server's adapter routes, and the conversion of files."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote

import httpx
from tqdm import tqdm

from veneer.adapters.names import (
    ADAPTERHUB_WEIGHTS,
    CONFIG_FILE,
    FILES,
    HEAD_ADVICE,
    HEAD_FILES,
    TEXT_FILES,
    WANTED,
    WEIGHTS_FILE,
)
from veneer.adapters.staging import Staging
from veneer.errors import InvalidRequest, VeneerError, from_wire

ARROW_ROUTER = "arrow_router"  # the folder in which PEFT saves one, beside its experts
ARCHIVES = (".zip", ".tar.gz", ".tgz")

_LISTED = ("kind", "primitives", "portability", "rank", "tasks", "virtual", "text", "bytes")

# An upload waits for the server to check the adapter, a delete for running requests to end.
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


def run(arguments: argparse.Namespace) -> int:
    """Run one action against `arguments.url`; errors are raised as the server named them."""
    key = key_of(arguments)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=arguments.url, headers=headers, timeout=_TIMEOUT) as client:
            _ACTIONS[arguments.action](client, arguments)
    except httpx.TransportError as error:
        raise VeneerError(
            f"No answer from {arguments.url}: {error}. Is `veneer serve` running there?"
        ) from None
    return 0


def key_of(arguments: argparse.Namespace) -> str | None:
    """The server's key, from the command line or the environment."""
    return arguments.api_key or os.environ.get("VENEER_ADMIN_API_KEY") or os.environ.get("VENEER_API_KEY")


def convert(arguments: argparse.Namespace) -> int:
    """Make an upload of what a library saved otherwise. Needs no server."""
    if (arguments.folders[0] / ARROW_ROUTER).is_dir():
        return _pack_experts(arguments)
    if arguments.weights is None:
        return _repack(arguments)
    if _has_options(arguments):
        raise InvalidRequest("--weights makes a LoRA of one folder; it goes with none of the other options")
    from veneer.engine.source import DEFAULT_MODEL, resolve

    model = arguments.weights
    if model == DEFAULT_MODEL or model.endswith(".gguf"):
        raise InvalidRequest(
            f"--weights {model}: a GGUF file does not hold the weights that a training loads; give the folder "
            "or hub id of those"
        )
    weights = resolve(model)
    from veneer.adapters.convert import convert as convert_adapter  # imports torch: some seconds

    result = convert_adapter(arguments.folders[0], weights, arguments.output)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{arguments.output}: a plain LoRA of rank {max(result.ranks)} at {len(result.ranks)} layers")
    return 0


def _pack_experts(arguments: argparse.Namespace) -> int:
    from veneer.adapters.convert import check_free, write  # imports torch: some seconds
    from veneer.adapters.methods.arrow import pack

    if arguments.weights is not None or _has_options(arguments):
        raise InvalidRequest("an Arrow router is packed without any of the other options; leave them out")
    check_free(arguments.output)
    config, tensors = pack(arguments.folders[0])
    write(arguments.output, config, tensors, texts=arguments.folders[0])
    print(f"{arguments.output}: a router over {', '.join(config['arrow_experts'])}")
    return 0


def _has_options(arguments: argparse.Namespace) -> bool:
    """Whether there is more than one folder, or an option for other libraries' files."""
    names = ("fusion", "kind", "first", "last", "activation")
    return len(arguments.folders) > 1 or any(getattr(arguments, name) for name in names)


def _repack(arguments: argparse.Namespace) -> int:
    """The files of AdapterHub's library or pyreft as two."""
    from veneer.adapters.pyreft import is_pyreft, repack_pyreft  # these import torch
    from veneer.adapters.repack import is_adapterhub, repack_adapterhub, repack_fusion

    folders, output = arguments.folders, arguments.output
    told = arguments.first or arguments.last or arguments.activation
    if arguments.fusion is not None and not told and not arguments.kind:
        result = repack_fusion(folders, arguments.fusion, output)
    elif len(folders) > 1 or arguments.fusion is not None:
        raise InvalidRequest(
            "several folders are those of fused adapters: they need --fusion LAYER, and it alone"
        )
    elif is_pyreft(folders[0]) and not arguments.kind:
        options = {"first": arguments.first, "last": arguments.last, "activation": arguments.activation}
        result = repack_pyreft(folders[0], output, **options)
    elif is_adapterhub(folders[0]) and not told:
        result = repack_adapterhub(folders[0], output, arguments.kind)
    else:
        raise InvalidRequest(
            f"{folders[0]} holds no adapter of AdapterHub's library or pyreft, or the options are not its. For "
            "PEFT's PiSSA, OLoRA and KaSA --weights is missing; its other adapters need no conversion"
        )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{output}: {result.what}, {result.tensors} tensors")
    return 0


def _push(client: httpx.Client, arguments: argparse.Namespace) -> None:
    source = Path(arguments.source)
    fields: dict[str, Any] = {"name": arguments.name}
    with contextlib.ExitStack() as stack:
        if source.is_dir():
            paths = [("files", path) for path in _files_of(source)]
        elif source.is_file():
            if not source.name.endswith(ARCHIVES):
                raise InvalidRequest(f"{source} is not a folder, nor an archive ({', '.join(ARCHIVES)})")
            paths = [("archive", source)]
        else:  # not on this disk: a hub id, which the server fetches
            paths = []
            fields["source"] = arguments.source
            if arguments.revision:
                fields["revision"] = arguments.revision
        if arguments.allow_ineffective:
            fields["allow_ineffective"] = True
        files = [(field, (path.name, _with_progress(stack, path))) for field, path in paths]
        if files:
            answer = _call(client, "POST", "/v1/adapters", data=fields, files=files)
        else:
            answer = _call(client, "POST", "/v1/adapters", json=fields)
    for warning in answer["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{answer['id']} version {answer['version']} digest {answer['digest']}")


def _files_of(folder: Path) -> list[Path]:
    """The files of an adapter's folder."""
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.is_file() and (folder / ADAPTERHUB_WEIGHTS).is_file():
        weights = folder / ADAPTERHUB_WEIGHTS
        if heads := [name for name in HEAD_FILES if (folder / name).is_file()]:
            raise InvalidRequest(f"{folder / heads[0]}: {HEAD_ADVICE}")
    for path in (config, weights):
        if not path.is_file():
            raise InvalidRequest(f"{path} is missing: an adapter folder has {WANTED}")
    return [config, weights, *(folder / name for name in TEXT_FILES if (folder / name).is_file())]


def _with_progress(stack: contextlib.ExitStack, path: Path) -> IO[bytes]:
    file = stack.enter_context(path.open("rb"))
    bar = tqdm.wrapattr(file, "read", total=path.stat().st_size, desc=path.name, disable=None)
    return cast("IO[bytes]", stack.enter_context(bar))


def _list(client: httpx.Client, arguments: argparse.Namespace) -> None:
    rows = [("NAME", "VERSION", *map(str.upper, _LISTED), "RESIDENT", "REQUESTS", "DIGEST")]
    for adapter in _call(client, "GET", "/v1/adapters")["data"]:
        shown = adapter | {
            "primitives": "+".join(adapter["primitives"]),
            "digest": adapter["digest"][:12],
            "tasks": adapter["tasks"] or None,
            "virtual": adapter["virtual_tokens"] or None,
            "text": "+".join(_own_text(adapter)),
            "bytes": _size(adapter["bytes"]),
        }
        keys = ("id", "version", *_LISTED, "residency", "requests", "digest")
        rows.append(tuple("-" if shown[key] in (None, "") else str(shown[key]) for key in keys))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _own_text(adapter: dict[str, Any]) -> list[str]:
    """What the adapter has instead of the base's."""
    own = {"tokenizer": "own_tokenizer", "template": "own_chat_template", "ends": "end_tokens"}
    return [word for word, key in own.items() if adapter[key]]


def _size(count: int | None) -> str | None:
    """Bytes in the unit that gives at most four digits."""
    if count is None:
        return None
    for unit in ("B", "KiB", "MiB"):
        if count < 10_000:
            return f"{count} {unit}"
        count = round(count / 1024)
    return f"{count} GiB"


def _show(client: httpx.Client, arguments: argparse.Namespace) -> None:
    """Everything that is known of one adapter, a line each; then its versions."""
    adapter = _call(client, "GET", _path(arguments.name))
    versions = adapter.pop("versions")
    adapter |= {"bytes": _size(adapter["bytes"]), "file_bytes": _size(adapter["file_bytes"])}
    width = max(map(len, adapter))
    for key, value in adapter.items():
        lines = value if isinstance(value, list) else [value]
        if key != "warnings":
            lines = [", ".join(map(str, lines))]
        for line in lines:
            print(f"{key.ljust(width)}  {'-' if line in (None, '', 'None') else line}")
    for each in versions:
        mark = "current" if each["current"] else each.get("damage", "")
        print(f"version {each['version']}  {each['digest'][:12]}  {mark}".rstrip())


def _export(client: httpx.Client, arguments: argparse.Namespace) -> None:
    """The files of one version, complete and with the digest that it has, or nothing."""
    output = arguments.output
    if output.exists():
        raise InvalidRequest(f"{output} exists and is not overwritten; name a new folder")
    shown = _call(client, "GET", _path(arguments.name))
    version = f"{shown['id']}@{shown['version']}"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        for filename in (*FILES, *shown["text_files"]):
            _download(client, f"{_path(version)}/files/{filename}", folder / filename)
        if (digest := Staging(folder).digest()) != shown["digest"]:
            raise VeneerError(
                f"{version} arrived with digest {digest} instead of {shown['digest']}; try again"
            )
        folder.rename(output)
    print(f"{output}: {version}, {shown['kind']}")


def _download(client: httpx.Client, path: str, target: Path) -> None:
    with client.stream("GET", path) as response, target.open("xb") as file:
        if not response.is_success:
            response.read()
            answer_of(response)
        for piece in response.iter_bytes():
            file.write(piece)


def _remove(client: httpx.Client, arguments: argparse.Namespace) -> None:
    answer = _call(client, "DELETE", _path(arguments.name))
    print(f"{arguments.name} deleted" if answer["deleted"] else f"{arguments.name} is being drained")


def _alias(client: httpx.Client, arguments: argparse.Namespace) -> None:
    path = f"/v1/aliases/{quote(arguments.alias)}"
    if arguments.remove:
        _call(client, "DELETE", path)
        print(f"alias {arguments.alias} removed")
        return
    if not arguments.target:
        raise InvalidRequest("veneer adapters alias needs a TARGET (a name or name@version), or --remove")
    answer = _call(client, "PUT", path, json={"target": arguments.target})
    print(f"{arguments.alias} -> {answer['target']}")


def _rollback(client: httpx.Client, arguments: argparse.Namespace) -> None:
    body: dict[str, Any] = {}
    if arguments.version is not None:
        if not arguments.version.isdecimal():
            raise InvalidRequest(f"version {arguments.version!r} is not a whole number")
        body["version"] = int(arguments.version)
    answer = _call(client, "POST", f"{_path(arguments.name)}/rollback", json=body)
    print(f"{answer['id']} is now version {answer['version']}")


def _pin(client: httpx.Client, arguments: argparse.Namespace) -> None:
    _call(client, "POST", f"{_path(arguments.name)}/{arguments.action}")
    print(f"{arguments.name} {arguments.action}ned")


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name)}"


def _call(client: httpx.Client, method: str, path: str, **content: Any) -> dict[str, Any]:
    """One request; an error answer is raised as the `VeneerError` it stands for."""
    return answer_of(client.request(method, path, **content))


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer. An error is raised as the `VeneerError` it stands for."""
    try:
        if response.is_success:
            return cast("dict[str, Any]", response.json())
        error = response.json()["error"]
        message, code = str(error["message"]), str(error["code"])
    except (ValueError, KeyError, TypeError):
        asked = f"{response.request.method} {response.request.url.path}"
        message, code = f"{asked} answered {response.status_code}: {response.text[:500]}", "bad_answer"
    raise from_wire(response.status_code, code, message, None)


_ACTIONS: dict[str, Callable[[httpx.Client, argparse.Namespace], None]] = {
    "push": _push,
    "export": _export,
    "list": _list,
    "show": _show,
    "rm": _remove,
    "alias": _alias,
    "rollback": _rollback,
    "pin": _pin,
    "unpin": _pin,
}
