"""What both generation routes share: from a checked body to pieces of text with their log probabilities."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from veneer.adapters.names import Base, adapter_key, parse_selector
from veneer.adapters.saved_blends import Blend, Served
from veneer.engine.client import Generation, NewSequence
from veneer.engine.messages import (
    AdapterInfo,
    Constraint,
    EngineInfo,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)
from veneer.errors import InvalidRequest, NotFound
from veneer.server.adapter_text import Text
from veneer.server.blend_wire import Mixture, make_blend
from veneer.server.state import ServerState
from veneer.server.structured import Grammar
from veneer.server.text import Entry, TextStream
from veneer.server.wire import ChatRequest, CompletionRequest, GenerationRequest, LoraPath

GREEDY_BELOW = 1e-5  # a lower temperature divides logits beyond float32; vLLM draws the same line
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions


class Logprob(NamedTuple):
    """One token with the model's view of its position."""

    entry: Entry
    values: TokenLogprobs | None  # None: the first token of a prompt, which nothing precedes


class Delta(NamedTuple):
    """News of one choice. `finish_reason` is set on its last one."""

    choice: int
    text: str
    logprobs: list[Logprob]
    finish_reason: str | None
    stop_reason: str | int | None  # the stop string or stop token id that ended it, as vLLM reports
    end: (
        Logprob | None
    )  # the token that ended it, when it is no part of the text and log probabilities are wanted
    prompt: list[TokenLogprobs]  # of the prompt's second token and on, with the first delta, if wanted


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    blend: AdapterInfo | None = None  # of several adapters
    drafts: bool = False  # whether there may be any
    accepted: int = 0  # tokens of drafts that are in the answer
    rejected: int = 0  # and those that are not

    def wire(self) -> dict[str, Any]:
        """OpenAI's `CompletionUsage`; for a blend with its rank, and what a `max_rank` cost."""
        more: dict[str, Any] = {}
        if self.blend is not None:
            more["blend"] = {"rank": self.blend.rank, "error": self.blend.error}
        if self.drafts:
            more["completion_tokens_details"] = {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
            }
        return more | {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def chosen_model(state: ServerState, model: str, lora_path: LoraPath) -> str:
    """What `model` is with SGLang's `lora_path`, which names the adapter beside the base. Raises InvalidRequest."""
    names = {lora_path} if isinstance(lora_path, str) else set(lora_path or [None])
    if len(names) > 1:
        shown = ", ".join(sorted(map(repr, names)))
        rule = "one request has one adapter; send one request for each"
        raise InvalidRequest(f"lora_path names several ({shown}): {rule}.", param="lora_path")
    (name,) = names
    if not name or name == model:
        return model
    if not isinstance(parse_selector(model, state.served_name), Base):
        rule = f"model={model!r} is another adapter; send the base, {state.served_name!r}, as model"
        raise InvalidRequest(f"lora_path={name!r}: {rule}.", param="lora_path")
    return name


def select_adapter(state: ServerState, model: str, mixture: Mixture = Mixture()) -> Served | None:  # noqa: B008
    """The adapter version or blend that a request means now; None for the base. Raises NotFound, InvalidRequest."""
    selected = parse_selector(model, state.served_name)
    if not mixture.is_empty:
        if not isinstance(selected, Base):
            rule = f"model={model!r} is an adapter; with several it must be the base, {state.served_name!r}"
            raise InvalidRequest(f"{rule}, and all are named among the others.", param="model")
        return make_blend(state.store, state.served_name, mixture)
    if isinstance(selected, Base):
        return None
    try:
        return state.store.resolve(selected.name, selected.version)
    except NotFound:
        saved = state.store.blends(selected.name) if selected.version is None else ()
        if not saved:
            raise
        return saved[0]


def vocabulary_of(info: EngineInfo, adapter: Served | None) -> int:
    """How many token ids there are rows for: the base's, and those that the adapter adds."""
    return info.vocab_size + (int(adapter.details.get("added_tokens", 0)) if adapter else 0)


def select_task(adapter: Served | None, task_id: int | None) -> str | None:
    """The key of what a request runs with, for `EngineClient.submit`; None for the base.

    The task must be named when there are several: each has its own answers, so none is a default. Raises
    InvalidRequest.
    """
    if isinstance(adapter, Blend):
        if task_id is not None:
            message = f"task_id={task_id}: with several adapters it belongs to an entry of adapters."
            raise InvalidRequest(message, param="task_id")
        return adapter.key
    tasks = adapter.tasks if adapter else 0
    if task_id is None and tasks > 1:
        assert adapter is not None
        rule = f"adapter {adapter.name!r} has {tasks} tasks; say which one, from 0 to {tasks - 1}"
        raise InvalidRequest(f"task_id is required: {rule}.", param="task_id")
    if task_id is not None and task_id >= tasks:
        who = f"adapter {adapter.name!r}" if adapter else "the base"
        rule = f"has the tasks 0 to {tasks - 1}" if tasks else "has no tasks; leave it out"
        raise InvalidRequest(f"task_id={task_id}: {who} {rule}.", param="task_id")
    return adapter_key(adapter.digest, task_id or 0) if adapter else None


def sampling_params(
    body: GenerationRequest,
    vocabulary: int,
    max_tokens: int,
    seed: int,
    logprobs: int | None,
    end_tokens: Sequence[int] = (),
    constraint: Constraint | None = None,
    prediction: Sequence[int] = (),
) -> SamplingParams:
    """The engine's view of a body; `end_tokens` end the sequence beside the base's.

    Raises InvalidRequest for token ids outside of the vocabulary.
    """
    check_tokens(body.stop_token_ids, vocabulary, "stop_token_ids")
    stops = list(body.stop_token_ids)
    if not body.ignore_eos:
        stops += [token for token in end_tokens if token < vocabulary and token not in stops]
    if body.min_tokens > max_tokens:
        message = f"min_tokens={body.min_tokens} is more than the {max_tokens} tokens that may be generated."
        raise InvalidRequest(message, param="min_tokens")
    if constraint is not None and (body.ignore_eos or body.min_tokens):
        name = "ignore_eos" if body.ignore_eos else "min_tokens"
        message = (
            f"{name} cannot come with {constraint.param}, whose text may end before; leave one of them out."
        )
        raise InvalidRequest(message, param=name)
    # top_p = 0 keeps the most likely token alone, which is top_k = 1.
    top_k = 1 if body.top_p == 0 else min(max(body.top_k, 0), vocabulary)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if body.temperature < GREEDY_BELOW else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias={_bias_token(key, vocabulary): value for key, value in body.logit_bias.items()},
        seed=seed,
        min_tokens=body.min_tokens,
        stop_token_ids=stops,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_scores,
        constraint=constraint,
        draft_tokens=body.draft_tokens,
        prediction=list(prediction),
    )


