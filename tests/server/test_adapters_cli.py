"""`veneer adapters …` against a real server."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from tests.server.conftest import MakeServer, Server

from veneer.server.cli import main
from veneer.server.state import ServerConfig


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other/base"}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 100_000)
    return folder


class Cli:
    """Runs the command against a server; `out` and `err` are the last run's."""

    def __init__(self, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
        self.url, self._capsys = server.url, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        status = main(["adapters", *arguments, "--url", self.url])
        self.out, self.err = self._capsys.readouterr()
        return status


@pytest.fixture
def cli(make_server: MakeServer, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(make_server(adapters=("sql",)).until_ready(), capsys)


def test_pushes_a_folder_of_adapterhub(cli: Cli, lora: Path) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter.safetensors")
    assert cli("push", "hub", str(lora)) == 0
    assert cli.out.startswith("hub version 1 digest ")
    (lora / "model_head.safetensors").write_bytes(b"head")
    assert cli("push", "hub", str(lora)) == 1
    assert "model_head.safetensors: AdapterHub's library trains the output head" in cli.err


def test_the_life_of_an_adapter(cli: Cli, lora: Path) -> None:
    assert cli("push", "org/new", str(lora)) == 0
    assert cli.out.startswith("org/new version 1 digest ")
    assert "warning: the adapter's config names the base 'other/base'" in cli.err
    archive = lora.parent / "new.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("adapter_config.json", "{}")
        file.writestr("adapter_model.safetensors", b"two")
    assert cli("push", "org/new", str(archive)) == 0
    assert cli.out.startswith("org/new version 2 ")

    assert cli("alias", "prod", "org/new@1") == 0
    assert cli.out == "prod -> org/new@1\n"
    assert cli("pin", "org/new") == 0
    assert cli("unpin", "org/new") == 0
    assert cli.out == "org/new unpinned\n"
    assert cli("rollback", "org/new") == 0
    assert cli.out == "org/new is now version 1\n"
    assert cli("rollback", "org/new", "2") == 0
    assert cli.out == "org/new is now version 2\n"

    assert cli("list") == 0
    header, new, sql = cli.out.splitlines()
    assert header.split()[:7] == ["NAME", "VERSION", "KIND", "PRIMITIVES", "PORTABILITY", "RANK", "TASKS"]
    assert new.split()[:10] == ["org/new", "2", "lora", "low_rank", "independent", "8", "-", "-", "-", "1024"]
    assert sql.split()[:2] == ["sql", "1"]

    assert cli("show", "org/new") == 0
    shown = dict(line.split(maxsplit=1) for line in cli.out.splitlines() if not line.startswith("version  "))
    assert (shown["primitives"], shown["bytes"], shown["own_tokenizer"]) == ("low_rank", "1024 B", "False")
    assert [line.split()[1] for line in cli.out.splitlines()[-2:]] == ["1", "2"]
    assert cli.out.splitlines()[-1].endswith("current")

    assert cli("rm", "org/new") == 1
    assert "'prod'" in cli.err
    assert cli("alias", "prod", "--remove") == 0
    assert cli("rm", "org/new") == 0
    assert cli.out == "org/new deleted\n"
    assert cli("list") == 0
    assert len(cli.out.splitlines()) == 2


def test_an_adapter_that_changes_nothing_needs_the_flag(cli: Cli, lora: Path) -> None:
    (lora / "adapter_config.json").write_text('{"ineffective": true}')
    assert cli("push", "idle", str(lora)) == 1
    assert "changes nothing" in cli.err
    assert cli("push", "idle", str(lora), "--allow-ineffective") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rm", "nothing"], "'nothing'"),
        (["alias", "prod"], "TARGET"),
        (["rollback", "sql", "first"], "'first'"),
        (["push", "x", "{folder}"], "adapter_config.json is missing"),
        (["push", "x", "{folder}/file.bin"], "not a folder, nor an archive"),
        (["push", "bad name", "{folder}/lora"], "'bad name'"),
    ],
)
def test_faults_are_named(cli: Cli, lora: Path, arguments: list[str], says: str) -> None:
    (lora.parent / "file.bin").write_bytes(b"")
    assert cli(*(argument.format(folder=lora.parent) for argument in arguments)) == 1
    assert cli.err.startswith("veneer: ")
    assert says in cli.err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", "--url", "http://127.0.0.1:1"]) == 1
    assert "No answer from http://127.0.0.1:1" in capsys.readouterr().err


def test_the_key_comes_from_the_flag_or_the_environment(
    make_server: MakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig(api_keys=("plain",), admin_key="admin")
    cli = Cli(make_server(config=config, adapters=("sql",)).until_ready(), capsys)
    assert cli("list") == 1
    assert "API key" in cli.err
    monkeypatch.setenv("VENEER_API_KEY", "plain")
    assert cli("list") == 0
    assert cli("pin", "sql") == 1
    assert "--admin-api-key" in cli.err
    assert cli("pin", "sql", "--api-key", "admin") == 0
    monkeypatch.setenv("VENEER_ADMIN_API_KEY", "admin")
    assert cli("unpin", "sql") == 0
