"""The `veneer` command: `serve`, `prepare`, `train`, `plan`, `eval`, `adapters`, `merge` and `conformance`.

Flags have vLLM's names where vLLM has the flag. This module parses and dispatches, nothing more. Each
subcommand imports what it needs when it runs: `veneer --help` is fast, and the server imports no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import veneer
from veneer.engine.source import DEFAULT_MODEL
from veneer.errors import VeneerError
from veneer.server.tool_calls.registry import FAMILIES
from veneer.training.evaluation.metrics import Metric
from veneer.training.recipe import Kind

DEFAULT_URL = "http://127.0.0.1:8000"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{prefix}I": 1 << shift for prefix, shift in (("K", 10), ("M", 20), ("G", 30), ("T", 40))}


def size(text: str) -> int:
    """Bytes from `1048576`, `512MiB`, `4GiB`, `2GB`, `1.5G`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] == "I":
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes or for example 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number, 0 included."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def days(text: str) -> float:
    """More than none, at most ten thousand."""
    value = _number(text)
    if not 0 < value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days above 0, at most 10000")
    return value


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose a free one."""
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """A finite time in seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def share(text: str) -> float:
    """A part, above 0 to 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, at most 1")
    return value


def factor(text: str) -> float:
    """A number of at least 1."""
    value = _number(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def rate(text: str) -> float:
    """A finite number above 0."""
    if (value := seconds(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def lora_module(text: str) -> tuple[str, str]:
    """`name=path` as vLLM's --lora-modules takes it."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def default_store() -> Path:
    """Where adapters live unless --store says otherwise: the user's data folder."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "veneer" / "store"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Each subcommand sets `run`, which takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="veneer", description="Many adapters on one quantized base model.")
    parser.add_argument("--version", action="version", version=f"veneer {veneer.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve a base model and its adapters over HTTP"))
    _add_prepare(
        commands.add_parser("prepare", help="download or convert a base model, so that serve starts fast")
    )
    _add_train(commands.add_parser("train", help="train an adapter from a recipe"))
    _add_plan(commands.add_parser("plan", help="suggest a recipe for data, and predict its memory and time"))
    _add_eval(
        commands.add_parser("eval", help="compare models of a running server on rows with known answers")
    )
    _add_adapters(
        commands.add_parser("adapters", help="manage the adapters of a running server, or convert one")
    )
    _add_merge(
        commands.add_parser("merge", help="make one adapter of several, or put them into a base's weights")
    )
    _add_conformance(
        commands.add_parser("conformance", help="compare every kind of adapter with its own library")
    )
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="folder, hub id or GGUF file (%(default)s)"
    )
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    http.add_argument(
        "--port", type=port, default=8000, help="port to listen on, 0 = any free one (%(default)s)"
    )
    http.add_argument("--served-model-name", help="the base's name in requests (the model's own name)")
    http.add_argument(
        "--api-key",
        action="append",
        default=[],
        help="needed for all routes but /health and /ready; repeatable (also VENEER_API_KEY)",
    )
    http.add_argument(
        "--admin-api-key", help="needed to add, change and delete adapters (also VENEER_ADMIN_API_KEY)"
    )
    http.add_argument(
        "--tool-call-parser",
        choices=sorted(FAMILIES),
        help="the form of function calls (seen from the chat template)",
    )
    http.add_argument(
        "--request-timeout",
        type=seconds,
        default=600.0,
        help="seconds a request may take, 0 = any (%(default)s)",
    )
    http.add_argument(
        "--shutdown-timeout",
        type=seconds,
        default=30.0,
        help="seconds running requests get on SIGTERM (%(default)s)",
    )
    http.add_argument("--max-upload", type=size, default=size("4GiB"), help="largest adapter upload (4GiB)")
    http.add_argument(
        "--max-responses",
        type=natural,
        default=10_000,
        help="newest responses of /v1/responses that are stored; 0: none (%(default)s)",
    )
    http.add_argument(
        "--response-days",
        type=days,
        default=30.0,
        help="how long a response is stored (%(default)s)",
    )
    http.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    http.add_argument("--access-log", action="store_true", help="log every HTTP request")

    base = parser.add_argument_group("base model")
    base.add_argument("--quantization", choices=("nf4", "int8", "none"), default="nf4")
    base.add_argument(
        "--nf4-kernels",
        choices=("auto", "packed", "bitsandbytes"),
        default="auto",
        help="what multiplies NF4 weights; auto is packed, our own kernels, on CUDA in bfloat16 (%(default)s)",
    )
    base.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    base.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    base.add_argument("--max-model-len", type=positive, help="tokens of prompt and answer together")
    base.add_argument("--max-num-seqs", type=positive, default=64, help="sequences in one step (%(default)s)")
    base.add_argument("--max-num-batched-tokens", type=positive, help="tokens in one step")
    base.add_argument("--max-queue", type=positive, default=1024, help="waiting sequences (%(default)s)")
    base.add_argument("--kv-cache-memory", type=size, metavar="SIZE", help="KV cache, for example 4GiB")
    base.add_argument("--block-size", type=positive, default=16, help="tokens in one KV page (%(default)s)")
    base.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    base.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    base.add_argument(
        "--cuda-graphs",
        choices=("decode", "all"),
        default="all",
        help="which steps; all: also those with prompt chunks, or dense or sparse changes (%(default)s)",
    )
    base.add_argument("--threads", type=positive, help="CPU threads of the engine")

    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--store", type=Path, default=default_store(), help="folder of adapters (%(default)s)"
    )
    adapters.add_argument(
        "--lora-modules",
        type=lora_module,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="adapters to register at the start: a folder or a hub id each",
    )
    adapters.add_argument(
        "--adapter-dir",
        type=Path,
        action="append",
        default=[],
        help="clients may load adapters from folders below it by path; repeatable (none)",
    )
    adapters.add_argument("--max-loras", type=positive, default=8, help="device slots (%(default)s)")
    adapters.add_argument(
        "--max-lora-rank", type=positive, default=512, help="largest rank taken (%(default)s)"
    )
    adapters.add_argument(
        "--max-added-tokens",
        type=positive,
        default=256,
        help="tokens that an adapter may add to the vocabulary (%(default)s)",
    )
    adapters.add_argument(
        "--max-module-bytes",
        type=size,
        default=256 << 20,
        metavar="SIZE",
        help="of a weight that an adapter replaces or changes in full (256MiB)",
    )
    adapters.add_argument("--adapter-memory", type=size, metavar="SIZE", help="adapters on the device")
    adapters.add_argument("--host-adapter-memory", type=size, metavar="SIZE", help="adapters in host memory")
    adapters.add_argument(
        "--hot-adapter-memory",
        type=size,
        default=0,
        metavar="SIZE",
        help="for a merged copy of the adapter that most tokens are for, on the CPU; 0: none is made (0)",
    )
    adapters.add_argument(
        "--hot-adapter-format",
        choices=("full", "nf4"),
        default="full",
        help="of that copy: full, the type that is computed in, or nf4, quantized again (%(default)s)",
    )

    jobs = parser.add_argument_group("fine-tuning jobs")
    jobs.add_argument(
        "--training-share",
        type=share,
        default=0.5,
        help="of the processor's time for training while requests run, above 0 to 1 (%(default)s)",
    )
    jobs.add_argument(
        "--training-latency",
        type=factor,
        default=1.5,
        help="on CUDA: time between tokens beside a job over that without (%(default)s)",
    )
    jobs.add_argument(
        "--training-memory",
        type=size,
        metavar="SIZE",
        help="device memory kept free of KV cache for training",
    )
    jobs.add_argument("--max-file", type=size, default=size("512MiB"), help="largest file of rows (512MiB)")
    jobs.add_argument("--max-files", type=positive, default=1000, help="files that are stored (%(default)s)")
    jobs.add_argument(
        "--max-jobs",
        type=positive,
        default=1000,
        help="jobs that are remembered; the oldest that are over are forgotten first (%(default)s)",
    )
    jobs.add_argument(
        "--max-unfinished-jobs",
        type=positive,
        default=64,
        help="jobs that wait, run or are paused (%(default)s)",
    )
    jobs.add_argument(
        "--max-checkpoints",
        type=positive,
        default=100,
        help="newest checkpoints of a job that are served (%(default)s)",
    )
    parser.set_defaults(run=_serve)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="folder, hub id or GGUF file (%(default)s)"
    )
    parser.set_defaults(run=_prepare)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter of an earlier run")
    parser.set_defaults(run=_train)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints a recipe for `veneer train`, with reasons and predictions as comments. No weights are read."
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="rows: .jsonl, .csv or .parquet"
    )
    parser.add_argument("--base", metavar="MODEL", help="folder, hub id or GGUF file (the default base)")
    parser.add_argument(
        "--method", choices=("supervised", "dpo", "self_supervised"), help="what the rows are for (by format)"
    )
    parser.add_argument("--kind", choices=get_args(Kind), default="lora", help="of adapter (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="that must do (all of this machine's)")
    parser.add_argument("--quantization", choices=("nf4", "int8", "none"), help="of the base (what fits)")
    parser.add_argument("--rank", type=positive, help="instead of the suggestion")
    parser.add_argument("--batch-size", type=positive, help="instead of the suggestion")
    parser.add_argument("--max-length", type=positive, help="instead of the suggestion, in tokens")
    parser.add_argument("--tflops", type=rate, help="of the device's matrix products (measured)")
    parser.add_argument("--bandwidth", type=rate, metavar="GB/S", help="of its memory (measured)")
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.set_defaults(run=_plan)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Exit status 0 when done, 3 when the last model does not pass --at-least or --no-worse-than."
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="rows: .jsonl, .csv or .parquet"
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        help="name, name@version, alias, or base; repeatable, the base first and the newest last",
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        choices=get_args(Metric),
        help="repeatable (all of such rows, of answers without perplexity)",
    )
    parser.add_argument(
        "--template",
        choices=("chat", "none"),
        default="chat",
        help="prompts as chat messages, or put as they are (%(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, help="of an answer, at most (%(default)s)"
    )
    parser.add_argument("--rows", type=positive, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--concurrency", type=positive, default=16, help="questions open at a time (%(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="HTML", help="write a report with plots and examples")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")
    parser.add_argument(
        "--at-least",
        type=float,
        metavar="VALUE",
        help="of the last model's first metric, as 0.95; of perplexity at most",
    )
    parser.add_argument(
        "--no-worse-than",
        choices=("base", "previous"),
        help="the last model against the first, or the one before it, by the first metric",
    )
    _add_server(parser)
    parser.set_defaults(run=_eval)


def _add_server(parser: argparse.ArgumentParser) -> None:
    """Where a running server is."""
    parser.add_argument(
        "--url", default=os.environ.get("VENEER_URL", DEFAULT_URL), help="the server (%(default)s)"
    )
    parser.add_argument("--api-key", help="key of the server (also VENEER_ADMIN_API_KEY or VENEER_API_KEY)")


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    shared = argparse.ArgumentParser(add_help=False)
    _add_server(shared)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, *arguments: str, optional: str | None = None) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, parents=[shared])
        for argument in arguments:
            sub.add_argument(argument)
        if optional is not None:
            sub.add_argument(optional, nargs="?")
        sub.set_defaults(run=_adapters)
        return sub

    push = action("push", "upload an adapter: a folder, a .zip, a .tar.gz or a hub id", "name", "source")
    push.add_argument("--revision", help="branch, tag or commit of a hub id")
    push.add_argument(
        "--allow-ineffective", action="store_true", help="take it also if it does not change the output"
    )
    action("list", "list adapters")
    export = action("export", "write the files of an adapter into a new folder, as PEFT loads them", "name")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    action("show", "show everything about an adapter, or one version of it as name@version", "name")
    action("rm", "delete an adapter with all its versions", "name")
    alias = action("alias", "point an alias at a name or name@version", "alias", optional="target")
    alias.add_argument("--remove", action="store_true", help="remove the alias instead")
    action("rollback", "make the version before current again, or the given one", "name", optional="version")
    action("pin", "keep an adapter on the device", "name")
    action("unpin", "let an adapter be evicted again", "name")
    convert = actions.add_parser(
        "convert",
        help="make the two files of an upload of what libraries save otherwise; needs no server",
        description="With --weights, a plain LoRA of PEFT's unconverted PiSSA, OLoRA or KaSA; of the folder of "
        "PEFT's Arrow router and its experts, one adapter; else the files of AdapterHub's library or pyreft, which "
        "may be pickles, as two files.",
    )
    convert.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="the adapter as its library saved it"
    )
    convert.add_argument(
        "--weights",
        metavar="MODEL",
        help="folder or hub id of the unquantized weights that the training loaded; none for a router",
    )
    convert.add_argument(
        "--fusion",
        type=Path,
        metavar="LAYER",
        help="folder of the AdapterFusion layer over the given adapters",
    )
    convert.add_argument(
        "--kind", choices=("noreft", "direft"), help="what AdapterHub's files of ReFT do not tell"
    )
    convert.add_argument(
        "--first", type=int, default=0, metavar="N", help="pyreft: act on the first N tokens"
    )
    convert.add_argument("--last", type=int, default=0, metavar="N", help="pyreft: act on the last N tokens")
    convert.add_argument("--activation", help="pyreft: its act_fn, if there was one")
    convert.add_argument(
        "--output", type=Path, required=True, metavar="OUT", help="a new folder; nothing is overwritten"
    )
    convert.set_defaults(run=_convert)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "On a running server, NAME becomes a new adapter out of several of its own. With --into-base, the adapters "
        "are folders, and the result is a checkpoint of the base with their changes in it; needs no server."
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[=WEIGHT]", help="weights are 1 unless told")
    parser.add_argument("--name", help="what the new adapter is called")
    parser.add_argument("--method", default="linear", help="docs/blends.md lists them (%(default)s)")
    parser.add_argument("--density", type=float, help="of the entries of each change, how many stay")
    parser.add_argument("--majority-sign-method", choices=("total", "frequency"))
    parser.add_argument("--seed", type=int, help="of methods that draw entries")
    parser.add_argument("--rank", type=positive, help="of methods that end in svd")
    parser.add_argument("--allow-ineffective", action="store_true", help="take it also if it changes nothing")
    parser.add_argument(
        "--url", default=os.environ.get("VENEER_URL", DEFAULT_URL), help="the server (%(default)s)"
    )
    parser.add_argument("--api-key", help="key of the server (also VENEER_ADMIN_API_KEY or VENEER_API_KEY)")
    parser.add_argument("--into-base", metavar="MODEL", help="folder or hub id of the unquantized weights")
    parser.add_argument("--output", type=Path, metavar="DIR", help="with --into-base: a new folder")
    parser.set_defaults(run=_merge)


def _add_conformance(parser: argparse.ArgumentParser) -> None:
    parser.description = "Exit status 0 only if every kind is served as its library serves it, or refused."
    parser.add_argument(
        "--base",
        default="tiny",
        metavar="FOLDER",
        help="a model's folder, or tiny: a random one (%(default)s)",
    )
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="methods or kinds that match, for example 'LORA*'"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a list of objects")
    form.add_argument(
        "--markdown",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the tables of docs/adapters.md, or into FILE",
    )
    parser.set_defaults(run=_conformance)


def _serve(arguments: argparse.Namespace) -> int:
    from veneer.server.serve import serve

    return serve(arguments)


def _prepare(arguments: argparse.Namespace) -> int:
    from veneer.server.serve import resolve_model

    print(resolve_model(arguments.model))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from veneer.training.planning.plan import main as plan

    return plan(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from veneer.training.train import main as train

    train(arguments.recipe, overwrite=arguments.overwrite)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from veneer.server.eval_cli import run

    return run(arguments)


def _adapters(arguments: argparse.Namespace) -> int:
    from veneer.server.adapters_cli import run

    return run(arguments)


def _merge(arguments: argparse.Namespace) -> int:
    from veneer.server.merge_cli import run

    return run(arguments)


def _convert(arguments: argparse.Namespace) -> int:
    from veneer.server.adapters_cli import convert

    return convert(arguments)


def _conformance(arguments: argparse.Namespace) -> int:
    from veneer.training.conformance.table import main as conformance

    return conformance(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except VeneerError as error:
        print(f"veneer: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
