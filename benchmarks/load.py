"""Sends streaming requests over HTTP at given times and notes when each piece of an answer arrives.

A client of its own: an ordinary one takes longer for an event than the server does. Each request is a raw socket
on one asyncio loop, each event costs one search, and the requests are dealt out to several processes. `fire`
starts those; run as a module this file is one of them (a job as JSON on stdin, results on stdout). Needs
nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

POPULARITIES = ("identical", "uniform", "zipf", "distinct")
ROOT = Path(__file__).parent.parent

_TEXT = re.compile(rb'"(?:content|text)":\s*"[^"]')  # an event with text: not the role, not the end
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


class Shot(NamedTuple):
    """One request: when to send it, in seconds from the start, to which model, and how many tokens to ask for."""

    at: float
    model: str
    prompt: str
    output: int


@dataclass
class Result:
    """What became of a shot. Times in seconds from the start of the load."""

    model: str
    due: float
    sent: float = 0.0
    events: list[float] = field(default_factory=list)  # arrival of each event with text
    tokens: int = 0  # as the server counts them
    error: str | None = None


def choose(popularity: str, adapters: int, requests: int, seed: int) -> list[int]:
    """The adapter of each request. Zipf: the k-th adapter is asked for in proportion to 1/k."""
    generator = random.Random(seed)
    match popularity:
        case "identical":
            return [0] * requests
        case "distinct":
            return [index % adapters for index in range(requests)]
        case "uniform":
            return [generator.randrange(adapters) for _ in range(requests)]
        case "zipf":
            weights = list(itertools.accumulate(1 / (index + 1) for index in range(adapters)))
            return generator.choices(range(adapters), cum_weights=weights, k=requests)
    raise ValueError(f"popularity {popularity!r} is not one of {', '.join(POPULARITIES)}")


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process, `rate` a second."""
    generator, now, found = random.Random(seed), 0.0, []
    while (now := now + generator.expovariate(rate)) < seconds:
        found.append(now)
    return found


def prompt_words(tokens: int, vocabulary: int, seed: int) -> str:
    """Words of the random checkpoint's tokenizer, one token each (see benchmarks/models.py)."""
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(vocabulary)}" for _ in range(tokens))


def make_shots(
    models: Sequence[str],
    times: Sequence[float],
    popularity: str,
    *,
    vocabulary: int,
    prompt: int,
    output: int,
    seed: int,
) -> list[Shot]:
    """One request for each time, each with a prompt of its own."""
    chosen = choose(popularity, len(models), len(times), seed)
    return [
        Shot(at, models[adapter], prompt_words(prompt, vocabulary, seed + index), output)
        for index, (at, adapter) in enumerate(zip(times, chosen, strict=True))
    ]


def request_bytes(netloc: str, shot: Shot) -> bytes:
    """A greedy chat request that is answered with exactly as many tokens as were asked for."""
    body = json.dumps(
        {
            "model": shot.model,
            "messages": [{"role": "user", "content": shot.prompt}],
            "max_tokens": shot.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return (head + body).encode()


def fire(url: str, shots: Sequence[Shot], *, processes: int, timeout: float) -> list[Result]:
    """Send every shot at its time; returns when all are answered or `timeout` seconds have passed for one."""
    parts = [part for part in (shots[index::processes] for index in range(processes)) if part]
    workers = []
    try:
        for part in parts:
            worker = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.load"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            workers.append(worker)
            _tell(worker, {"url": url, "shots": part, "timeout": timeout})
        for worker in workers:
            _answer(worker)  # it has read its job
        start = time.monotonic() + 0.02
        for worker in workers:
            _tell(worker, start)
        return [Result(**each) for worker in workers for each in _answer(worker)]
    finally:
        for worker in workers:
            worker.kill()  # has ended already, unless something failed
            worker.communicate()


def _tell(worker: subprocess.Popen[bytes], message: Any) -> None:
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(message).encode() + b"\n")
    worker.stdin.flush()


def _answer(worker: subprocess.Popen[bytes]) -> Any:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError("a load process ended early; the reason is above")
    return json.loads(line)


# In a load process


class _Stream(asyncio.Protocol):
    """One request on a connection of its own. `done` ends when the answer has, or the connection."""

    def __init__(self, request: bytes, result: Result, start: float) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._result, self._start = request, result, start
        self._held = b""
        self._ok = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic() - self._start
        if not self._ok:
            self._held += data
            self._ok = self._held.startswith(b"HTTP/1.1 200")
            if not self._ok:
                return  # the body says why; it is complete when the connection closes
            data, self._held = self._held, b""
        *events, self._held = (self._held + data).split(b"\n\n")
        for event in events:
            if _TEXT.search(event):
                self._result.events.append(now)
            elif found := _USAGE.search(event):
                self._result.tokens = int(found[1])
            elif event.endswith(b"[DONE]"):
                self._finish(None)
            elif b'data: {"error"' in event:
                self._finish(event.decode(errors="replace"))

    def connection_lost(self, exception: Exception | None) -> None:
        self._finish(f"{exception or 'the connection closed early'}: {self._held[:500]!r}")

    def _finish(self, error: str | None) -> None:
        if not self.done.done():
            self._result.error = error
            self.done.set_result(None)


async def _send(url: str, shot: Shot, start: float, timeout: float) -> Result:
    parts = urlsplit(url)
    request = request_bytes(parts.netloc, shot)
    result = Result(shot.model, due=shot.at)
    await asyncio.sleep(start + shot.at - time.monotonic())
    result.sent = time.monotonic() - start
    transport = None
    try:
        async with asyncio.timeout(timeout):
            transport, stream = await asyncio.get_running_loop().create_connection(
                lambda: _Stream(request, result, start), parts.hostname or "127.0.0.1", parts.port or 80
            )
            await stream.done
    except TimeoutError:
        result.error = f"no whole answer within {timeout:g} s"
    except OSError as error:
        result.error = str(error)
    finally:
        if transport is not None:
            transport.close()
    return result


def _messages() -> Iterator[Any]:
    yield from map(json.loads, sys.stdin)


def main() -> None:
    """One load process: a job, "ready", the start on the monotonic clock, then the results."""
    incoming = _messages()
    job = next(incoming)
    shots = [Shot(*shot) for shot in job["shots"]]
    gc.disable()
    print(json.dumps("ready"), flush=True)
    start: float = next(incoming)

    async def run() -> list[Result]:
        return await asyncio.gather(*(_send(job["url"], shot, start, job["timeout"]) for shot in shots))

    print(json.dumps([asdict(result) for result in asyncio.run(run())]), flush=True)


if __name__ == "__main__":
    main()
