"""The check of an upload: each of the adapter's tasks is lowered and runs the probe, one after the other.

One at a time, because lowering keeps the loader's thread from bringing adapters that requests wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import msgspec

from veneer.adapters.names import adapter_key
from veneer.adapters.program import EMBEDDING, Program
from veneer.engine.messages import AdapterInfo, CheckAdapter, Generate
from veneer.engine.probe import EffectProbe, ending_of, why_ineffective
from veneer.errors import AdapterRefused


def describe(program: Program, item_bytes: int, vocabulary: int) -> AdapterInfo:
    """What is told of a program, with numbers of `item_bytes` each on the device."""
    return AdapterInfo(
        kind=program.kind,
        primitives=list(program.primitives),
        rank=program.rank,
        sites=len(program.sites),
        bytes=program.num_bytes(item_bytes),
        portability=program.portability,
        tasks=program.tasks,
        added_tokens=program.added_tokens(EMBEDDING, vocabulary),
        virtual_tokens=0 if program.prompt is None else program.prompt.tokens,
        base_model=program.base_model,
        error=program.error,
        warnings=list(program.warnings),
    )


class AdapterCheck:
    """One check under way. `is_done` when `info` has the answer; errors come out of `advance`."""

    def __init__(
        self, asked: CheckAdapter, probe: EffectProbe, lower: Callable[[Path, str], Future[Program]]
    ) -> None:
        self.is_done = False
        self._asked, self._probe, self._lower = asked, probe, lower
        self._vocabulary = probe.vocabulary
        self._first: Program | None = None  # of the first task; the others have its primitives and sizes
        self._effects: list[float] = []  # by task
        self._ineffective: dict[int, str] = {}  # task -> why it does nothing
        self._begin()

    def advance(self) -> list[Generate]:
        """Go on without waiting. Returns the probe's sequences to run, if it is their turn.

        Raises the `VeneerError` for which the adapter is refused.
        """
        if not self._lowered.done():
            return []
        program, call = self._lowered.result(), self._asked.call
        self._first = self._first or program
        if self._probe.start(call):
            return self._probe.requests(call, self._key, ending_of(program))
        if self._probe.done(call):
            self._take(program, self._probe.take(call))
        return []

    def info(self, item_bytes: int) -> AdapterInfo:
        """What was found out, with numbers of `item_bytes` each on the device."""
        assert self._first is not None
        program = self._first
        info = describe(program, item_bytes, self._vocabulary)
        found = [f"task {task}: {why}" if program.tasks else why for task, why in self._ineffective.items()]
        warnings = [*info.warnings, *found]
        return msgspec.structs.replace(info, effect=max(self._effects), warnings=warnings)

    def _begin(self) -> None:
        """Have the next task lowered."""
        self._key = adapter_key(self._asked.digest, len(self._effects))
        self._lowered = self._lower(Path(self._asked.folder), self._key)

    def _take(self, program: Program, effect: float) -> None:
        """Judge a task by the probe's `effect`. An adapter must have one that acts."""
        if why := why_ineffective(program, effect):
            self._ineffective[len(self._effects)] = why
        self._effects.append(effect)
        if len(self._effects) < program.tasks:
            self._begin()
            return
        if len(self._ineffective) == len(self._effects) and not self._asked.allow_ineffective:
            raise AdapterRefused(
                f"{self._ineffective[0]}. To take it all the same send allow_ineffective=true."
            )
        self.is_done = True
