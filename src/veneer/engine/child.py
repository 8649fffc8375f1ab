"""One run of the engine process: spawn it, exchange messages, end it. Restarting is the client's business.

Messages travel over a zmq PAIR socket that this side binds. Imports no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq.asyncio
from zmq.constants import LINGER, PAIR

from veneer.engine.config import EngineConfig
from veneer.engine.messages import Reply, Request, Shutdown, encoder, reply_decoder

STOP_GRACE = 5.0  # seconds the engine has to exit after Shutdown, and again after SIGTERM


class EngineChild:
    """`run()` returns why the process ended; `send()` works in between."""

    def __init__(self, context: zmq.asyncio.Context, address: str, command: Sequence[str]) -> None:
        self.pid: int | None = None
        self._heard = False  # it has said something, so it also listens
        self._address = address
        self._command = [*command, address]
        self._socket = context.socket(PAIR)
        self._socket.set(LINGER, 0)
        self._socket.set_hwm(0)  # sending never blocks; the engine bounds its own queue

    def send(self, message: Request) -> None:
        """Hand a message to zmq and return at once."""
        if not self._socket.closed:
            asyncio.ensure_future(self._socket.send(encoder.encode(message))).add_done_callback(
                _forget_errors
            )

    async def run(
        self, config: EngineConfig, on_reply: Callable[[Reply], None], stopping: asyncio.Event
    ) -> str:
        """Serve until the process exits, or `stopping` is set and the process was asked to exit."""
        tasks: list[asyncio.Task[object]] = []
        process = None
        try:
            self._socket.bind(self._address)
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches the server alone, which drains, then ends the engine
            )
            self.pid = process.pid
            await _write_and_close(process, msgspec.json.encode(config))
            exited = asyncio.create_task(process.wait())
            receiving: asyncio.Task[object] = asyncio.create_task(self._receive(on_reply))
            asked = asyncio.create_task(stopping.wait())
            tasks = [exited, receiving, asked]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                self.send(Shutdown())
                return "the engine was stopped"
            if receiving.done():
                return f"the engine sent what cannot be read: {receiving.exception()!r}"
            return f"the engine process died ({_exit(exited.result())})"
        except OSError as error:
            return f"the engine process could not be started: {error}"
        finally:
            if process is not None:
                await _end(process, stopping=stopping.is_set(), listens=self._heard)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._socket.close()

    async def _receive(self, on_reply: Callable[[Reply], None]) -> None:
        while True:
            message = reply_decoder.decode(await self._socket.recv())
            self._heard = True
            on_reply(message)


def _forget_errors(sent: asyncio.Future[Any]) -> None:
    """A message that an ending engine did not take: its exit is reported elsewhere."""
    if not sent.cancelled():
        sent.exception()


async def _write_and_close(process: asyncio.subprocess.Process, data: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(data)
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
    except (BrokenPipeError, ConnectionResetError):
        pass  # it died already: its exit code says more


async def _end(process: asyncio.subprocess.Process, *, stopping: bool, listens: bool) -> None:
    """Leave no process behind. One that was asked to stop may do so by itself, if it can have heard that."""
    gentle = [lambda: None, process.terminate] if listens else [process.terminate]
    steps = [*gentle, process.kill] if stopping else [process.kill]
    for step in steps:
        if process.returncode is not None:
            return
        try:
            step()
            async with asyncio.timeout(STOP_GRACE):
                await process.wait()
        except (ProcessLookupError, TimeoutError):
            continue


def _exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
