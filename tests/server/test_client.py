"""EngineClient against a real process that speaks the protocol (fake_engine.py)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.server.conftest import FAKE_ENGINE, WAIT

from veneer.engine.client import EngineClient, NewSequence, RestartPolicy
from veneer.engine.config import EngineConfig
from veneer.engine.messages import JobReport, SamplingParams
from veneer.errors import DeadlineExceeded, EngineUnavailable, InvalidRequest
from veneer.training.recipe import Adapter, Training

PROMPT = [5, 6, 7]
FAST = RestartPolicy(pause=0.01)
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)
ENDLESS = SamplingParams(max_tokens=1_000_000, temperature=0.0, ignore_eos=True)


@asynccontextmanager
async def running(
    folder: Path, *options: str, restart: RestartPolicy = FAST, ready: bool = True
) -> AsyncIterator[EngineClient]:
    config = EngineConfig(model="none", store=str(folder))
    command = [sys.executable, str(FAKE_ENGINE), "--log", str(folder / "log"), *options]
    client = EngineClient(config, command=command, restart=restart)
    await client.start()
    try:
        if ready:
            await client.wait_ready(WAIT)
        yield client
    finally:
        await client.stop(drain_timeout=0)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.01)


def received(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [line for line in map(json.loads, lines) if line["type"] == kind]


async def tokens(client: EngineClient, prompt: list[int], sampling: SamplingParams = GREEDY) -> list[int]:
    return [
        token async for output in client.generate(prompt, sampling, None, None) for token in output.tokens
    ]


def test_it_generates_and_reports(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            assert client.info is not None
            assert client.info.max_model_len == 256
            assert await tokens(client, PROMPT) == [*PROMPT, 0]
            assert await asyncio.gather(*(tokens(client, [n]) for n in range(1, 50))) == [
                [n, 0] for n in range(1, 50)
            ]
            await until(lambda: client.stats is not None)
            assert received(tmp_path, "Cancel") == []  # what has finished is not cancelled
        assert client.state == "dead"
        assert len(received(tmp_path, "Shutdown")) == 1

    asyncio.run(main())


def test_who_takes_long_gets_fewer_outputs(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            with client.submit([NewSequence(PROMPT, ENDLESS)], None, None) as generation:
                seen: list[int] = []
                async for _, output in generation:
                    seen += output.tokens
                    if len(output.tokens) > 3:
                        break
                    await until(lambda: generation._inbox.qsize() > 3)
            assert seen == [PROMPT[i % len(PROMPT)] for i in range(len(seen))]

    asyncio.run(main())


def test_scores_of_a_prompt_that_came_meanwhile_are_joined(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            sampling = msgspec.structs.replace(ENDLESS, prompt_logprobs=0)
            with client.submit([NewSequence([5] * 9, sampling)], None, None) as generation:
                await until(lambda: generation._inbox.qsize() > 3)
                _, output = await anext(generation)
            assert [entry.logprob for entry in output.prompt_logprobs] == [-0.25 * at for at in range(1, 9)]
            assert len(output.tokens) > 1

    asyncio.run(main())


def test_leaving_a_generation_cancels_what_still_runs(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            short = NewSequence(PROMPT, GREEDY)
            with client.submit([short, NewSequence(PROMPT, ENDLESS)], None, None) as generation:
                async for position, output in generation:
                    if position == 0 and output.finish_reason:
                        break
            await until(lambda: received(tmp_path, "Cancel"))
            (cancelled,) = received(tmp_path, "Cancel")
            assert cancelled["id"] == received(tmp_path, "Generate")[1]["id"]

    asyncio.run(main())


def test_closing_or_cancelling_the_iterator_cancels_the_sequence(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            outputs = client.generate(PROMPT, ENDLESS, None, None)
            assert (await anext(outputs)).tokens == [5]
            await outputs.aclose()  # type: ignore[attr-defined]
            await until(lambda: len(received(tmp_path, "Cancel")) == 1)
            task = asyncio.create_task(tokens(client, PROMPT, ENDLESS))
            await until(lambda: len(received(tmp_path, "Generate")) == 2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: len(received(tmp_path, "Cancel")) == 2)
            assert [m["id"] for m in received(tmp_path, "Cancel")] == [
                m["id"] for m in received(tmp_path, "Generate")
            ]

    asyncio.run(main())


def test_one_member_can_be_cancelled(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            count = [0, 0]
            short = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
            with client.submit(
                [NewSequence(PROMPT, ENDLESS), NewSequence(PROMPT, short)], None, None
            ) as both:
                async for position, output in both:
                    count[position] += len(output.tokens)
                    if count[0] == 3:
                        both.cancel(0)
            assert count == [3, 30]

    asyncio.run(main())


def test_a_killed_engine_fails_everything_at_once_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, "--step-seconds", "0.02") as client:
            await client.pin_adapter("d" * 64)
            waiting = [asyncio.create_task(tokens(client, PROMPT, ENDLESS)) for _ in range(5)]
            await until(lambda: len(received(tmp_path, "Generate")) == 5)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            before = time.monotonic()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert time.monotonic() - before < 5
            assert all(isinstance(result, EngineUnavailable) for result in results), results
            assert "killed by signal 9" in str(results[0])
            with pytest.raises(EngineUnavailable, match="starting after the engine process died"):
                await tokens(client, PROMPT)
            await client.wait_ready(WAIT)
            assert client.restarts == 1
            assert await tokens(client, PROMPT) == [*PROMPT, 0]
            assert [m["key"] for m in received(tmp_path, "PinAdapter")] == ["d" * 64] * 2

    asyncio.run(main())


def test_too_many_deaths_are_final(tmp_path: Path) -> None:
    async def main() -> None:
        policy = RestartPolicy(limit=2, pause=0.001)
        async with running(tmp_path, "--exit-at-start", restart=policy, ready=False) as client:
            with pytest.raises(EngineUnavailable, match=r"dead.*exit code 3"):
                await client.wait_ready(WAIT)
            assert client.state == "dead"
            assert client.restarts == 2
            with pytest.raises(EngineUnavailable):
                await client.check_adapter("x", "y")

    asyncio.run(main())


def test_a_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        config = EngineConfig(model="none", store=str(tmp_path))
        client = EngineClient(config, command=["/does/not/exist"], restart=RestartPolicy(limit=0))
        await client.start()
        with pytest.raises(EngineUnavailable, match="could not be started"):
            await client.wait_ready(WAIT)
        await client.stop()

    asyncio.run(main())


def test_calls_are_answered_or_refused(tmp_path: Path) -> None:
    async def main() -> None:
        for name, config in (("good", {}), ("bad", {"refuse": "rank is 100000"})):
            (tmp_path / name).mkdir()
            (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        async with running(tmp_path) as client:
            info = await client.check_adapter(str(tmp_path / "good"), "d" * 64)
            assert (info.kind, info.rank) == ("lora", 8)
            with pytest.raises(InvalidRequest, match="rank is 100000") as refused:
                await client.check_adapter(str(tmp_path / "bad"), "e" * 64)
            assert (refused.value.code, refused.value.param) == ("adapter_refused", "files")
            await client.pin_adapter("d" * 64)
            await client.drop_adapter("d" * 64)
            assert client.pinned == frozenset()

    asyncio.run(main())


def test_a_call_fails_when_the_engine_dies(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            assert client.pid is not None
            os.kill(client.pid, signal.SIGSTOP)  # it hangs, then it is gone
            call = asyncio.create_task(client.check_adapter(str(tmp_path), "d" * 64))
            with pytest.raises(DeadlineExceeded):  # the engine says nothing; the client's own clock does
                await anext(client.generate(PROMPT, ENDLESS, None, 0.01))
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(EngineUnavailable):
                await call

    asyncio.run(main())


def test_stopping_lets_running_sequences_finish(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, "--step-seconds", "0.01") as client:
            long = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
            work = asyncio.create_task(tokens(client, PROMPT, long))
            await until(lambda: received(tmp_path, "Generate"))
            pid = client.pid
            assert pid is not None
            stop = asyncio.create_task(client.stop(drain_timeout=WAIT))
            await asyncio.sleep(0)
            assert client.state == "draining"
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await tokens(client, PROMPT)
            assert len(await work) == 50
            await stop
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    asyncio.run(main())


def test_a_sequence_that_does_not_finish_is_cut_off_at_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            work = asyncio.create_task(tokens(client, PROMPT, ENDLESS))
            await until(lambda: received(tmp_path, "Generate"))
            await client.stop(drain_timeout=0.05)
            with pytest.raises(EngineUnavailable):
                await work

    asyncio.run(main())


# ---- training -------------------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.news: list[str] = []

    def engine_ready(self) -> None:
        self.news.append("ready")

    def engine_lost(self) -> None:
        self.news.append("lost")

    def job_report(self, report: JobReport) -> None:
        self.news.append(report.kind)


def job_folder(folder: Path, **options: Any) -> str:
    (folder / "job" / "data").mkdir(parents=True)
    (folder / "job" / "data" / "training.jsonl").write_text("{}\n")
    training = Training(steps=2, adapter=Adapter(options=options))
    (folder / "job" / "training.json").write_text(training.model_dump_json(exclude_unset=True))
    return str(folder / "job")


def test_a_job_is_followed_across_deaths(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            client.job_listener = listener = Listener()
            client.start_job("j", job_folder(tmp_path, die_at=2))
            await until(lambda: listener.news[-1:] == ["ready"])
            assert listener.news[0] == "validated"
            assert listener.news[-2:] == ["lost", "ready"]
            client.start_job("j", str(tmp_path / "job"))
            await until(lambda: listener.news[-1] == "succeeded")
            client.stop_job("j")  # it is over: the engine hears nothing
            assert received(tmp_path, "StopJob") == []

    asyncio.run(main())


def test_stopping_lets_training_save_its_state(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as client:
            client.job_listener = listener = Listener()
            client.start_job("j", job_folder(tmp_path, wait_at=2, wait_for=str(tmp_path / "never")))
            await until(lambda: "progress" in listener.news)
            await client.stop(drain_timeout=WAIT)
            assert listener.news[-2:] == ["stopped", "lost"]
            assert len(received(tmp_path, "StopJob")) == 1
            with pytest.raises(EngineUnavailable):
                client.start_job("k", "nowhere")

    asyncio.run(main())
