"""Bringing adapters into service and taking them out: the steps behind the adapter routes and `--lora-modules`.

    publish   reserve the name → fill a staging folder → its text files are read → the engine checks it
              → the store commits it
    delete    the name is gone → running requests end → the engine forgets it → the files go

Each step that blocks runs in a thread. Whatever fails, the staging folder and the reservation go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from veneer.adapters.names import adapter_key, is_job_name
from veneer.adapters.schema import AdapterVersion
from veneer.adapters.sources import from_folder, from_hub
from veneer.adapters.staging import Staging
from veneer.engine.messages import AdapterInfo
from veneer.errors import EngineUnavailable, InvalidRequest, NotFound, VeneerError
from veneer.server.adapter_text import Text
from veneer.server.state import ServerState

log = logging.getLogger(__name__)

DELETE_WAIT = 30.0  # seconds a DELETE waits for running requests before it answers 202

Fill = Callable[[Staging], object]  # writes an adapter's files; runs in a thread
_T = TypeVar("_T")
_deletes: set[asyncio.Task[None]] = set()  # asyncio keeps only weak references to tasks


async def publish(
    state: ServerState,
    name: str,
    fill: Fill,
    *,
    unless_known: bool = False,
    allow_ineffective: bool = False,
    trained: bool = False,
    more: Mapping[str, Any] = {},
) -> AdapterVersion:
    """Make what `fill` writes the next version of `name`. Content equal to the current version changes nothing.

    With `unless_known`, content equal to any version of the name changes nothing, and that version is returned.
    An adapter that does not change the output is refused unless `allow_ineffective`. Only what a job has `trained`
    gets one of the names that say so. What `more` has when `fill` is done goes to the details.
    Raises what the sources, the engine's check and the store raise; nothing is left behind then.
    """
    if not trained:
        refuse_reserved_name(state, name)
    async with _in_thread(state.store.reserve(name)), _in_thread(state.store.stage()) as staging:
        await asyncio.to_thread(fill, staging)
        digest = await asyncio.to_thread(staging.digest)
        if unless_known and (known := await asyncio.to_thread(_known, state, name, digest)):
            return known
        text = await state.texts.run(lambda: state.texts.read(staging.path))
        info = await state.engine.check_adapter(
            str(staging.path), digest, allow_ineffective=allow_ineffective
        )
        details = msgspec.to_builtins(info)
        details["warnings"] = [*info.warnings, *_base_warnings(state, info)]
        if text.tokenizer is not state.texts.base.tokenizer:
            details["warnings"] += await state.texts.run(lambda: _token_warnings(state, text, info))
        details["warnings"] += more.get("warnings", [])
        details |= _text_details(state, text) | {
            name: value for name, value in more.items() if name != "warnings"
        }
        record = await asyncio.to_thread(state.store.commit, staging, name, details)
    if record.created:
        log.info("adapter %s@%d: %s", record.name, record.version, record.digest)
        await follow_pins(state)
    return record


async def delete(state: ServerState, name: str, version: int | None = None) -> bool:
    """Delete an adapter or one version. New requests do not find it from now on; running ones finish.

    True when its files are gone; False when requests still run after `DELETE_WAIT`. The rest then happens
    when they end, or when the store opens the next time.
    """
    digests = await asyncio.to_thread(state.store.begin_delete, name, version)
    task = asyncio.create_task(_finish_delete(state, digests), name=f"delete {name}")
    _deletes.add(task)
    task.add_done_callback(_deletes.discard)
    done, _ = await asyncio.wait({task}, timeout=DELETE_WAIT)
    if not done:
        task.add_done_callback(_log_failure)
        return False
    task.result()
    await follow_pins(state)
    return True


async def sync_pins(state: ServerState) -> None:
    """Tell the engine which adapters to keep on the device: the current versions of pinned names, all tasks."""
    records = await asyncio.to_thread(state.store.list)
    pinned = [each for each in records if each.pinned and each.current and not each.damage]
    wanted = {adapter_key(each.digest, task) for each in pinned for task in range(max(each.tasks, 1))}
    held = state.engine.pinned
    for key in held - wanted:
        await state.engine.pin_adapter(key, False)
    for key in sorted(wanted - held):
        await state.engine.pin_adapter(key, True)


async def follow_pins(state: ServerState) -> None:
    """`sync_pins` after a change that is done already: what the engine refuses is logged."""
    try:
        await sync_pins(state)
    except VeneerError as error:
        log.warning("pinned adapters are not all on the device: %s", error.message)


def fill_from(state: ServerState, path: str, allowed_roots: Sequence[Path]) -> Fill:
    """From an absolute path below one of `allowed_roots`, or else from a hub id."""
    limit = state.config.max_upload_bytes
    if path.startswith("/"):
        return lambda staging: from_folder(path, allowed_roots, staging, limit)
    return lambda staging: from_hub(path, staging, limit)


def refuse_reserved_name(state: ServerState, name: str) -> None:
    """The base's name, and those of fine-tuning jobs, are given to nothing else."""
    if name == state.served_name:
        raise InvalidRequest(f"{name!r} is the name of the base model; choose another name", param="name")
    if is_job_name(name):
        raise InvalidRequest(
            f"{name!r} is a name that only fine-tuning jobs give; choose another, or point an alias to a job's",
            param="name",
        )