def derived_seed(seed: int, choice: int) -> int:
    """The seed of the n-th choice, in 63 bits: the request's own for choice 0, a hash of both for others."""
    if choice:
        digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
    return seed & (2**63 - 1)


def token_limit(
    body: GenerationRequest, prompt: Sequence[int], info: EngineInfo, param: str, virtual_tokens: int = 0
) -> int:
    """How many tokens may follow `prompt`, which the adapter's virtual ones precede.

    Raises InvalidRequest when the context has no room.
    """
    asked = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        asked = body.max_completion_tokens
    room = info.max_model_len - virtual_tokens - len(prompt)
    if not prompt:
        raise InvalidRequest(f"{param} has no tokens; the model needs at least one.", param=param)
    if room < (1 if asked is None else asked):
        virtual = f"{virtual_tokens} virtual ones of the adapter, " if virtual_tokens else ""
        raise InvalidRequest(
            f"This model's maximum context length is {info.max_model_len} tokens, but {virtual}{len(prompt)} in "
            f"the {param} and {1 if asked is None else asked} for the answer were requested; shorten one of them.",
            param=param,
            code="context_length_exceeded",
        )
    if asked is None and isinstance(body, CompletionRequest):
        return min(DEFAULT_COMPLETION_TOKENS, room)
    return room if asked is None else asked


def check_tokens(tokens: Sequence[int], vocabulary: int, param: str) -> None:
    """`vocabulary`: see `vocabulary_of`. Raises InvalidRequest."""
    wrong = next((token for token in tokens if token >= vocabulary), None)
    if wrong is not None:
        rule = f"the vocabulary has the ids 0 to {vocabulary - 1}"
        raise InvalidRequest(f"{param}: there is no token {wrong}; {rule}.", param=param)


def _bias_token(key: str, vocabulary: int) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        message = f"logit_bias: the key {key[:40]!r} must be a token id, written as a decimal number."
        raise InvalidRequest(message, param="logit_bias")
    check_tokens([int(key)], vocabulary, "logit_bias")
    return int(key)


@dataclass
class _Choice:
    """What is known of one sequence on its way to the client."""

    text: TextStream
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)  # not given out yet
    last_output: float | None = None
    cached_tokens: int = 0


