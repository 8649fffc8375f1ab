"""Restarts, damage, a full disk and many threads (test_store_crash.py has the kills)."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable
from tests.adapters.stored import LIMIT, leftovers, names, upload

from veneer.adapters.names import WEIGHTS_FILE
from veneer.adapters.schema import Base, served
from veneer.adapters.store import AdapterStore
from veneer.errors import Conflict, InvalidRequest, StorageFull

# ---- opening --------------------------------------------------------------------------------------


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        upload(store, "bot", b"1", rank=4)
        upload(store, "bot", b"2")
        store.alias("prod", "bot", 1)
        store.set_pinned("bot", True)
        before = store.list()
    with AdapterStore(tmp_path) as store:
        assert store.list() == before
        assert store.rollback("bot").details == {"rank": 4}


def test_one_process_owns_the_root(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from veneer.adapters.store import AdapterStore\n"
        "AdapterStore(pathlib.Path(sys.argv[1]))"
    )
    with AdapterStore(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )
        with pytest.raises(Conflict, match=f"open in another process \\(pid {os.getpid()}\\)"):
            AdapterStore(tmp_path)
    assert "veneer.errors.Conflict" in other.stderr
    AdapterStore(tmp_path).close()


def test_opening_finishes_what_was_interrupted(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        kept = upload(store, "kept", b"1").digest
        upload(store, "gone", b"2")
        store.begin_delete("gone")
        (tmp_path / "blobs" / ("f" * 64)).mkdir()
        (tmp_path / "staging" / "stale").mkdir()
        (tmp_path / "staging" / "stale" / WEIGHTS_FILE).write_bytes(b"half")
        (tmp_path / "staging" / "file").write_bytes(b"x")
    with AdapterStore(tmp_path) as store:
        assert leftovers(store) == ([kept], [])
        assert names(store) == [("kept", 1)]


@pytest.mark.parametrize("fault", ["missing", "short", "folder", "link"])
def test_damage_is_reported_and_healed_by_an_upload(tmp_path: Path, fault: str) -> None:
    with AdapterStore(tmp_path) as store:
        digest = upload(store, "bot", b"weights").digest
        upload(store, "fine", b"1")
        weights = store.blob(digest) / WEIGHTS_FILE
    weights.unlink()
    if fault == "short":
        weights.write_bytes(b"w")
    elif fault == "folder":
        weights.mkdir()
    elif fault == "link":
        weights.symlink_to("/etc/hostname")
    with AdapterStore(tmp_path) as store:
        damaged = {each.name: each.damage for each in store.list()}
        assert damaged["fine"] is None
        assert WEIGHTS_FILE in (damaged["bot"] or "")
        with pytest.raises(Conflict, match="version 1 cannot be served: adapter_model") as refused:
            store.resolve("bot")
        assert refused.value.code == "adapter_damaged"
        healed = upload(store, "bot", b"weights")
        assert (healed.version, healed.created, healed.damage) == (1, False, None)
        assert store.resolve("bot").digest == digest
        assert (store.blob(digest) / WEIGHTS_FILE).read_bytes() == b"weights"


def test_a_lost_database_does_not_delete_the_files(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        digest = upload(store, "bot", b"1").digest
    for path in tmp_path.glob("store.db*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(Conflict, match="holds 1 adapters but the database lists none"):
            AdapterStore(tmp_path)
    assert (tmp_path / "blobs" / digest / WEIGHTS_FILE).exists()


def test_sqlite_syncs_every_commit(store: AdapterStore) -> None:
    with store._engine.connect() as connection:
        found = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert found == ["wal", 2, 1, 30000]


def test_schema_and_queries_compile_for_postgresql() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    for table in Base.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))
    assert "coalesce" in str(served().compile(dialect=dialect))


# ---- a full disk ----------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_while_writing(store: AdapterStore) -> None:
    kept = upload(store, "bot", b"1")
    with store.reserve("bot"), store.stage() as staging:
        with (
            largest_file(300_000),
            pytest.raises(StorageFull, match=r"no room for adapter_model\.safetensors"),
        ):
            staging.write(WEIGHTS_FILE, [b"x" * 100_000] * 10, LIMIT)
        assert list(staging.path.iterdir()) == []
    assert leftovers(store) == ([kept.digest], [])
    assert upload(store, "bot", b"x" * 900_000).version == 2


def test_disk_full_in_the_database(store: AdapterStore) -> None:
    kept = upload(store, "bot", b"1")

    def cap(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    pages = 40
    event.listen(store._engine, "checkout", cap)
    with pytest.raises(StorageFull, match="no room for adapter 'bot'") as full:
        upload(store, "bot", b"2", warnings=["x" * 1_000_000])
    assert (full.value.status, full.value.code) == (400, "storage_full")
    assert leftovers(store) == ([kept.digest], [])
    assert store.resolve("bot").version == 1
    pages = 1_000_000
    assert upload(store, "bot", b"2", warnings=["x" * 1_000_000]).version == 2


def test_disk_full_keeps_a_blob_that_another_name_uses(store: AdapterStore) -> None:
    kept = upload(store, "bot", b"1")
    event.listen(store._engine, "checkout", lambda dbapi, *_: dbapi.execute("PRAGMA max_page_count=40"))
    with pytest.raises(StorageFull):
        upload(store, "other", b"1", warnings=["x" * 1_000_000])
    assert leftovers(store) == ([kept.digest], [])
    assert names(store) == [("bot", 1)]


def test_a_full_disk_still_allows_deletes(store: AdapterStore) -> None:
    """Nothing can be written before the spare room is given back; afterwards it is taken again."""
    spare = store.root / "spare"
    for name in ("one", "two"):
        upload(store, name, name.encode())

    def full(_connection: object) -> None:
        if spare.exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    event.listen(store._engine, "commit", full)
    with pytest.raises(StorageFull):
        upload(store, "three", b"3")
    gone = store.begin_delete("one")
    assert names(store) == [("two", 1)]
    store.finish_delete(gone)
    assert spare.stat().st_size == 1 << 20
    assert leftovers(store) == ([store.resolve("two").digest], [])


# ---- threads --------------------------------------------------------------------------------------


def test_threads_never_see_a_half_move(store: AdapterStore) -> None:
    """Writers upload, move, roll back and delete; readers always find whole versions under the names."""
    for name in ("left", "right"):
        upload(store, name, name.encode())
    store.alias("prod", "left")
    stop = threading.Event()

    def publish(name: str, weights: bytes) -> None:
        for _ in range(10_000):
            with suppress(InvalidRequest):  # the other writer of this name was faster
                upload(store, name, weights)
                return
            stop.wait(0.001)

    def write(number: int) -> None:
        for turn in range(8):
            publish(("left", "right")[number % 2] if turn % 3 else f"own{number}", b"%d" % (turn % 4))
            store.alias("prod", ("left", "right")[turn % 2])
            if turn % 4 == 3:
                store.finish_delete(store.begin_delete(f"own{number}"))

    def read(_number: int) -> int:
        reads = 0
        while not stop.is_set() or not reads:
            found = store.resolve("prod")
            assert found.name in ("left", "right")
            assert found.current
            assert (store.blob(found.digest) / WEIGHTS_FILE).stat().st_size == found.weights_bytes
            listed = {each.served_name: each for each in store.list()}
            assert {"left", "right", "prod"} <= listed.keys()
            prod = listed["prod"]
            assert prod.digest == listed[prod.name].digest
            assert [each.current for each in store.versions("left")].count(True) == 1
            reads += 1
            stop.wait(0.001)
        return reads

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read, number) for number in range(4)]
        writers = [pool.submit(write, number) for number in range(4)]
        try:
            for writer in writers:
                writer.result(timeout=60)
        finally:
            stop.set()
        assert all(reader.result(timeout=60) for reader in readers)
    assert leftovers(store)[1] == []
    digests = {version.digest for each in store.list() for version in store.versions(each.name)}
    assert leftovers(store)[0] == sorted(digests)
