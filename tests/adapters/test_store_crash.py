"""SIGKILL during uploads, deletes, alias moves and rollbacks: the store holds the old state or the new one.

This file is also the program that gets killed. `python test_store_crash.py` imports the store once and forks
one worker for each line on its standard input, so that fifty workers cost little more than one start.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from veneer.adapters.store import AdapterStore
from veneer.errors import VeneerError

NAMES = ("one", "two", "team/three")
ALIASES = ("prod", "next")
KINDS = ("upload", "delete", "alias", "rollback")
FILES = ("adapter_config.json", "adapter_model.safetensors")

Operation = list[Any]  # [kind, name, arguments …], as JSON


def content(seed: int) -> tuple[bytes, bytes]:
    """The two files of an adapter. Few seeds: the same content turns up under several names."""
    rng = random.Random(seed)
    return json.dumps({"seed": seed}).encode(), rng.randbytes(1000 + 20_000 * (seed % 4))


def digest_of(config: bytes, weights: bytes) -> str:
    whole = hashlib.sha256()
    for name, data in zip(FILES, (config, weights), strict=True):
        whole.update(name.encode() + b"\0" + len(data).to_bytes(8, "big") + hashlib.sha256(data).digest())
    return whole.hexdigest()


# ---- the worker -----------------------------------------------------------------------------------


def perform(store: AdapterStore, operation: Operation) -> None:
    kind, name, *arguments = operation
    if kind == "upload":
        with store.reserve(name), store.stage() as staging:
            for filename, data in zip(FILES, content(arguments[0]), strict=True):
                staging.write(filename, (data[i : i + 4096] for i in range(0, len(data), 4096)), 1 << 20)
            store.commit(staging, name, {"seed": arguments[0]})
    elif kind == "delete":
        store.finish_delete(store.begin_delete(name, *arguments))
    elif kind == "alias":
        store.alias(name, *arguments)
    elif kind == "remove_alias":
        store.remove_alias(name)
    else:
        store.rollback(name, *arguments)


def choose(rng: random.Random, store: AdapterStore) -> Operation:
    kind = rng.choice((*KINDS, "upload", "alias"))
    name = rng.choice(NAMES)
    try:
        version = rng.choice([None, *(each.version for each in store.versions(name))])
    except VeneerError:
        version = None
    if kind == "upload":
        return [kind, name, rng.randrange(12)]
    if kind == "alias":
        alias = rng.choice(ALIASES)
        return ["remove_alias", alias] if rng.random() < 0.4 else [kind, alias, name, version]
    return [kind, name, version]


def say(**values: Any) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


def work(root: str, seed: int, only: Operation | None, steps: int) -> None:
    """Random operations until killed, or `only` one, killed at its `steps`-th step."""
    store = AdapterStore(Path(root))
    rng = random.Random(seed)
    say(pid=os.getpid())
    if only:
        die_at_step(steps)
        perform(store, only)
        say(done=only)
        return
    while True:
        operation = choose(rng, store)
        say(begin=operation)
        try:
            perform(store, operation)
        except VeneerError:
            say(refused=operation)
        else:
            say(done=operation)


def die_at_step(steps: int) -> None:
    """SIGKILL this process before the given number of file operations and database commits."""
    left = steps

    def count(name: str, _arguments: object) -> None:
        nonlocal left
        if name in ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "commit"):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    event.listen(Engine, "commit", lambda connection: count("commit", connection))


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                work(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        say(ended=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


# ---- what the store must hold ---------------------------------------------------------------------


class Refused(Exception):
    """The model's own refusal of an operation."""


@dataclass
class Model:
    """The store's promises again, in plain dictionaries."""

    versions: dict[str, dict[int, str]] = field(default_factory=dict)  # name -> version -> digest
    pointer: dict[str, list[int]] = field(default_factory=dict)
    last: Counter[str] = field(default_factory=Counter)
    aliases: dict[str, tuple[str, int | None]] = field(default_factory=dict)

    def after(self, operation: Operation) -> Model:
        kind, name, *arguments = operation
        new = copy.deepcopy(self)
        if kind == "remove_alias":
            _require(new.aliases.pop(name, None) is not None)
        elif kind == "alias":
            target, version = arguments
            _require(target in new.versions and (version is None or version in new.versions[target]))
            new.aliases[name] = (target, version)
        elif kind == "upload":
            new._upload(name, digest_of(*content(arguments[0])))
        else:
            _require(name in new.versions)
            _require(arguments[0] is None or arguments[0] in new.versions[name])
            (new._delete if kind == "delete" else new._rollback)(name, arguments[0])
        return new

    def _upload(self, name: str, digest: str) -> None:
        stack = self.pointer.setdefault(name, [])
        if stack and self.versions[name][stack[-1]] == digest:
            return
        self.last[name] += 1
        self.versions.setdefault(name, {})[self.last[name]] = digest
        stack.append(self.last[name])

    def _delete(self, name: str, version: int | None) -> None:
        whole = version is None or len(self.versions[name]) == 1
        _require(whole or version != self.pointer[name][-1])
        _require((name, version) not in self.aliases.values())
        if whole:
            _require(name not in {target for target, _ in self.aliases.values()})
            del self.versions[name], self.pointer[name]
        else:
            del self.versions[name][version or 0]
            self.pointer[name] = [each for each in self.pointer[name] if each != version]

    def _rollback(self, name: str, version: int | None) -> None:
        stack = self.pointer[name]
        current = stack[-1]
        if version is None:
            while stack and stack[-1] == current:
                stack.pop()
            _require(bool(stack))
        elif version != current:
            stack.append(version)

    def view(self) -> dict[str, Any]:
        names = {name: [self.pointer[name][-1], known] for name, known in self.versions.items()}
        aliases = {
            alias: [target, version or self.pointer[target][-1], version]
            for alias, (target, version) in self.aliases.items()
        }
        return {"names": names, "aliases": aliases}


