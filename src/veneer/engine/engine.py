"""The engine: base, adapters, scheduler and runner behind `handle` (a message) and `step` (one forward).

Not here: processes and sockets (process.py), policy (scheduler.py), tensors (runner.py).

With lookahead a step leaves the next one launched. That one is planned on what is certain, so some of its rows
may be for nothing: their sequence ended with the step before, or was taken out since. Their results are dropped,
and what they write is harmless. The device works in the order of the launches, so whoever gets their pages
writes later than they do, and reads only what it wrote; the prefix cache takes in pages at commit alone, which
skips them. An adapter's place is overwritten only after the steps that were launched before it was given up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import msgspec
import torch

from veneer.adapters.methods.base import Limits
from veneer.adapters.names import split_key
from veneer.adapters.program import Program
from veneer.adapters.recipes import digests_of, is_blend
from veneer.adapters.registry import lower
from veneer.adapters.residency import Residency
from veneer.engine import messages
from veneer.engine.base import Base, load_base, resolve_device, resolve_dtype, resolve_nf4_kernels
from veneer.engine.batch import Scheduled
from veneer.engine.check import AdapterCheck, describe
from veneer.engine.config import GIB, EngineConfig
from veneer.engine.grammars import Grammars
from veneer.engine.hot import HotAdapter
from veneer.engine.lookup import PromptLookup
from veneer.engine.merger import Merger
from veneer.engine.messages import AdapterChecked, Done, SequenceOutput, WireError
from veneer.engine.pages import PagePool
from veneer.engine.pooling import pooled_bytes
from veneer.engine.probe import EffectProbe
from veneer.engine.runner import Launched, Runner, kv_page_bytes
from veneer.engine.sampling import Choice
from veneer.engine.scheduler import Scheduler
from veneer.engine.sequence import Sequence
from veneer.errors import DeadlineExceeded, InvalidRequest, VeneerError
from veneer.kernels.backend import resolve

logger = logging.getLogger(__name__)

CHORE_PATIENCE = 3.0  # seconds without work before a chore: whoever comes next waits for its end


class Engine:
    """One resident base with any number of adapters. All methods are called from one thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        wake: Callable[[], None] = lambda: None,
        base: Base | None = None,
        load: Callable[[Path, int], Program] | None = None,
    ) -> None:
        """Load the base. `wake` is called from another thread when `step` has news to look at.

        Benchmarks bring a `base` of their own and a `load` that makes adapters without files.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        device = resolve_device(config.device)
        if config.hot_adapter_memory and device.type == "cuda":
            raise InvalidRequest(
                f"--hot-adapter-memory {config.hot_adapter_memory} on {device}: merged copies are made on the CPU "
                "alone. Leave it out.",
                param="hot_adapter_memory",
            )
        self.config = config
        dtype = resolve_dtype(config.dtype, device)
        self.base = resident = base or load_base(
            Path(config.model),
            quantization=config.quantization,
            dtype=dtype,
            device=device,
            own_kernels=resolve_nf4_kernels(config.nf4_kernels, config.quantization, dtype, device),
        )
        self.base.limits = Limits(config.max_module_bytes, config.max_added_tokens)
        self.residency = Residency(
            Path(config.store),
            self.base,
            device=device,
            dtype=self.base.dtype,
            max_loras=config.max_loras,
            max_lora_rank=config.max_lora_rank,
            arena_bytes=config.adapter_memory or _default_arena(device),
            host_bytes=config.host_adapter_memory or _default_host_cache(device),
            wake=wake,
            # no `self` in there: a cycle would keep gigabytes of a dropped engine until a collection
            load=load or (lambda folder, task: lower(folder, resident, config.max_lora_rank, task)),
        )
        self.grammars = Grammars(
            Path(config.model),
            lambda digest: Path(config.store) / "blobs" / digest,
            self.base.eos_token_ids,
            wake,
        )
        num_pages = self._num_pages()
        self.max_model_len = self._max_model_len(num_pages)
        max_rows = config.max_num_batched_tokens or (8192 if device.type == "cuda" else 512)
        self.runner = Runner(
            self.base,
            self.residency,
            self.grammars,
            num_pages=num_pages,
            page_size=config.page_size,
            max_rows=max_rows,
            max_rank=config.max_lora_rank,
        )
        if device.type == "cuda" and resolve(device).name == "triton":
            if config.enforce_eager:
                self.base.notes.append(
                    "CUDA graphs are off: --enforce-eager; kernels are compiled when first used"
                )
            else:
                self.base.notes.append(f"CUDA graphs: {config.cuda_graphs}")
                self.runner.prepare(config.max_num_seqs, self.max_model_len, config.cuda_graphs)
        self.pool = PagePool(num_pages, config.page_size, config.prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            self.residency,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max_rows,
            max_queue=config.max_queue,
            slot_patience=config.slot_patience,
            max_model_len=self.max_model_len,
            clock=time.monotonic,
        )
        self.steps = self.prefill_tokens = self.decode_tokens = 0
        self.draft_tokens = self.accepted_draft_tokens = 0
        self._lookahead = device.type == "cuda" if config.lookahead is None else config.lookahead
        self._lookahead &= not config.hot_adapter_memory  # between two steps a copy may be dropped
        self._ahead: Launched | None = None  # the next step, on the device already
        self._busy_at = time.monotonic()
        self._probe = EffectProbe(self.base.model.config.vocab_size)
        self._checks: dict[str, AdapterCheck] = {}  # by call
        self._blends: dict[str, Future[Program]] = {}  # by call
        self._merger = Merger(self.base, Path(config.store) / "blobs", config.max_lora_rank, wake)
        self._drops: dict[str, list[Future[None]]] = {}  # call -> the drops of its tasks
        self._hot = self._hot_adapter(wake) if config.hot_adapter_memory else None

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.results()  # nothing that the device still uses may be freed
            self._ahead = None
        self._merger.close()
        if self._hot is not None:
            self._hot.close()
        self.grammars.close()
        self.residency.close()

    # ---- messages -------------------------------------------------------------------------------

    def handle(self, request: messages.Request) -> list[messages.Reply]:
        """Take one message; returns what can be answered at once."""
        self._busy_at = time.monotonic()
        try:
            match request:
                case messages.Generate():
                    self._submit(request)
                case messages.Cancel(id=identifier):
                    self.scheduler.cancel(identifier)
                case messages.CheckAdapter(call=call):
                    self._checks[call] = AdapterCheck(request, self._probe, self.residency.check)
                case messages.CheckBlend(call=call, key=key):
                    self._blends[call] = self.residency.inspect(key)
                case messages.MergeAdapters():
                    self._merger.submit(request)
                case messages.CancelMerge(call=call):
                    self._merger.cancel(call)
                case messages.DropAdapter(call=call, digest=digest):
                    self.pool.forget(digest)
                    freed = [] if self._hot is None else self._hot.forget(digest)
                    drops = [self.residency.drop(key) for key in self.residency.keys(digest)]
                    self._drops[call] = freed + drops
                case messages.PinAdapter(call=call, key=key, pinned=pinned):
                    self.residency.pin(key, pinned)
                    return [Done(call=call)]
                case messages.StartJob() | messages.StopJob():
                    raise InvalidRequest("this engine process does not train; start veneer.training.process")
                case messages.Shutdown():
                    raise SystemExit(0)
        except VeneerError as error:
            return [_refusal(request, error)]
        return []

    def _submit(self, request: messages.Generate, merged: bool = False) -> None:
        now = time.monotonic()
        p, constraint = request.sampling, request.sampling.constraint
        self.scheduler.add(
            Sequence(
                id=request.id,
                tokens=list(request.prompt),
                sampling=p,
                adapter=request.adapter,
                arrival=now,
                deadline=None if request.deadline is None else now + request.deadline,
                matcher=None if constraint is None else self.grammars.matcher(constraint),
                lookup=PromptLookup(p.draft_tokens, p.prediction, request.prompt) if p.draft_tokens else None,
                merged=merged,
            )
        )

    # ---- steps ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._ahead)

    def step(self) -> tuple[list[messages.Reply], bool]:
        """Poll the adapters, plan, run, apply. Returns the replies and whether there is more to do at once.

        With lookahead the step after this one is launched before this one's tokens are waited for. When there has
        been nothing to do for a while, one of the runner's chores is done instead.
        """
        begun = time.monotonic()
        items = self._failures()
        current, self._ahead = self._ahead, None
        if current is None:
            if self._hot is not None:
                self._hot.poll(self._submit)
            batch = self.scheduler.schedule()
            current = self.runner.launch(batch) if batch.items else None
        if current is not None:
            following = self.scheduler.schedule_ahead(current.batch) if self._lookahead else None
            if following is not None:
                self._ahead = self.runner.launch(following, current)
            items += self._unmatched()
            items += self._apply(current)
            if self._hot is not None:
                self._hot.stepped(current.batch, time.monotonic() - begun)
        items += self._refused()
        self._probe.observe(items)
        replies: list[messages.Reply] = self._finished_calls()
        visible = [item for item in items if not self._probe.owns(item.id)]
        if visible:
            replies.append(messages.Outputs(visible))
        if current is not None or self.has_work or replies or self._checks:
            self._busy_at = time.monotonic()
        elif time.monotonic() - self._busy_at > CHORE_PATIENCE:
            return replies, self.runner.do_chore()
        return replies, current is not None

    def finish_chores(self) -> None:
        """Do now what is otherwise done when there is nothing to run: for benchmarks, and for comparisons."""
        while self.runner.do_chore():
            pass

    def _failures(self) -> list[SequenceOutput]:
        items = []
        for digest, error in self.residency.poll():
            for sequence in self.scheduler.fail_adapter(digest):
                items.append(SequenceOutput(id=sequence.id, error=to_wire(error)))
        items += self._unmatched()
        for sequence in self.scheduler.expired():
            error = DeadlineExceeded(
                f"the request's deadline passed after {len(sequence.tokens) - sequence.num_prompt_tokens} "
                "generated tokens; allow more time or ask for fewer tokens"
            )
            items.append(SequenceOutput(id=sequence.id, error=to_wire(error)))
        return items

    def _unmatched(self) -> list[SequenceOutput]:
        """Sequences whose grammar was found wrong, or too costly; maybe in the step that is still to be applied."""
        errors = [(sequence.id, sequence.matcher) for sequence in self.scheduler.unmatched()]
        return [
            SequenceOutput(id=name, error=to_wire(matcher.error))
            for name, matcher in errors
            if matcher is not None and matcher.error is not None
        ]

    def _refused(self) -> list[SequenceOutput]:
        """Sequences that planning found to be too long with the virtual tokens of their adapters."""
        refused, self.scheduler.refused = self.scheduler.refused, []
        return [SequenceOutput(id=sequence.id, error=to_wire(error)) for sequence, error in refused]

    def _apply(self, launched: Launched) -> list[SequenceOutput]:
        """Wait for a step and move its sequences forward; those taken out since it was planned are skipped."""
        results, scores = launched.results(), launched.scores()
        self.steps += 1
        taken = self.scheduler.commit(
            launched.batch, {name: [token for token, _ in found] for name, found in results.items()}
        )
        for each in launched.pooled:
            if each.sequence.is_running:
                each.add()
        outputs = []
        for item in launched.batch.items:
            sequence = item.sequence
            if not sequence.is_running:
                continue
            output = SequenceOutput(
                id=sequence.id,
                prompt_logprobs=scores.get(sequence.id, []),
                cached_tokens=sequence.num_cached,
            )
            if item.samples:
                output = self._sampled(item, output, results[sequence.id][: taken[sequence.id]])
            if item.count == item.num_sampled:
                self.decode_tokens += len(output.tokens)
            else:
                self.prefill_tokens += item.count
            self.draft_tokens += output.drafted
            self.accepted_draft_tokens += output.accepted
            if item.samples or output.prompt_logprobs:
                outputs.append(output)
        return outputs

    def _sampled(self, item: Scheduled, output: SequenceOutput, new: list[Choice]) -> SequenceOutput:
        """The output with the tokens that are new, unless none was asked for. Ends the sequence if one does."""
        sequence = item.sequence
        if sequence.sampling.max_tokens == 0:
            self.scheduler.finish(sequence)
            return msgspec.structs.replace(output, finish_reason="length", pooled=pooled_bytes(sequence))
        accepted, reason, stop_token = len(new) - 1, None, None
        for count, (token, _) in enumerate(new, 1):
            reason, stop_token = self._finish_reason(sequence, token, behind=len(new) - count)
            if reason:
                new = new[:count]
                self.scheduler.finish(sequence)
                break
        return msgspec.structs.replace(
            output,
            tokens=[token for token, _ in new],
            logprobs=[entry for _, entry in new if entry is not None],
            finish_reason=reason,
            stop_token=stop_token,
            drafted=len(item.draft),
            accepted=min(accepted, len(new)),
        )

    def _finish_reason(self, sequence: Sequence, token: int, behind: int) -> tuple[str | None, int | None]:
        """Whether the sequence ends with this token, which so many of its tokens stand behind; and by which."""
        p = sequence.sampling
        length = len(sequence.tokens) - behind
        generated = length - sequence.num_prompt_tokens
        if generated >= p.min_tokens and (
            token in p.stop_token_ids or (not p.ignore_eos and token in self.base.eos_token_ids)
        ):
            return "stop", token
        if generated >= p.max_tokens or length >= self.max_model_len:
            return "length", None
        return None, None

    # ---- adapters -------------------------------------------------------------------------------

    def _finished_calls(self) -> list[messages.Reply]:
        """Answers to checks, merges and drops that ended since the last step."""
        replies: list[messages.Reply] = list(self._merger.reports())
        for call, check in list(self._checks.items()):
            try:
                for request in check.advance():
                    self._submit(request)
                if check.is_done:
                    replies.append(AdapterChecked(call=call, info=check.info(self.base.dtype.itemsize)))
                    del self._checks[call]
            except VeneerError as error:
                self._probe.discard(call)
                replies.append(AdapterChecked(call=call, error=to_wire(error)))
                del self._checks[call]
        for call, blend in list(self._blends.items()):
            if blend.done():
                replies.append(self._blend_checked(call, blend))
                del self._blends[call]
        for call, drops in list(self._drops.items()):
            if all(drop.done() for drop in drops):
                replies.append(Done(call=call))
                del self._drops[call]
        return replies

    def _blend_checked(self, call: str, blend: Future[Program]) -> AdapterChecked:
        try:
            program = blend.result()
        except VeneerError as error:
            return AdapterChecked(call=call, error=to_wire(error))
        vocabulary = self.base.config.vocab_size
        return AdapterChecked(call=call, info=describe(program, self.base.dtype.itemsize, vocabulary))

    def _hot_adapter(self, wake: Callable[[], None]) -> HotAdapter:
        return HotAdapter(
            self.config,
            self.base,
            self.residency,
            self.scheduler,
            self.runner,
            self._probe,
            wake=wake,
        )

    # ---- sizes ----------------------------------------------------------------------------------

    def _num_pages(self) -> int:
        page = kv_page_bytes(self.base, self.config.page_size)
        budget = self.config.kv_cache_memory
        if budget is None:
            budget = GIB
            if self.base.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(self.base.device)
                free -= self.config.training_memory or 0
                budget = int(free * 0.9)  # the rest is for activations
        if budget < page:
            raise ValueError(f"--kv-cache-memory {budget} bytes hold no page; one page is {page} bytes")
        return int(budget // page)

    def _max_model_len(self, num_pages: int) -> int:
        wanted = self.config.max_model_len or self.base.max_positions
        room = num_pages * self.config.page_size
        for limit, what in ((self.base.max_positions, "the base's positions"), (room, "the KV cache")):
            if wanted > limit:
                self.base.notes.append(f"context limited to {limit} tokens by {what}, {wanted} wanted")
                wanted = limit
        return wanted

    # ---- reports --------------------------------------------------------------------------------

    def info(self) -> messages.EngineInfo:
        device = self.base.device
        backend = resolve(device)
        cuda = device.type == "cuda"
        return messages.EngineInfo(
            model_type=self.base.config.model_type,
            device=str(device),
            device_name=torch.cuda.get_device_name(device) if cuda else "cpu",
            dtype=str(self.base.dtype).removeprefix("torch."),
            quantization=self.base.quantization,
            kernels=backend.name,
            base_bytes=self.base.memory_bytes(),
            vocab_size=self.base.config.vocab_size,
            hidden_size=self.base.hidden_size,
            max_model_len=self.max_model_len,
            eos_token_ids=list(self.base.eos_token_ids),
            num_pages=self.pool.num_pages,
            page_size=self.config.page_size,
            max_loras=self.config.max_loras,
            max_lora_rank=self.config.max_lora_rank,
            adapter_memory=self.residency.arena_bytes,
            host_adapter_memory=self.residency.host_budget,
            notes=[*self.base.notes, f"kernels: {backend.reason}"],
        )

    def stats(self) -> messages.Stats:
        scheduler = self.scheduler
        adapters = self.residency.stats()
        for key, (running, waiting) in scheduler.adapter_counts().items():
            entry = adapters.get(key, messages.AdapterStats())
            adapters[key] = msgspec.structs.replace(entry, running=running, waiting=waiting)
        for key in list(adapters):
            digest, task = split_key(key)
            if is_blend(key):  # its requests are of all its parts; the rest is its own
                known = adapters.pop(key)
                use = messages.AdapterStats(running=known.running, waiting=known.waiting)
                for digest in digests_of(key):
                    adapters[digest] = adapters.get(digest, messages.AdapterStats()) + use
            elif task:
                adapters[digest] = adapters.get(digest, messages.AdapterStats()) + adapters.pop(key)
        return messages.Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=self.pool.used,
            pages_total=self.pool.num_pages,
            steps=self.steps,
            eager_steps=self.runner.eager_steps,
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self.decode_tokens,
            draft_tokens=self.draft_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
            prefix_hit_tokens=self.pool.hit_tokens,
            prefix_query_tokens=self.pool.query_tokens,
            preemptions=scheduler.preemptions,
            adapters=adapters,
            device_adapter_bytes=self.residency.device_bytes,
            host_adapter_bytes=self.residency.host_bytes,
            hot_adapter=None if self._hot is None else self._hot.stats(),
        )


def to_wire(error: VeneerError) -> WireError:
    return WireError(error.status, error.code, error.message, error.param)


def _refusal(request: messages.Request, error: VeneerError) -> messages.Reply:
    wire = to_wire(error)
    match request:
        case messages.Generate(id=identifier):
            return messages.Outputs([SequenceOutput(id=identifier, error=wire)])
        case messages.CheckAdapter(call=call) | messages.CheckBlend(call=call):
            return AdapterChecked(call=call, error=wire)
        case messages.DropAdapter(call=call) | messages.PinAdapter(call=call):
            return Done(call=call, error=wire)
        case messages.StartJob(id=job) | messages.StopJob(id=job):
            return messages.JobReport(id=job, kind="failed", error=wire)
        case _:
            raise error


def _default_arena(device: torch.device) -> int:
    return 4 * GIB if device.type == "cuda" else GIB // 2


def _default_host_cache(device: torch.device) -> int:
    return 8 * GIB if device.type == "cuda" else GIB
