"""Local folders and a hub of our own: what is copied, and what is refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from veneer.adapters.names import CONFIG_FILE, CONFIG_LIMIT, TEXT_FILES, WEIGHTS_FILE
from veneer.adapters.sources import from_folder, from_hub
from veneer.adapters.staging import Staging
from veneer.errors import (
    AdapterRefused,
    EngineUnavailable,
    Forbidden,
    InvalidRequest,
    NotFound,
    StorageFull,
    TooLarge,
)

LIMIT = 1 << 20


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    path = tmp_path / "staging"
    path.mkdir()
    return Staging(path)


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    path = tmp_path / "allowed"
    path.mkdir()
    return path


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_bytes(b"{}")
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    (folder / "README.md").write_bytes(b"not copied")
    return folder


def staged(staging: Staging) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in staging.path.iterdir()}


# ---- folders --------------------------------------------------------------------------------------


def test_folder(allowed: Path, staging: Staging) -> None:
    from_folder(str(adapter(allowed / "deep" / "bot")), [allowed], staging, LIMIT)
    assert staged(staging) == {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"}


def test_folder_with_links_inside_the_roots(tmp_path: Path, allowed: Path, staging: Staging) -> None:
    """The hub's cache looks like this: the files of a snapshot are links to ../../blobs."""
    real = adapter(tmp_path / "other" / "bot")
    (allowed / "snapshot").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (allowed / "snapshot" / name).symlink_to(real / name)
    (tmp_path / "door").symlink_to(allowed)
    from_folder(str(tmp_path / "door" / "snapshot"), [allowed, tmp_path / "other"], staging, LIMIT)
    assert len(staged(staging)) == 2


@pytest.mark.parametrize(
    "way", ["elsewhere", "dots", "linked folder", "linked file", "prefix", "absent", "none"]
)
def test_folder_outside_the_roots(tmp_path: Path, allowed: Path, staging: Staging, way: str) -> None:
    outside = adapter(tmp_path / "outside")
    path = str(outside)
    if way == "dots":
        path = f"{allowed}/../outside"
    elif way == "linked folder":
        (allowed / "bot").symlink_to(outside)
        path = str(allowed / "bot")
    elif way == "linked file":
        path = str(adapter(allowed / "bot"))
        (allowed / "bot" / WEIGHTS_FILE).unlink()
        (allowed / "bot" / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    elif way == "prefix":
        path = str(adapter(tmp_path / "allowed-not"))
    elif way == "absent":
        path = str(tmp_path / "nothing-here")
    with pytest.raises(Forbidden, match="--adapter-dir") as refused:
        from_folder(path, [] if way == "none" else [allowed], staging, LIMIT)
    assert refused.value.param == "lora_path"
    assert staged(staging) == {}


@pytest.mark.parametrize("path", ["bot", "", "/a\0b", "/\ud800"])
def test_folder_that_is_no_path(allowed: Path, staging: Staging, path: str) -> None:
    with pytest.raises(InvalidRequest, match="path"):
        from_folder(path, [Path("/")], staging, LIMIT)


def test_folder_that_does_not_exist(allowed: Path, staging: Staging) -> None:
    with pytest.raises(NotFound, match="there is no folder") as missing:
        from_folder(str(allowed / "nobody"), [allowed], staging, LIMIT)
    assert missing.value.code == "adapter_not_found"


def test_folder_with_a_pickle(allowed: Path, staging: Staging) -> None:
    folder = adapter(allowed / "bot")
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterRefused, match=r"adapter_model\.bin is a pickle, which is never read"):
        from_folder(str(folder), [allowed], staging, LIMIT)