def _require(fine: bool) -> None:
    if not fine:
        raise Refused


def view(store: AdapterStore) -> dict[str, Any]:
    names: dict[str, Any] = {}
    aliases: dict[str, Any] = {}
    for each in store.list():
        if each.alias:
            aliases[each.served_name] = [each.name, each.version, each.alias.version]
        else:
            known = {version.version: version.digest for version in store.versions(each.name)}
            names[each.name] = [each.version, known]
    return {"names": names, "aliases": aliases}


def check(root: Path, allowed: list[Model]) -> Model:
    """Open the store after a crash: exactly one of the allowed states, whole files, nothing left over."""
    with AdapterStore(root) as store:
        found = view(store)
        matching = [model for model in allowed if model.view() == found]
        assert matching, f"{found} is none of {[model.view() for model in allowed]}"
        digests = {digest for _, known in found["names"].values() for digest in known.values()}
        for digest in digests:
            assert digest_of(*((store.blob(digest) / name).read_bytes() for name in FILES)) == digest
        for name in found["names"]:
            assert [each.damage for each in store.versions(name) if each.damage] == []
            store.resolve(name)
    assert {entry.name for entry in (root / "blobs").iterdir()} == digests
    assert list((root / "staging").iterdir()) == []
    return matching[-1]


# ---- the tests ------------------------------------------------------------------------------------


class Worker:
    """The program above, in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def start(self, root: Path, *, seed: int = 0, only: Operation | None = None, steps: int = 0) -> None:
        assert self.process.stdin is not None
        line = json.dumps({"root": str(root), "seed": seed, "only": only, "steps": steps})
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker's program ended"
        return dict(json.loads(line))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Worker(process)


def test_kill_at_random_moments(tmp_path: Path, worker: Worker) -> None:
    rng = random.Random(20)
    model = Model()
    cut: Counter[str] = Counter()
    acknowledged: Counter[str] = Counter()
    usual = dict.fromkeys(KINDS, 0.01)  # seconds that an operation takes here
    for round_ in range(50):
        worker.start(tmp_path, seed=round_)
        pid = worker.hear()["pid"]
        victim, nth = KINDS[round_ % len(KINDS)], rng.randint(1, 4)
        pending: Operation | None = None
        killed, began = False, 0.0
        while "ended" not in (heard := worker.hear()):
            kind, operation = next(iter(heard.items()))
            if kind == "begin":
                pending, began = operation, time.perf_counter()
                nth -= operation[0] == victim
                if not nth and not killed:
                    killed = True
                    time.sleep(rng.uniform(0, 1.1) * usual[victim])  # the moment of death, in the operation
                    os.kill(pid, signal.SIGKILL)
                continue
            if kind == "done":
                usual[operation[0]] = time.perf_counter() - began
                acknowledged[operation[0]] += 1
                model = model.after(operation)
            else:
                with pytest.raises(Refused):
                    model.after(operation)
            pending = None
        assert heard["ended"] == -signal.SIGKILL
        allowed = [model]
        if pending:
            cut[pending[0]] += 1
            with contextlib.suppress(Refused):
                allowed.append(model.after(pending))
        model = check(tmp_path, allowed)
    print(f"acknowledged {dict(acknowledged)}, cut off {dict(cut)}")
    assert all(acknowledged[kind] >= 5 for kind in KINDS)
    assert cut.total() >= 20
    assert all(cut[kind] for kind in KINDS)


@pytest.mark.parametrize(
    "operation",
    [
        ["upload", "one", 5],
        ["upload", "fresh", 2],  # content that another name has
        ["delete", "two", None],
        ["delete", "one", 1],
        ["alias", "prod", "two", None],
        ["rollback", "one", None],
    ],
    ids=lambda operation: " ".join(map(str, operation)),
)
def test_kill_before_every_step(tmp_path: Path, worker: Worker, operation: Operation) -> None:
    before = Model()
    with AdapterStore(tmp_path / "start") as store:
        for seed, name in ((1, "one"), (2, "one"), (3, "two")):
            perform(store, ["upload", name, seed])
            before = before.after(["upload", name, seed])
        perform(store, ["alias", "prod", "one", None])
        before = before.after(["alias", "prod", "one", None])
    after = before.after(operation)
    seen = set()
    for steps in range(1, 60):
        root = tmp_path / str(steps)
        shutil.copytree(tmp_path / "start", root)
        worker.start(root, only=operation, steps=steps)
        assert worker.hear()["pid"]
        done = worker.hear()
        ended = done if "ended" in done else worker.hear()
        found = check(root, [after] if "done" in done else [before, after])
        seen.add(found is after)
        if ended["ended"] == 0:
            break
        assert ended["ended"] == -signal.SIGKILL
    else:
        pytest.fail("the operation never ended")
    assert steps > 1
    assert seen == {True, False}


if __name__ == "__main__":
    main()
