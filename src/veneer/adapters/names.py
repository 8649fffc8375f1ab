"""Names: what an adapter may be called, how a request's `model` selects one, and an adapter's files.

Imports no torch: the HTTP process uses this file.

    key           DIGEST | DIGEST/TASK        the engine's name of an adapter; /TASK for its second task and on
    name          [A-Za-z0-9][A-Za-z0-9._/-]*, at most 128 characters, no empty, "." or ".." between slashes
    job name      ft:BASE:[SUFFIX]:ID, and ft:BASE:[SUFFIX]:ID:ckpt-step-N for its checkpoints; only fine-tuning
                  jobs make such names, otherwise they are names like others
    model field   NAME | NAME@VERSION | BASE | BASE:NAME | BASE:NAME@VERSION      (BASE: the served name)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from veneer.errors import InvalidRequest, NotFound

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)  # every adapter has both
ADAPTERHUB_WEIGHTS = "adapter.safetensors"  # what AdapterHub's library calls it; it is stored as WEIGHTS_FILE
HEAD_FILES = (
    "model_head.safetensors",
    "pytorch_model_head.bin",
)  # that library's, of the head beside an adapter
CONFIG_LIMIT = 1 << 20  # bytes
# What a tokenizer's save_pretrained writes beside them, and how many bytes each may have. Requests for the adapter
# are then tokenized, rendered and ended by these. An adapter may bring any of them.
TEXT_FILES: Mapping[str, int] = {
    "tokenizer.json": 40 << 20,
    "tokenizer_config.json": 4 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 4 << 20,
    "chat_template.jinja": 1 << 20,
    "generation_config.json": 1 << 20,
}
WANTED = f"{' and '.join(FILES)}, and beside them what a tokenizer saves: {', '.join(TEXT_FILES)}"

HEAD_ADVICE = (
    "AdapterHub's library trains the output head with an adapter; `veneer adapters convert FOLDER --output OUT` "
    "puts both into one file, which is served if the head is still the base's. If it was not trained, leave it out"
)

NAME_LIMIT = 128  # characters
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._/-]{{0,{NAME_LIMIT - 1}}}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
SUFFIX_LIMIT = 64  # characters
SUFFIX_RULE = f"A suffix is 1 to {SUFFIX_LIMIT} letters, digits and . _ -"
_SUFFIX = re.compile(rf"[A-Za-z0-9._-]{{1,{SUFFIX_LIMIT}}}")
_JOB_NAME = re.compile(
    rf"ft:([A-Za-z0-9][A-Za-z0-9._/-]*):({_SUFFIX.pattern})?:[a-z0-9]+(:ckpt-step-[1-9][0-9]{{0,8}})?"
)
_CHECKPOINT_ROOM = len(":ckpt-step-123456789")
_RULE = (
    f"A name starts with a letter or digit, goes on with letters, digits and . _ / - up to {NAME_LIMIT} "
    "characters, and has no empty part, '.' or '..' between slashes"
)


@dataclass(frozen=True)
class Base:
    """The request asks for the base without an adapter."""


class Selector(NamedTuple):
    """The request asks for an adapter."""

    name: str
    version: int | None = None  # None: the version the name points to now


def adapter_key(digest: str, task: int = 0) -> str:
    """What the engine calls one task of an adapter. Each task is placed, cached and counted by itself there."""
    return f"{digest}/{task}" if task else digest


def split_key(key: str) -> tuple[str, int]:
    """Digest and task of a key. Most adapters know no tasks: what they are is their task 0."""
    digest, _, task = key.partition("/")
    return digest, int(task or 0)


def stored_name(filename: str) -> str:
    """The name under which a file of an adapter is stored."""
    return WEIGHTS_FILE if filename == ADAPTERHUB_WEIGHTS else filename


def is_name(text: str) -> bool:
    """Whether `text` can be the name of an adapter."""
    return is_job_name(text) or (_NAME.fullmatch(text) is not None and _whole_parts(text))


def is_job_name(text: str) -> bool:
    """Whether `text` is a name that only fine-tuning jobs give."""
    return len(text) <= NAME_LIMIT and _JOB_NAME.fullmatch(text) is not None and _whole_parts(text)


def job_name(base: str, suffix: str | None, job: str) -> str:
    """What the result of a job is called: `ft:BASE:SUFFIX:ID`. `job` is lower-case letters and digits.

    Raises:
        InvalidRequest: the suffix, or what the base is called, cannot be in a name.
    """
    if suffix is not None and not _SUFFIX.fullmatch(suffix):
        raise InvalidRequest(f"suffix {suffix[:200]!r}: {SUFFIX_RULE}.", param="suffix")
    name = f"ft:{base}:{suffix or ''}:{job}"
    longest = len(name) + _CHECKPOINT_ROOM
    if longest > NAME_LIMIT:
        raise InvalidRequest(
            f"checkpoints would be called {name}:ckpt-step-…, up to {longest} characters; a name has at most "
            f"{NAME_LIMIT}: send a shorter suffix, or serve the base under a shorter --served-model-name",
            param="suffix",
        )
    if not is_job_name(name):
        raise InvalidRequest(
            f"the base is served as {base!r}, which cannot be part of an adapter's name; give it a "
            "--served-model-name of letters, digits and . _ / -",
            param="model",
        )
    return name


def checkpoint_name(result: str, step: int) -> str:
    """What a job's checkpoint is called, when its result is called `result`."""
    return f"{result}:ckpt-step-{step}"


def check_name(text: str, *, param: str = "name") -> str:
    """Return `text` if it can be the name of an adapter.

    Raises:
        InvalidRequest: it cannot; `param` is the request's field.
    """
    if not is_name(text):
        raise InvalidRequest(f"{text[:200]!r} cannot be an adapter's name. {_RULE}.", param=param)
    return text


def parse_selector(model: str, served_name: str) -> Base | Selector:
    """What the `model` field of a request selects, when the base is served as `served_name`.

    Raises:
        NotFound: the text cannot name anything, so no model has it (`model_not_found`, as OpenAI answers).
    """
    if model == served_name:
        return Base()
    name, at, version = model.partition("@")
    if not is_job_name(name):
        name = name.removeprefix(f"{served_name}:")
    if not is_name(name):
        raise _unknown(model, f"{_RULE}; before it may stand '{served_name}:', after it '@' and a version")
    if at and not _VERSION.fullmatch(version):
        raise _unknown(model, "After '@' stands the version, a whole number from 1")
    return Selector(name, int(version) if at else None)


def _whole_parts(text: str) -> bool:
    """No part between slashes is empty or means a folder."""
    return not {"", ".", ".."} & set(text.split("/"))


def _unknown(model: str, rule: str) -> NotFound:
    return NotFound(
        f"The model {model[:200]!r} does not exist. {rule}. GET /v1/models lists what is served.",
        param="model",
        code="model_not_found",
    )
