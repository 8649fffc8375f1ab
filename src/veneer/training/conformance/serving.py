"""An engine in this process that says how likely given tokens are: log probabilities through ordinary requests.

A request's continuation is forced by its sampling parameters alone: logit_bias ranks the tokens in the order in
which they shall come, above all others, and presence_penalty takes each one out once it has come. Log
probabilities are those of the raw logits, so the force does not show in them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from veneer.engine.config import EngineConfig
from veneer.engine.engine import Engine
from veneer.engine.messages import (
    AdapterChecked,
    CheckAdapter,
    Generate,
    Outputs,
    Reply,
    SamplingParams,
    SequenceOutput,
)

MOST = 4096  # log probabilities compared at each position: the likeliest of a larger vocabulary
_STEP = (
    1e5  # between the biases of two forced tokens; far above any logit, and float32 still tells logits apart
)


class Asked(NamedTuple):
    """What a request asks for."""

    adapter: str | None  # key of adapters/names.py
    prompt: Sequence[int]
    continuation: Sequence[int]  # forced, no token twice; there is an answer for each


class Served:
    """An engine and what it answered."""

    def __init__(self, config: EngineConfig) -> None:
        self._news = threading.Event()
        self.engine = Engine(config, wake=self._news.set)
        self._vocabulary = int(self.engine.base.config.vocab_size)
        self._outputs: dict[str, list[SequenceOutput]] = {}
        self._checked: dict[str, AdapterChecked] = {}

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.close()

    def check(self, folders: Mapping[str, Path]) -> dict[str, AdapterChecked]:
        """Lower adapters, as an upload does; by digest."""
        for digest, folder in folders.items():
            self._take(self.engine.handle(CheckAdapter(digest, str(folder), digest)))
        while not folders.keys() <= self._checked.keys():
            self._step()
        return {digest: self._checked.pop(digest) for digest in folders}

    def ask(self, asked: Sequence[Asked]) -> list[torch.Tensor | str]:
        """Serve requests in one batch. Log probabilities [continuation, vocabulary] of each, or its error.

        Those outside the `MOST` likeliest are NaN.
        """
        self._outputs = {str(index): [] for index in range(len(asked))}
        for index, each in enumerate(asked):
            biases = {
                token: _STEP * (len(each.continuation) - i) for i, token in enumerate(each.continuation)
            }
            sampling = SamplingParams(
                max_tokens=len(each.continuation),
                temperature=0.0,
                ignore_eos=True,
                logit_bias=biases,
                presence_penalty=_STEP * (len(biases) + 1),
                logprobs=min(self._vocabulary, MOST),
            )
            request = Generate(
                id=str(index), prompt=list(each.prompt), sampling=sampling, adapter=each.adapter
            )
            self._take(self.engine.handle(request))
        while not all(items and _is_last(items[-1]) for items in self._outputs.values()):
            self._step()
        return [self._answer(each, items) for each, items in zip(asked, self._outputs.values(), strict=True)]

    def _step(self) -> None:
        self._news.clear()
        replies, ran = self.engine.step()
        self._take(replies)
        if not ran:
            self._news.wait(0.05)

    def _take(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, AdapterChecked):
                self._checked[reply.call] = reply
            elif isinstance(reply, Outputs):
                for item in reply.items:
                    self._outputs[item.id].append(item)

    def _answer(self, asked: Asked, items: Sequence[SequenceOutput]) -> torch.Tensor | str:
        if error := items[-1].error:
            return error.message
        tokens = [token for item in items for token in item.tokens]
        if tokens != list(asked.continuation):
            raise RuntimeError(f"the continuation was to be {list(asked.continuation)} and is {tokens}")
        found = torch.full((len(tokens), self._vocabulary), float("nan"))
        for row, each in zip(found, (logprobs for item in items for logprobs in item.logprobs), strict=True):
            row[each.top_ids] = torch.tensor(each.top_logprobs)
        return found


def _is_last(item: SequenceOutput) -> bool:
    return item.finish_reason is not None or item.error is not None