def test_folder_of_adapterhub(allowed: Path, staging: Staging) -> None:
    folder = adapter(allowed / "bot")
    (folder / WEIGHTS_FILE).rename(folder / "adapter.safetensors")
    from_folder(str(folder), [allowed], staging, LIMIT)
    assert staged(staging) == {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"}
    (folder / "model_head.safetensors").write_bytes(b"head")
    with pytest.raises(AdapterRefused, match=r"has model_head\.safetensors: .* --output OUT"):
        from_folder(str(folder), [allowed], staging, LIMIT)
    (folder / "adapter.safetensors").unlink()
    (folder / "pytorch_adapter.bin").write_bytes(b"pickle")
    second = Staging(staging.path.parent / "second")
    second.path.mkdir()
    with pytest.raises(AdapterRefused, match=r"its pytorch_adapter\.bin is a pickle"):
        from_folder(str(folder), [allowed], second, LIMIT)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_folder_with_something_that_is_no_file(allowed: Path, staging: Staging, kind: str) -> None:
    folder = adapter(allowed / "bot")
    (folder / WEIGHTS_FILE).unlink()
    if kind == "pipe":
        os.mkfifo(folder / WEIGHTS_FILE)
    else:
        (folder / WEIGHTS_FILE).mkdir()
    with pytest.raises(AdapterRefused, match="is not a regular file"):
        from_folder(str(folder), [allowed], staging, LIMIT)


def test_folder_with_a_loop_of_links(allowed: Path, staging: Staging) -> None:
    folder = adapter(allowed / "bot")
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).symlink_to(folder / CONFIG_FILE)
    with pytest.raises(InvalidRequest):
        from_folder(str(folder), [allowed], staging, LIMIT)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_folder_with_a_large_file(allowed: Path, staging: Staging, name: str) -> None:
    folder = adapter(allowed / "bot")
    os.truncate(folder / name, CONFIG_LIMIT + 1)
    with pytest.raises(TooLarge, match=f"{name} has 1,048,577 bytes; at most 1,048,576"):
        from_folder(str(folder), [allowed], staging, CONFIG_LIMIT)
    assert name not in staged(staging)


