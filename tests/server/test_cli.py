"""The command line: sizes and flags, what reaches the engine, and that it stays quick to start."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.errors import InvalidRequest
from veneer.server.cli import build_parser, main
from veneer.server.cli_values import seconds, size
from veneer.server.serve import ServeOptions, options_from, resolve_model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("1.5G", 1_500_000_000),
        ("2 KB", 2000),
        ("3T", 3 * 10**12),
    ],
)
def test_size(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "4i", "4iB", "4XB", "0x10", "1e9", "∞", "٣"])
def test_size_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        size(text)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon"])
def test_seconds_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="seconds"):
        seconds(text)


def parse(*arguments: str) -> ServeOptions:
    return options_from(build_parser().parse_args(["serve", *arguments]), Path("/models/tiny"))


def test_serve_flags_reach_the_engine(tmp_path: Path) -> None:
    options = parse(
        "org/tiny",
        *("--quantization", "int8", "--dtype", "float32", "--device", "cpu"),
        *("--max-model-len", "512", "--max-num-seqs", "7", "--max-num-batched-tokens", "99"),
        *("--max-queue", "5", "--kv-cache-memory", "1GiB", "--block-size", "8", "--no-enable-prefix-caching"),
        *("--max-loras", "3", "--max-lora-rank", "32", "--adapter-memory", "64MiB"),
        *("--max-module-bytes", "8MiB", "--max-added-tokens", "5"),
        *("--host-adapter-memory", "128MiB", "--threads", "2", "--store", str(tmp_path)),
        *("--hot-adapter-memory", "1MiB", "--hot-adapter-format", "nf4"),
    )
    engine = options.engine
    assert (engine.model, engine.store) == ("/models/tiny", str(tmp_path))
    assert (engine.quantization, engine.dtype, engine.device) == ("int8", "float32", "cpu")
    assert (engine.max_model_len, engine.max_num_seqs, engine.max_num_batched_tokens) == (512, 7, 99)
    assert (engine.max_queue, engine.kv_cache_memory, engine.page_size) == (5, 1 << 30, 8)
    assert not engine.prefix_caching
    assert (engine.max_loras, engine.max_lora_rank, engine.max_added_tokens) == (3, 32, 5)
    assert engine.max_module_bytes == 8 << 20
    assert (engine.adapter_memory, engine.host_adapter_memory, engine.threads) == (64 << 20, 128 << 20, 2)
    assert (engine.hot_adapter_memory, engine.hot_adapter_format) == (1 << 20, "nf4")
    assert options.served_name == "org/tiny"


@pytest.mark.parametrize("flag", ["--hot-adapter-memory=some", "--hot-adapter-format=auto"])
def test_wrong_flags_are_refused(flag: str) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", flag])


def test_serve_flags_reach_the_server(tmp_path: Path) -> None:
    options = parse(
        "org/tiny",
        *("--host", "::1", "--port", "0", "--served-model-name", "base", "--api-key", "a", "--api-key", "b"),
        *("--admin-api-key", "root", "--request-timeout", "0", "--max-upload", "1MiB"),
        *("--adapter-dir", str(tmp_path), "--lora-modules", "x=/x", "y=org/y", "--lora-modules", "z=/z"),
        *("--shutdown-timeout", "3"),
    )
    server = options.server
    assert (server.host, server.port, options.served_name) == ("::1", 0, "base")
    assert (server.api_keys, server.admin_key) == (("a", "b"), "root")
    assert server.request_timeout is None
    assert server.max_upload_bytes == 1 << 20
    assert server.adapter_dirs == (tmp_path,)
    assert "org/tiny" in server.base_names
    assert options.lora_modules == (("x", "/x"), ("y", "org/y"), ("z", "/z"))
    assert options.shutdown_timeout == 3


def test_every_serve_flag_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is parsed and then forgotten would be accepted and ignored."""
    read: set[str] = set()

    class Recorder(argparse.Namespace):
        def __getattribute__(self, name: str) -> object:
            read.add(name)
            return super().__getattribute__(name)

    arguments = build_parser().parse_args(["serve"])
    options_from(Recorder(**vars(arguments)), Path("/models/tiny"))
    assert set(vars(arguments)) - read == {"command", "run", "log_level"}  # log_level is read by serve()


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_API_KEY", "from-env")
    monkeypatch.setenv("VENEER_ADMIN_API_KEY", "admin-env")
    options = parse()
    assert (options.server.api_keys, options.server.admin_key) == (("from-env",), "admin-env")
    assert parse("--api-key", "flag").server.api_keys == ("flag",)


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="--api-key is empty"):
        parse("--api-key", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--max-loras", "0"],
        ["serve", "--quantization", "fp3"],
        ["serve", "--adapter-memory", "much"],
        ["serve", "--lora-modules", "nopath"],
        ["serve", "--port", "70000"],
        ["adapters"],
        ["frobnicate"],
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: veneer" in capsys.readouterr().err


def test_resolve_model_takes_a_prepared_folder(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()


def test_an_unusable_model_ends_with_a_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(tmp_path / "nothing")]) == 1
    shown = capfd.readouterr().err
    assert "does not exist" in shown
    assert "could not be made ready" in shown


def test_the_server_side_imports_no_torch() -> None:
    program = (
        "import sys, veneer.server.cli, veneer.server.serve, veneer.server.adapters_cli;"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
