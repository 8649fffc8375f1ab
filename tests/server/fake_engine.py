"""A process that speaks the engine's protocol with a toy model, so that server tests use the real wire.

The model repeats its prompt, in a cycle, from a start that the seed chooses when the temperature is not 0;
an adapter moves the start by one. It ends with the end-of-sequence token after `--repeats` rounds. Prompts are
scored in two halves; the likeliest token at each place is 1, the prompt's own the second. Pooled, a prompt is its
own tokens. Every message it gets is appended to `--log` as one JSON line. It imports no torch.

An adapter's config steers its check: `refuse` is the message to refuse it with, `ineffective` refuses it unless
that is allowed, `wait_for` is the path of a file without which the answer waits, `tasks` how many it has.

A job has a step for each line of its data and epoch, or `steps`; its state, checkpoints and result are in its
folder, and it goes on from there. `adapter.options` of its training steers it: see `Job`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from veneer.adapters.recipes import parse
from veneer.engine.config import EngineConfig
from veneer.engine.messages import (
    AdapterChecked,
    AdapterInfo,
    AdapterStats,
    Cancel,
    CancelMerge,
    CheckAdapter,
    CheckBlend,
    Done,
    DropAdapter,
    EngineInfo,
    Generate,
    JobReport,
    MergeAdapters,
    Merged,
    MergeProgress,
    Outputs,
    PinAdapter,
    Ready,
    Reply,
    Request,
    SequenceOutput,
    Shutdown,
    StartJob,
    Stats,
    StopJob,
    TokenLogprobs,
    WireError,
    encoder,
    request_decoder,
)

EOS = 0
VOCAB_SIZE = 512
HIDDEN_SIZE = 8
CONTEXT = 256


def model(request: Generate, repeats: int) -> Iterator[int]:
    """The tokens that follow a prompt."""
    sampling = request.sampling
    start = sampling.seed if sampling.temperature else 0
    start += request.adapter is not None
    for step in itertools.count():
        if step == repeats * len(request.prompt) and not sampling.ignore_eos:
            yield EOS
        yield request.prompt[(start + step) % len(request.prompt)]


class Sequence:
    """One request under way."""

    def __init__(self, request: Generate, repeats: int) -> None:
        self.request = request
        self.tokens = model(request, repeats)
        self.count = 0
        self.scored = 0  # tokens of the prompt
        self.expires = None if request.deadline is None else time.monotonic() + request.deadline

    def step(self) -> SequenceOutput:
        sampling = self.request.sampling
        if sampling.pooling is not None:
            vector = pooled(self.request)
            return SequenceOutput(id=self.request.id, finish_reason="length", pooled=vector)
        if self.expires is not None and time.monotonic() > self.expires:
            message = f"The request did not finish within its {self.request.deadline:g} seconds."
            return SequenceOutput(id=self.request.id, error=WireError(504, "deadline_exceeded", message))
        prompt, scores = self.request.prompt, []
        if sampling.prompt_logprobs is not None and self.scored < len(prompt) - 1:
            half = len(prompt) // 2 if self.scored == 0 else len(prompt) - 1
            scores = [
                score(prompt[at + 1], at + 1, sampling.prompt_logprobs) for at in range(self.scored, half)
            ]
            self.scored = half
            if half < len(prompt) - 1:
                return SequenceOutput(id=self.request.id, prompt_logprobs=scores)
        if sampling.max_tokens == 0:
            return SequenceOutput(id=self.request.id, prompt_logprobs=scores, finish_reason="length")
        token = next(self.tokens)
        self.count += 1
        stops = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        reason = "stop" if stops else "length" if self.count == sampling.max_tokens else None
        logprobs = []
        if sampling.logprobs is not None:
            top = [token, *range(1, sampling.logprobs)][: sampling.logprobs]
            logprobs = [TokenLogprobs(-0.5, top, [-0.5 - 0.25 * n for n in range(len(top))], 1)]
        return SequenceOutput(
            id=self.request.id,
            prompt_logprobs=scores,
            tokens=[token],
            logprobs=logprobs,
            finish_reason=reason,
            stop_token=token if stops else None,
            cached_tokens=len(self.request.prompt) // 2,
        )


def pooled(request: Generate) -> bytes:
    """A number for each token of the prompt, in its order; what follows is 1, or 2 with an adapter. Scaled."""
    rest = [1.0 + (request.adapter is not None)] * HIDDEN_SIZE
    tokens = request.prompt if request.sampling.pooling == "mean" else []
    vector = [*tokens, *rest][:HIDDEN_SIZE][: request.sampling.dimensions]
    length = math.hypot(*vector)
    return struct.pack(f"<{len(vector)}f", *(number / length for number in vector))


def score(token: int, position: int, count: int) -> TokenLogprobs:
    """Of a token of the prompt."""
    top = [1, token, *range(2, count)][:count]
    return TokenLogprobs(-0.25 * position, top, [-0.125 * position * (n + 1) for n in range(len(top))], 2)


class Job:
    """A training, one step a call. Options:

    invalid    the message with which its data are refused
    wait_at    a step before which it waits for the file `wait_for`
    fail_at    a step at which it fails
    die_at     a step at which it ends the engine, the first `die_times` times (1)
    held_out   rows that it leaves for the evaluation
    config     of the adapters that it makes, by step; "result" for the result
    """

    def __init__(self, message: StartJob) -> None:
        self.id, self.folder = message.id, Path(message.folder)
        self.training = json.loads((self.folder / "training.json").read_text())
        self.options = self.training.get("adapter", {}).get("options", {})
        (data,) = (self.folder / "data").glob("training.*")
        self.rows = len(data.read_text().splitlines())
        self.total = self.training.get("steps") or int(self.rows * self.training["epochs"])
        self.state = self.folder / "state.json"
        self.done = json.loads(self.state.read_text()) if self.state.exists() else 0
        self.began = False

    def begin(self) -> Iterator[JobReport]:
        if "invalid" in self.options:
            yield self.report("failed", error=WireError(400, "invalid_rows", self.options["invalid"], "file"))
            return
        yield self.report("validated", data={"rows": self.rows})
        if self.done:
            yield self.report("notice", message=f"goes on at step {self.done}")
        for step in range(1, self.done + 1):
            yield self.progress(step)
        for folder in sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:])):
            yield self.checkpoint(int(folder.name[11:]))

    def step(self) -> Iterator[JobReport]:
        if not self.began:
            self.began = True
            yield from self.begin()
            return
        step = self.done + 1
        if self.options.get("wait_at") == step and not Path(self.options["wait_for"]).exists():
            return
        if self.options.get("fail_at") == step:
            yield self.report("failed", error=WireError(500, "nan_loss", f"the loss is NaN at step {step}"))
            return
        if self.options.get("die_at") == step:
            deaths = self.folder / "deaths"
            count = int(deaths.read_text()) if deaths.exists() else 0
            deaths.write_text(str(count + 1))
            if count < self.options.get("die_times", 1):
                os._exit(9)
        if self.done < self.total:
            yield from self.train(step)
        if self.done == self.total:
            data = {"step": self.total, "tokens": 10 * self.total, "folder": self.save("result", "result")}
            if rows := self.options.get("held_out"):
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (self.folder / "held_out.jsonl").write_text(text)
            yield self.report("succeeded", data=data)

    def progress(self, step: int) -> JobReport:
        loss = {"train_loss": 1 / step} | ({"valid_loss": 2 / step} if step % 2 == 0 else {})
        numbers = {"step": step, "total_steps": self.total, "tokens": 10 * step, "seconds": 0.5 * step}
        return self.report("progress", data=numbers | {"learning_rate": 0.1} | loss)

    def train(self, step: int) -> Iterator[JobReport]:
        yield self.progress(step)
        if step % self.training.get("checkpoint_every", self.rows) == 0:
            self.save(f"checkpoint-{step}", str(step))
            yield self.checkpoint(step)
        self.state.write_text(str(step))
        self.done = step

    def checkpoint(self, step: int) -> JobReport:
        data = {"step": step, "folder": str(self.folder / f"checkpoint-{step}"), "train_loss": 1 / step}
        return self.report("checkpoint", data=data)

    def save(self, name: str, config: str) -> str:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        settings = {"peft_type": "LORA"} | self.options.get("config", {}).get(config, {})
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        (folder / "adapter_model.safetensors").write_bytes(f"{self.training.get('seed')} {name}".encode())
        return str(folder)

    def report(self, kind: str, **fields: Any) -> JobReport:
        return JobReport(id=self.id, kind=kind, **fields)


class FakeEngine:
    def __init__(self, address: str, config: EngineConfig, options: argparse.Namespace) -> None:
        self.config, self.options = config, options
        self.socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PAIR)
        self.socket.linger = 0  # what nobody reads must not keep the process
        self.socket.connect(address)
        self.sequences: dict[str, Sequence] = {}
        self.checks: list[CheckAdapter] = []  # not answered yet
        self.adapters: set[str] = set()
        self.pinned: set[str] = set()
        self.jobs: list[Job] = []  # the first is trained

    def serve(self) -> None:
        time.sleep(self.options.load_seconds)
        self.send(Ready(info=self.info()))
        while os.getppid() == self.options.parent:
            timeout = int(self.options.step_seconds * 1000) if self.sequences or self.jobs else 100
            while self.socket.poll(timeout):
                timeout = 0
                message = request_decoder.decode(self.socket.recv())
                self.log(message)
                if isinstance(message, Shutdown):
                    return
                self.handle(message)
            self.checks = [check for check in self.checks if not self.checked(check)]
            self.step()

    def handle(self, message: Request) -> None:
        match message:
            case Generate():
                self.accept(message)
            case Cancel():
                self.sequences.pop(message.id, None)
            case CheckAdapter():
                self.checks.append(message)
            case CheckBlend():
                self.send(self.blended(message))
            case MergeAdapters():
                self.merge(message)
            case CancelMerge():
                error = WireError(409, "merge_cancelled", "cancelled in the toy")
                self.send(Merged(call=message.call, error=error))
            case DropAdapter():
                self.adapters.discard(message.digest)
                self.send(Done(call=message.call))
            case PinAdapter():
                self.send(Done(call=message.call, error=self.pin(message)))
            case StartJob():
                self.jobs.append(Job(message))
            case StopJob():
                for job in [job for job in self.jobs if job.id == message.id]:
                    self.jobs.remove(job)
                    self.send(job.report("stopped", data={"step": job.done}))

    def pin(self, message: PinAdapter) -> WireError | None:
        if message.pinned and len(self.pinned | {message.key}) >= self.config.max_loras:
            return WireError(409, "conflict", f"{len(self.pinned)} are pinned already")
        (self.pinned.add if message.pinned else self.pinned.discard)(message.key)
        return None

    def accept(self, message: Generate) -> None:
        if len(self.sequences) < self.config.max_queue:
            self.sequences[message.id] = Sequence(message, self.options.repeats)
            return
        error = WireError(429, "queue_full", f"The queue is full ({self.config.max_queue} sequences).")
        self.send(Outputs(items=[SequenceOutput(id=message.id, error=error)]))

    def blended(self, message: CheckBlend) -> AdapterChecked:
        """A blend has the rank that it is cut to, which costs a tenth. Ranks over --max-lora-rank are refused."""
        recipe = parse(message.key)
        assert recipe is not None
        rank = recipe.rank or 8 * len(recipe.parts)
        if rank > self.config.max_lora_rank:
            error = WireError(400, "adapter_refused", f"the ranks add up to {rank}; send max_rank")
            return AdapterChecked(call=message.call, error=error)
        info = AdapterInfo(
            kind="blend",
            primitives=["low_rank"],
            rank=rank,
            sites=1,
            bytes=1024,
            error=0.1 if recipe.rank else None,
        )
        return AdapterChecked(call=message.call, info=info)

    def merge(self, message: MergeAdapters) -> None:
        """The first part's config: `merge_dies` ends the process, `merge_waits` to be cancelled, `merge_refuse`."""
        recipe = parse(message.key)
        assert recipe is not None
        blob = Path(self.config.store) / "blobs" / recipe.parts[0].key
        config = json.loads((blob / "adapter_config.json").read_text())
        for done in range(3):
            self.send(MergeProgress(call=message.call, done=done, total=2))
        if config.get("merge_dies"):
            (Path(message.folder) / "half").write_text("written")
            os._exit(9)
        if config.get("merge_waits"):
            return
        if why := config.get("merge_refuse"):
            self.send(Merged(call=message.call, error=WireError(400, "adapter_refused", why)))
            return
        (Path(message.folder) / "adapter_config.json").write_text("{}")
        (Path(message.folder) / "adapter_model.safetensors").write_text(message.key)
        self.send(Merged(call=message.call, distance=0.25, warnings=["merged by a toy"]))

    def checked(self, message: CheckAdapter) -> bool:
        """Answer a check, unless it has to wait."""
        config = json.loads((Path(message.folder) / "adapter_config.json").read_text())
        if "wait_for" in config and not Path(config["wait_for"]).exists():
            return False
        ineffective = config.get("ineffective") and not message.allow_ineffective
        if "refuse" in config or ineffective:
            error = WireError(400, "adapter_refused", config.get("refuse", "it changes nothing"), "files")
            self.send(AdapterChecked(call=message.call, error=error))
            return True
        base = config.get("base_model_name_or_path", "")
        info = AdapterInfo(
            kind="lora",
            primitives=["low_rank"],
            rank=8,
            sites=1,
            bytes=1024,
            base_model=base,
            tasks=config.get("tasks", 0),
            added_tokens=config.get("added_tokens", 0),
        )
        self.adapters.add(message.digest)
        self.send(AdapterChecked(call=message.call, info=info))
        return True

    def step(self) -> None:
        items = [sequence.step() for sequence in self.sequences.values()]
        for item in items:
            if item.finish_reason or item.error:
                del self.sequences[item.id]
        if items:
            self.send(Outputs(items=items))
        for report in list(self.jobs[0].step()) if self.jobs else []:
            self.send(report)
            if report.kind in ("succeeded", "failed"):
                del self.jobs[0]
        self.send(self.stats())

    def send(self, message: Reply) -> None:
        self.socket.send(encoder.encode(message))

    def log(self, message: Request) -> None:
        line = {"type": type(message).__name__} | msgspec.to_builtins(message)
        with self.options.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def info(self) -> EngineInfo:
        return EngineInfo(
            model_type="fake",
            device="cpu",
            device_name="none",
            dtype="float32",
            quantization=self.config.quantization,
            kernels="torch",
            base_bytes=0,
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            max_model_len=self.options.context,
            eos_token_ids=[EOS],
            num_pages=1,
            page_size=16,
            max_loras=self.config.max_loras,
            max_lora_rank=self.config.max_lora_rank,
            adapter_memory=0,
            host_adapter_memory=0,
        )

    def stats(self) -> Stats:
        return Stats(
            running=len(self.sequences),
            waiting=0,
            pages_used=0,
            pages_total=1,
            steps=0,
            eager_steps=0,
            prefill_tokens=0,
            decode_tokens=0,
            draft_tokens=0,
            accepted_draft_tokens=0,
            prefix_hit_tokens=0,
            prefix_query_tokens=0,
            preemptions=0,
            adapters=self.adapter_stats(),
            device_adapter_bytes=0,
            host_adapter_bytes=0,
        )

    def adapter_stats(self) -> dict[str, AdapterStats]:
        used = Counter(sequence.request.adapter for sequence in self.sequences.values())
        known = self.adapters | self.pinned | {digest for digest in used if digest is not None}
        return {
            digest: AdapterStats(
                host=True, device=digest in self.pinned, pinned=digest in self.pinned, running=used[digest]
            )
            for digest in known
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--step-seconds", type=float, default=0.002)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--exit-at-start", action="store_true")
    parser.add_argument("address")
    options = parser.parse_args()
    options.parent = os.getppid()
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    if options.exit_at_start:
        sys.exit(3)
    FakeEngine(options.address, config, options).serve()


if __name__ == "__main__":
    main()
