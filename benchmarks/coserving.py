"""What training beside serving costs both: op `coserving`, one resident base for the two.

python -m benchmarks.coserving [--shapes 8b|packaged|tiny] [--share 0.5] [--output benchmarks/results]

A LoRA of rank 16 on all seven projections is trained while 16 requests decode on 8 adapters. Case `train`: time of
one trained token beside them; the peer is the training alone, and `kept` is what it keeps of its speed. Case
`itl-p99`: the 99th percentile of the time between two tokens beside the training; the peer is the same without it.
The training's share follows the governor (`veneer.training.governor`) as in a server.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.device import Row, device_name, measure_ceilings, print_rows, write_report
from benchmarks.engines import generate, random_engine, step_bytes, step_outputs
from benchmarks.models import SHAPES, make_base

from veneer.engine.base import Base
from veneer.engine.engine import Engine
from veneer.engine.view import trainable_view
from veneer.training.control import Stopped, turns
from veneer.training.data.encoding import Encoded
from veneer.training.governor import Governor
from veneer.training.kinds import Setting, make_trainable
from veneer.training.process import make_governor
from veneer.training.recipe import Adapter, Training
from veneer.training.trainer import Trainer
from veneer.training.worker import SWITCH_INTERVAL, on_own_stream

REQUESTS, ADAPTERS, PROMPT = 16, 8, 64
ENDLESS = 1_000_000  # steps


class Job:
    """A training in a thread of its own, until `stop`. It counts its tokens."""

    def __init__(self, base: Base, governor: Governor, length: int, batch: int) -> None:
        self.tokens = 0
        self.error: BaseException | None = None
        self.running = threading.Event()
        self._governor = governor
        self._arguments = base, length, batch
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Job:
        self._governor.begin()
        self._thread.start()
        self.running.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._governor.stop()
        self._thread.join()
        self._governor.end()
        if self.error is not None:
            raise self.error

    def report(self, kind: str, message: str = "", **data: Any) -> None:
        if kind == "progress":
            self.tokens = data["tokens"]
            self.running.set()

    def turn(self) -> None:
        self._governor.turn()

    def _run(self) -> None:
        base, length, batch = self._arguments
        try:
            with tempfile.TemporaryDirectory() as folder, on_own_stream(base.device):
                self._train(base, Path(folder), length, batch)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.running.set()

    def _train(self, base: Base, folder: Path, length: int, batch: int) -> None:
        draw = random.Random(0)
        ids = range(3, base.config.vocab_size)
        rows = [Encoded([], draw.choices(ids, k=length)) for _ in range(64)]
        training = Training(
            adapter=Adapter(rank=16),
            steps=ENDLESS,
            checkpoint_every=ENDLESS,
            batch_size=batch,
            max_length=length,
        )
        view = trainable_view(base)
        trainable = make_trainable(training, Setting(view, ENDLESS, "base", folder, list))
        with turns(view, self):
            Trainer(training, trainable, rows, [], 0, folder, self).run()


def serve(engine: Engine, governor: Governor, seconds: float) -> list[float]:
    """Times between two steps of the whole batch, in microseconds; new requests follow those that end."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    round_ = 0
    while time.perf_counter() < until:
        begun: list[float] = []
        for index in range(REQUESTS):
            name = f"r{time.monotonic()}-{round_}"
            engine.handle(generate(name, index, engine.base.config.vocab_size, PROMPT, 128, index % ADAPTERS))
        while engine.has_work:
            governor.serving(True)
            start = time.perf_counter()
            ended = len(step_outputs(engine))
            governor.stepped(time.perf_counter() - start)
            if ended == REQUESTS:
                begun.append(time.perf_counter())
        times += [(b - a) * 1e6 for a, b in pairwise(begun)]
        round_ += 1
    governor.serving(False)
    return times


def measure(base: Base, store: Path, share: float, seconds: float, length: int, batch: int) -> list[Row]:
    engine = random_engine(store, base, ADAPTERS, slots=ADAPTERS, batch=REQUESTS)
    governor = make_governor(base.device, share, 1.5)
    try:
        serve(engine, governor, seconds / 4)  # warm
        alone = serve(engine, governor, seconds)
        with Job(base, governor, length, batch) as job:
            solo_us = _token_us(job, lambda: time.sleep(seconds))
            beside: list[float] = []
            serve(engine, governor, seconds / 2)  # the share settles
            both_us = _token_us(job, lambda: beside.extend(serve(engine, governor, seconds)))
    finally:
        engine.close()
    (p50, p99), (p50_beside, p99_beside) = (
        map(float, np.percentile(each, (50, 99))) for each in (alone, beside)
    )
    floor = measure_ceilings().floor(step_bytes(base, REQUESTS, ADAPTERS, PROMPT + 64))
    latency = {"ratio": p99_beside / p99, "p50_us": p50_beside, "p50_alone_us": p50}
    kept = {"kept": solo_us / both_us, "share": governor.share, "tokens_per_s": 1e6 / both_us}
    return [
        Row("coserving", "itl-p99", p99_beside, floor, {"without training": p99}, latency),
        Row("coserving", "train", both_us, solo_us, {"alone": solo_us}, kept),
    ]


def _token_us(job: Job, during: Any) -> float:
    """Microseconds of a trained token while something else happens."""
    before, start = job.tokens, time.perf_counter()
    during()
    return (time.perf_counter() - start) * 1e6 / max(1, job.tokens - before)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", choices=[*SHAPES, "packaged"], default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--share", type=float, default=0.5, help="of the processor; on a GPU where it begins")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the three measurements")
    parser.add_argument("--length", type=int, default=512, help="tokens of a trained row")
    parser.add_argument("--batch", type=int, default=4, help="trained rows of a step")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sys.setswitchinterval(SWITCH_INTERVAL)
    print(device_name())
    with tempfile.TemporaryDirectory() as store:
        base = make_base(args.shapes, args.layers)
        rows = measure(base, Path(store), args.share, args.seconds, args.length, args.batch)
    print_rows(rows)
    latency, training = rows
    print(
        f"p99 between tokens {latency.extra['ratio']:.2f} times that without training, which keeps "
        f"{training.extra['kept']:.0%} of its speed (share {training.extra['share']:.2f})"
    )
    print(f"written to {write_report(args.output, 'coserving', rows, {})}")


if __name__ == "__main__":
    main()
