"""`veneer merge`: adapters of a running server into one, or folders of adapters into the weights of a base."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from veneer.errors import InvalidRequest, VeneerError, from_wire
from veneer.server.adapters_cli import answer_of, key_of

_OPTIONS = ("density", "majority_sign_method", "seed", "rank")


def run(arguments: argparse.Namespace) -> int:
    adapters = [_weighted(text) for text in arguments.adapters]
    if arguments.into_base is not None:
        return _into_base(arguments, adapters)
    if arguments.name is None or arguments.output is not None:
        raise InvalidRequest("a merge on a server needs --name, what the result is called, and no --output")
    body: dict[str, Any] = {
        "name": arguments.name,
        "adapters": [{"id": name, "weight": weight} for name, weight in adapters],
        "method": arguments.method,
        "stream": True,
        "allow_ineffective": arguments.allow_ineffective,
    }
    body |= {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    answer = _merge(arguments, body)
    for warning in answer["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    distance = "" if answer["distance"] is None else f", {answer['distance']:.3g} from the exact blend"
    print(f"{answer['id']} version {answer['version']}: {answer['kind']} of rank {answer['rank']}{distance}")
    return 0


def _merge(arguments: argparse.Namespace, body: dict[str, Any]) -> dict[str, Any]:
    """The adapter; progress goes to the terminal."""
    key = key_of(arguments)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(None, connect=10.0)  # between two layers of a large base minutes may pass
    try:
        with (
            httpx.Client(base_url=arguments.url, headers=headers, timeout=timeout) as client,
            client.stream("POST", "/v1/adapters/merge", json=body) as response,
        ):
            if not response.is_success:
                response.read()
                answer_of(response)
            try:
                return _follow(response)
            except KeyboardInterrupt:
                client.post(f"/v1/adapters/merge/{response.headers['x-veneer-merge']}/cancel")
                raise
    except httpx.TransportError as error:
        raise VeneerError(
            f"No answer from {arguments.url}: {error}. Is `veneer serve` running there?"
        ) from None


def _follow(response: httpx.Response) -> dict[str, Any]:
    """The adapter at the end of the events."""
    with tqdm(desc="merging", unit="layer", disable=None) as bar:
        for line in response.iter_lines():
            event = line.removeprefix("data: ")
            if not event.startswith("{"):
                continue
            found: dict[str, Any] = json.loads(event)
            if error := found.get("error"):
                raise from_wire(400, str(error["code"]), str(error["message"]), None)
            if found["object"] == "adapter":
                return found
            bar.total = found["total"]
            bar.update(found["done"] - bar.n)
    raise VeneerError("the server ended its answer before the merge was done; its log says why")


def _into_base(arguments: argparse.Namespace, adapters: list[tuple[str, float]]) -> int:
    if arguments.output is None or arguments.name is not None or arguments.method != "linear":
        raise InvalidRequest(
            "--into-base needs --output, a new folder, takes no --name, and only adds up (linear)"
        )
    if named := next((name for name in _OPTIONS if getattr(arguments, name) is not None), None):
        raise InvalidRequest(f"--{named.replace('_', '-')} does nothing with --into-base; leave it out")
    from veneer.engine.into_base import merge_into_base  # imports torch: some seconds
    from veneer.engine.source import resolve

    folders = [Path(name) for name, _ in adapters]
    model = resolve(arguments.into_base)
    report = merge_into_base(folders, [weight for _, weight in adapters], model, arguments.output)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{arguments.output}: {report.changed} of {report.tensors} tensors changed")
    return 0


def _weighted(text: str) -> tuple[str, float]:
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise InvalidRequest(f"{text!r}: after = stands the weight, a number") from None
