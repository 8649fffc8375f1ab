"""The engine process: `python -m veneer.engine.process ADDRESS`, its configuration as JSON on stdin.

One loop: take messages, step, send what came out; on a GPU the next step is computing meanwhile. It ends when
its parent does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable

import msgspec
import zmq

from veneer.engine import messages
from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine

STATS_INTERVAL = 0.25  # seconds
IDLE_POLL = 100  # milliseconds; also how soon the parent's death is noticed
BLOCKED_POLL = 5  # milliseconds, while sequences wait and nothing can run


def start(make: Callable[[str, EngineConfig], Loop]) -> None:
    """Read what the parent sent, and run until it ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    # Ctrl-C reaches the whole group; the server decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    make(sys.argv[1], config).run()


class Loop:
    """Messages in, steps, messages out."""

    def __init__(self, address: str, config: EngineConfig) -> None:
        self._parent = os.getppid()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)  # the server reads always; a lost message would hang a client
        self._socket.connect(address)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._engine = Engine(config, wake=self._wake)
        self._last_stats = 0.0

    def run(self) -> None:
        self._send(messages.Ready(self._engine.info()))
        ran = False
        while os.getppid() == self._parent:
            waiting = BLOCKED_POLL if self._engine.has_work else IDLE_POLL
            self._receive(0 if ran else waiting)
            replies, ran = self._step()
            for reply in replies:
                self._send(reply)
            self._report()

    def _receive(self, timeout: int) -> None:
        ready = dict(self._poller.poll(timeout))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        while self._socket in ready:
            try:
                raw = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            for reply in self._handle(messages.request_decoder.decode(raw)):
                self._send(reply)

    def _handle(self, request: messages.Request) -> list[messages.Reply]:
        return self._engine.handle(request)

    def _step(self) -> tuple[list[messages.Reply], bool]:
        return self._engine.step()

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._last_stats >= STATS_INTERVAL:
            self._last_stats = now
            self._send(self._engine.stats())

    def _send(self, reply: messages.Reply) -> None:
        self._socket.send(messages.encoder.encode(reply))

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already


if __name__ == "__main__":
    start(Loop)