class Run:
    """One HTTP request's sequences: enter it, iterate its deltas, leave it (which cancels what still runs).

    Choices are numbered as OpenAI numbers them: prompt 0's n choices first, then prompt 1's.
    """

    def __init__(
        self,
        state: ServerState,
        body: GenerationRequest,
        prompts: list[list[int]],
        *,
        text: Text,
        adapter: Served | None,
        param: str,
        logprobs: int | None,
        grammar: Grammar | None,
        shown: Sequence[str],
        prediction: Sequence[int] = (),
        received: float,
        blend: AdapterInfo | None = None,
    ) -> None:
        info = state.engine.require_ready()
        seed = secrets.randbits(63) if body.seed is None else body.seed
        count = len(prompts) * body.n
        if count > state.config.max_sequences:
            message = (
                f"n: {count} sequences were requested; one request may have {state.config.max_sequences}."
            )
            raise InvalidRequest(message, param="n")
        self._state, self._body, self._received, self._tokenizer = state, body, received, text.tokenizer
        self._key = select_task(adapter, body.task_id)
        self._name = adapter.name if adapter else None
        details = adapter.details if adapter else {}
        virtual_tokens = int(details.get("virtual_tokens", 0))
        vocabulary = vocabulary_of(info, adapter)
        constraint = grammar and Constraint(
            grammar=grammar.text,
            param=grammar.param,
            tokenizer=text.tokenizer_of,
            end_tokens=text.end_tokens,
        )
        found = (text.tokenizer.token_id(token) for token in shown)
        self._shown = frozenset(token for token in found if token is not None)
        check_tokens(prediction, vocabulary, "prediction")
        if len(prediction) > info.max_model_len:
            rule = f"the context holds {info.max_model_len}; send the part that the answer repeats"
            raise InvalidRequest(f"prediction has {len(prediction)} tokens and {rule}.", param="prediction")
        self._sequences: list[NewSequence] = []
        for prompt in prompts:
            check_tokens(prompt, vocabulary, param)
            limit = token_limit(body, prompt, info, param, virtual_tokens)
            for choice in range(body.n):
                sampling = sampling_params(
                    body,
                    vocabulary,
                    limit,
                    derived_seed(seed, choice),
                    logprobs,
                    text.end_tokens,
                    constraint,
                    prediction,
                )
                self._sequences.append(NewSequence(prompt, sampling))
        self._choices = [_Choice(self._text_stream(prompt)) for prompt, _ in self._sequences]
        self._first_token_seen = False
        self.usage = Usage(prompt_tokens=sum(map(len, prompts)), blend=blend, drafts=body.draft_tokens > 0)
        limits = [limit for limit in (body.timeout, state.config.request_timeout) if limit is not None]
        self._deadline = min(limits, default=None)
        self._stack = ExitStack()
        self._generation: Generation

    def _text_stream(self, prompt: Sequence[int]) -> TextStream:
        body = self._body
        return TextStream(
            self._tokenizer,
            prompt,
            stop=body.stops,
            include_stop=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            min_tokens=body.min_tokens,
            shown=self._shown,
        )

    def __enter__(self) -> Self:
        self._generation = self._stack.enter_context(
            self._state.engine.submit(self._sequences, self._key, self._deadline)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._state.metrics.tokens(self._name, self.usage.prompt_tokens, self.usage.completion_tokens)

    async def deltas(self) -> AsyncGenerator[Delta]:
        async for choice, output in self._generation:
            before = self._choices[choice].text.num_tokens
            delta = self._delta(choice, output)
            self._count(choice, output, self._choices[choice].text.num_tokens - before)
            if delta.finish_reason:
                self._generation.cancel(choice)  # a stop string ended it; the engine does not know
            if delta.text or delta.logprobs or delta.finish_reason:
                self._choices[choice].prompt = []
                yield delta

    def _delta(self, choice: int, output: SequenceOutput) -> Delta:
        known = self._choices[choice]
        known.logprobs += output.logprobs
        known.prompt += output.prompt_logprobs
        ended_by = output.stop_token
        hide = ended_by is not None and not self._body.include_stop_str_in_output
        piece = known.text.push(output.tokens, hide_last=hide, final=output.finish_reason is not None)
        wanted = bool(known.logprobs)
        end = None
        if hide and wanted and piece.stop is None:
            assert ended_by is not None  # `hide` says so
            entry = Entry(ended_by, known.text.num_characters, known.text.num_tokens - 1)
            end = Logprob(entry, known.logprobs[-1])
        return Delta(
            choice,
            piece.text,
            [Logprob(entry, known.logprobs[entry.position]) for entry in piece.entries] if wanted else [],
            "stop" if piece.stop is not None else output.finish_reason,
            piece.stop if piece.stop is not None or ended_by not in self._body.stop_token_ids else ended_by,
            end,
            known.prompt,
        )

    def _count(self, choice: int, output: SequenceOutput, tokens: int) -> None:
        """`tokens` were taken of the output: those up to a stop string."""
        now, known, metrics = time.monotonic(), self._choices[choice], self._state.metrics
        if tokens:
            if not self._first_token_seen:
                self._first_token_seen = True
                metrics.first_token(self._name, now - self._received)
            if known.last_output is None:
                known.last_output, others = now, tokens - 1
            else:
                others = tokens
            for _ in range(others):
                metrics.inter_token((now - known.last_output) / others)
            known.last_output = now
        self.usage.completion_tokens += tokens
        self.usage.accepted += output.accepted
        self.usage.rejected += output.drafted - output.accepted
        if choice % self._body.n == 0:  # a prompt counts once, whatever n is
            self.usage.cached_tokens += max(output.cached_tokens - known.cached_tokens, 0)
            known.cached_tokens = max(output.cached_tokens, known.cached_tokens)
