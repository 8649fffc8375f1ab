"""The `veneer` command: `serve`, `prepare`, `train`, `plan`, `eval`, `adapters`, `merge` and `conformance`.

Flags have vLLM's names where vLLM has the flag. This module parses and dispatches, nothing more. Each
subcommand imports what it needs when it runs: `veneer --help` is fast, and the server imports no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import veneer
from veneer.engine.source import DEFAULT_MODEL
from veneer.errors import VeneerError
from veneer.server.cli_values import (
    positive,
    rate,
    size,
)
from veneer.server.serve_options import add_serve
from veneer.training.evaluation.metrics import Metric
from veneer.training.recipe import Kind

DEFAULT_URL = "http://127.0.0.1:8000"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Each subcommand sets `run`, which takes the parsed arguments."""
    parser = argparse.ArgumentParser(prog="veneer", description="Many adapters on one quantized base model.")
    parser.add_argument("--version", action="version", version=f"veneer {veneer.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_serve(commands.add_parser("serve", help="serve a base model and its adapters over HTTP"))
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