def _known(state: ServerState, name: str, digest: str) -> AdapterVersion | None:
    try:
        versions = state.store.versions(name)
    except NotFound:
        return None
    return next((each for each in versions if each.digest == digest and not each.damage), None)


async def _finish_delete(state: ServerState, digests: Sequence[str]) -> None:
    for digest in digests:
        await state.in_flight.drained(digest)
        try:
            await state.engine.drop_adapter(digest)
        except EngineUnavailable:
            pass  # an engine that starts again knows nothing of it
        state.texts.forget(digest)
    await asyncio.to_thread(state.store.finish_delete, digests)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("%s failed; its files go when the store opens next", task.get_name(), exc_info=error)


def _base_warnings(state: ServerState, info: AdapterInfo) -> list[str]:
    """One warning when the config names another base than ours although its shapes fit."""
    ours = {state.served_name, *state.config.base_names}
    if not info.base_model or _short(info.base_model) in {_short(name) for name in ours}:
        return []
    return [
        f"the adapter's config names the base {info.base_model!r}, this server's is {state.served_name!r}; "
        "its shapes fit, but its outputs may be of no use unless the two are the same weights"
    ]


def _text_details(state: ServerState, text: Text) -> dict[str, Any]:
    """What the adapter has of its own to make text of tokens and tokens of text."""
    base = state.texts.base
    return {
        "own_tokenizer": text.tokenizer is not base.tokenizer,
        "own_chat_template": text.template is not base.template,
        "end_tokens": list(text.end_tokens),
    }


def _token_warnings(state: ServerState, text: Text, info: AdapterInfo) -> list[str]:
    """One warning when the tokenizer has tokens that neither the base nor the adapter has rows for."""
    rows = state.engine.require_ready().vocab_size + info.added_tokens
    tokens = text.tokenizer.num_ids()
    if tokens <= rows:
        return []
    return [
        f"tokenizer.json has ids up to {tokens - 1} and there are rows for 0 to {rows - 1}; "
        "a request whose prompt has a token beyond is refused"
    ]


def _short(name: str) -> str:
    """The last part of a model's name or folder, in lower case: what stays the same when it is moved."""
    return name.rstrip("/").rpartition("/")[2].lower()


@asynccontextmanager
async def _in_thread(manager: AbstractContextManager[_T]) -> AsyncIterator[_T]:
    """A blocking context manager whose ends run in threads."""
    value = await asyncio.to_thread(manager.__enter__)
    try:
        yield value
    except BaseException as error:
        await asyncio.to_thread(manager.__exit__, type(error), error, error.__traceback__)
        raise
    else:
        await asyncio.to_thread(manager.__exit__, None, None, None)