# ---- the hub --------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's file API as a download needs: HEAD and GET of /<repo>/resolve/<revision>/<file>."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]]
    failing: bool
    requests: list[tuple[str, str]]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        self.requests.append((self.command, name))
        if self.failing:
            return self._send(500, {})
        if repo not in self.repos:
            return self._send(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        data = self.repos[repo].get(name)
        if data is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._send(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{name}-{len(data)}"'}, data, body=body)

    def _send(self, status: int, headers: dict[str, str], data: bytes = b"", *, body: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """A hub on this machine: its address, and the handler class with its content."""
    handler = type("ThisHub", (Hub,), {"repos": {"team/bot": dict(FILES)}, "failing": False, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_hub(hub: tuple[str, type[Hub]], tmp_path: Path, staging: Staging, revision: str | None) -> None:
    hub[1].repos["team/bot"]["adapter_model.bin"] = b"pickle"
    commit = from_hub(
        "team/bot", staging, LIMIT, revision=revision, endpoint=hub[0], cache_dir=tmp_path / "hf"
    )
    assert commit == COMMIT
    assert staged(staging) == FILES
    asked = {name for _, name in hub[1].requests}
    assert asked == {*FILES, *TEXT_FILES}, "and never the pickle"


def test_hub_files_of_a_tokenizer_come_along(
    hub: tuple[str, type[Hub]], tmp_path: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub[1].repos["team/bot"] |= {"tokenizer.json": b"{}", "chat_template.jinja": b"hi", "vocab.json": b"{}"}
    from_hub("team/bot", staging, LIMIT, endpoint=hub[0], cache_dir=tmp_path / "hf")
    wanted = FILES | {"tokenizer.json": b"{}", "chat_template.jinja": b"hi"}
    assert staged(staging) == wanted
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    second = Staging(tmp_path / "second")
    second.path.mkdir()
    from_hub("team/bot", second, LIMIT, endpoint=hub[0], cache_dir=tmp_path / "hf")
    assert staged(second) == wanted


def test_folder_files_of_a_tokenizer_come_along(allowed: Path, staging: Staging) -> None:
    folder = adapter(allowed / "bot")
    for name in TEXT_FILES:
        (folder / name).write_bytes(name.encode())
    (folder / "tokenizer.model").write_bytes(b"not read")
    from_folder(str(folder), [allowed], staging, LIMIT)
    found = staged(staging)
    assert found.keys() == {CONFIG_FILE, WEIGHTS_FILE, *TEXT_FILES}
    assert all(found[name] == name.encode() for name in TEXT_FILES)


def test_a_tokenizer_file_outside_of_the_roots_is_refused(
    allowed: Path, staging: Staging, tmp_path: Path
) -> None:
    folder = adapter(allowed / "bot")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(Forbidden):
        from_folder(str(folder), [allowed], staging, LIMIT)
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(TooLarge, match=r"chat_template\.jinja has 1,048,577 bytes"):
        from_folder(str(folder), [allowed], staging, LIMIT)


def test_hub_with_adapterhubs_names(hub: tuple[str, type[Hub]], tmp_path: Path, staging: Staging) -> None:
    repo = hub[1].repos["team/bot"]
    repo["adapter.safetensors"] = repo.pop(WEIGHTS_FILE)
    from_hub("team/bot", staging, LIMIT, endpoint=hub[0], cache_dir=tmp_path / "hf")
    assert staged(staging) == FILES
    repo["pytorch_model_head.bin"] = b"pickle"
    with pytest.raises(AdapterRefused, match=r"has pytorch_model_head\.bin: .* --output OUT"):
        from_hub("team/bot", staging, LIMIT, endpoint=hub[0], cache_dir=tmp_path / "hf2")
    assert ("GET", "pytorch_model_head.bin") not in hub[1].requests


def test_hub_without_connection_uses_the_cache(
    hub: tuple[str, type[Hub]], tmp_path: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hf"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EngineUnavailable, match="'team/bot' is not in its cache") as unavailable:
        from_hub("team/bot", staging, LIMIT, endpoint=hub[0], cache_dir=cache)
    assert (unavailable.value.status, unavailable.value.code) == (503, "hub_unavailable")
    monkeypatch.undo()
    from_hub("team/bot", staging, LIMIT, endpoint=hub[0], cache_dir=cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    second = Staging(tmp_path / "second")
    second.path.mkdir()
    assert from_hub("team/bot", second, LIMIT, endpoint=hub[0], cache_dir=cache) == COMMIT
    assert staged(second) == FILES


def test_hub_checks_sizes_before_downloading(
    hub: tuple[str, type[Hub]], tmp_path: Path, staging: Staging
) -> None:
    hub[1].repos["team/bot"][WEIGHTS_FILE] = b"x" * 5000
    with pytest.raises(TooLarge, match=r"adapter_model\.safetensors has 5,000 bytes; at most 4,999"):
        from_hub("team/bot", staging, 4999, endpoint=hub[0], cache_dir=tmp_path / "hf")
    assert ("HEAD", WEIGHTS_FILE) in hub[1].requests
    assert ("GET", WEIGHTS_FILE) not in hub[1].requests
    assert staged(staging) == {}


def test_hub_refusals(hub: tuple[str, type[Hub]], tmp_path: Path, staging: Staging) -> None:
    def fetch(repo: str, revision: str | None = None) -> None:
        from_hub(repo, staging, LIMIT, revision=revision, endpoint=hub[0], cache_dir=tmp_path / "hf")

    for malformed in ("not an id!", "a/b/c", "../x", ""):
        with pytest.raises(InvalidRequest, match="is not a hub id"):
            fetch(malformed)
    with pytest.raises(NotFound, match="'team/nobody' is not on the Hugging Face hub"):
        fetch("team/nobody")
    with pytest.raises(NotFound, match="'team/bot' at revision 'v9' is not on the"):
        fetch("team/bot", "v9")
    del hub[1].repos["team/bot"][WEIGHTS_FILE]
    with pytest.raises(AdapterRefused, match=r"holds no adapter.*adapter_model\.bin are not read"):
        fetch("team/bot")
    assert staged(staging) == {}


def test_hub_transport_errors_and_full_disk(
    tmp_path: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> None:
        def download(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        from_hub("team/bot", staging, LIMIT, cache_dir=tmp_path / "hf")

    with pytest.raises(EngineUnavailable, match=r"did not send 'team/bot' \(ConnectionResetError\)"):
        fail(ConnectionResetError())
    with pytest.raises(StorageFull, match="no room for a download from the hub"):
        fail(OSError(errno.ENOSPC, "No space left on device"))


def test_the_hub_client_brings_no_torch() -> None:
    """The HTTP process may load it, and must stay small."""
    program = (
        "import sys, veneer.adapters.sources; from huggingface_hub import hf_hub_download\n"
        "sys.exit(int(any(name in sys.modules for name in ('torch', 'transformers'))))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
