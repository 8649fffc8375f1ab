"""Chat templates that come with adapters, rendered in processes of their own.

jinja2's sandbox keeps a template from Python's attributes. It does not keep it from running for ever or from
taking all memory, when it is compiled (constants are folded) or rendered. So a template of an adapter is compiled
and rendered by a child that has little memory, no environment worth reading, and an alarm that ends it. What the
child says is its answer; when it ends instead, the request is refused and the next one gets a new child.

    python -m veneer.server.sandbox     the child: jobs on stdin, answers on stdout, until stdin closes
"""

from __future__ import annotations

import os
import queue
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import IO, Any

import msgspec

from veneer.errors import InvalidRequest
from veneer.server.template import ChatTemplate

SECONDS = 2.0  # for one job
MEMORY = 512 << 20  # bytes of a child's address space
TEXT_LIMIT = 16 << 20  # bytes of a rendered conversation
PENALTY = 60.0  # seconds for which a template that ended its child is not tried again
_MESSAGE = 2000  # characters of an error: a template chooses them
_KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")  # of the environment


class _Job(msgspec.Struct):
    """Compile a template and, if there are messages, render them: the arguments of `ChatTemplate`."""

    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]] = []
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []


class _Answer(msgspec.Struct):
    text: str = ""
    error: str | None = None
    param: str | None = None


class Sandbox:
    """A few children, each started when it is first needed. Safe to use from several threads."""

    def __init__(self, children: int = 2) -> None:
        self._free: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._children = children
        for _ in range(children):
            self._free.put(None)

    def close(self) -> None:
        """End the children, waiting for those at work."""
        for _ in range(self._children):
            if child := self._free.get():
                _end(child)

    def run(self, job: _Job) -> str:
        """The rendered text. Raises InvalidRequest when the template fails, or goes beyond a limit."""
        try:
            data = msgspec.json.encode(job)
        except RecursionError:
            raise InvalidRequest("messages: they are nested too deep.", param="messages") from None
        child = self._free.get()
        try:
            child = child or _start()
            answer = _exchange(child, data)
            if answer is None:
                status, child = _end(child), None
                raise InvalidRequest(_why_ended(status), param="messages", code="template_limit")
        except BaseException:
            if child is not None:  # it may be in the middle of an answer
                _end(child)
                child = None
            raise
        finally:
            self._free.put(child)
        if answer.error is not None:
            raise InvalidRequest(answer.error, param=answer.param)
        return answer.text


class SandboxedTemplate:
    """An adapter's template, with the interface of `ChatTemplate`."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], sandbox: Sandbox) -> None:
        """Raises InvalidRequest when the template cannot be compiled."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._sandbox = sandbox
        self._refused_until = 0.0  # by the monotonic clock
        self._run(_Job(source, self._special_tokens))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt's text, as `ChatTemplate.render`; it may take seconds. Raises InvalidRequest."""
        chat = [dict(message) for message in messages]
        return self._run(
            _Job(
                self.source,
                self._special_tokens,
                chat,
                add_generation_prompt,
                continue_final_message,
                dict(variables or {}),
                [dict(tool) for tool in tools],
            )
        )

    def _run(self, job: _Job) -> str:
        if time.monotonic() < self._refused_until:
            raise InvalidRequest(
                "messages: the adapter's chat template went beyond its limits less than "
                f"{PENALTY:.0f} s ago; repair the template, or send the prompt to /v1/completions.",
                param="messages",
                code="template_limit",
            )
        try:
            return self._sandbox.run(job)
        except InvalidRequest as error:
            if error.code == "template_limit":
                self._refused_until = time.monotonic() + PENALTY
            raise


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "veneer.server.sandbox"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _KEPT if name in os.environ},
        start_new_session=True,  # the terminal's Ctrl-C is for the server
    )


def _exchange(child: subprocess.Popen[bytes], job: bytes) -> _Answer | None:
    """The answer to an encoded job; None when the child ended without one."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        _write(child.stdin, job)
    except BrokenPipeError:
        return None
    data = _read(child.stdout)
    return None if data is None else msgspec.json.decode(data, type=_Answer)


def _end(child: subprocess.Popen[bytes]) -> int:
    """Its exit status, at once."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # it ended with a job half read
    if child.poll() is None:
        try:
            child.wait(0.2)  # an idle one ends when its stdin closes
        except subprocess.TimeoutExpired:
            child.kill()
    return child.wait()


def _why_ended(status: int) -> str:
    if status == -signal.SIGALRM:
        return f"messages: the adapter's chat template did not finish within {SECONDS:g} s."
    return f"messages: the adapter's chat template ended its process ({status}); it may need too much memory."


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    size = int.from_bytes(pipe.read(8), "little")
    data = pipe.read(size)
    return data if size and len(data) == size else None


# ---- the child ------------------------------------------------------------------------------------------


def main() -> None:
    """Answer jobs until stdin closes."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(limit, (value, value))
    compiled = lru_cache(maxsize=32)(_compile)
    while (data := _read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody handles the alarm: it ends the process
        answer = _answer(data, compiled)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(sys.stdout.buffer, msgspec.json.encode(answer))


def _compile(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


def _answer(data: bytes, compiled: Any) -> _Answer:
    try:
        job = msgspec.json.decode(data, type=_Job)
        template = compiled(job.source, tuple(sorted(job.special_tokens.items())))
        if not job.messages:
            return _Answer()
        text = template.render(
            job.messages,
            add_generation_prompt=job.add_generation_prompt,
            continue_final_message=job.continue_final_message,
            variables=job.variables,
            tools=job.tools,
        )
        size = len(text.encode())
    except InvalidRequest as error:
        return _Answer(error=error.message[:_MESSAGE], param=error.param)
    except Exception as error:
        what = f"messages: the adapter's chat template cannot be used: {type(error).__name__}: {error}"
        return _Answer(error=what[:_MESSAGE], param="messages")
    if size > TEXT_LIMIT:
        return _Answer(
            error=f"messages: the adapter's chat template makes {size:,} bytes of this conversation; "
            f"at most {TEXT_LIMIT:,} are taken.",
            param="messages",
        )
    return _Answer(text)


if __name__ == "__main__":
    main()
