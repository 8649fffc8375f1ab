"""Uploads, names, aliases, rollbacks and deletes."""

from __future__ import annotations

import hashlib
import stat

import pytest
from tests.adapters.stored import LIMIT, leftovers, names, upload

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.store import AdapterStore
from veneer.errors import AdapterRefused, Conflict, InvalidRequest, NotFound, TooLarge

# ---- uploads --------------------------------------------------------------------------------------


def test_upload_and_resolve(store: AdapterStore) -> None:
    first = upload(store, "team/bot", b"weights", kind="lora", rank=8, warnings=["x"], effect=0.5)
    assert (first.name, first.version, first.created, first.current) == ("team/bot", 1, True, True)
    assert (first.config_bytes, first.weights_bytes, first.file_bytes) == (2, 7, 9)
    found = store.resolve("team/bot")
    assert found.details == {"kind": "lora", "rank": 8, "warnings": ["x"], "effect": 0.5}
    assert found.digest == first.digest
    assert not found.created
    assert (store.blob(first.digest) / WEIGHTS_FILE).read_bytes() == b"weights"
    assert stat.S_IMODE(store.blob(first.digest).stat().st_mode) == 0o700

    second = upload(store, "team/bot", b"other")
    assert second.version == 2
    assert store.resolve("team/bot").digest == second.digest
    assert store.resolve("team/bot", 1).digest == first.digest
    assert [(each.version, each.current) for each in store.versions("team/bot")] == [(1, False), (2, True)]


def test_digest_is_what_it_says(store: AdapterStore) -> None:
    def part(name: str, data: bytes) -> bytes:
        return name.encode() + b"\0" + len(data).to_bytes(8, "big") + hashlib.sha256(data).digest()

    expected = hashlib.sha256(part(CONFIG_FILE, b"{}") + part(WEIGHTS_FILE, b"abc")).hexdigest()
    assert upload(store, "one", b"abc").digest == expected
    assert upload(store, "two", b"{}", config=b"abc").digest != expected


def test_equal_content_is_the_same_version(store: AdapterStore) -> None:
    first = upload(store, "one", b"same", rank=1)
    again = upload(store, "one", b"same", rank=2)
    assert (again.version, again.created, again.details) == (1, False, {"rank": 1})
    assert upload(store, "two", b"same").digest == first.digest
    assert leftovers(store) == ([first.digest], [])
    upload(store, "one", b"new")
    assert upload(store, "one", b"same").version == 3  # not the current content, so a new version


def test_two_uploads_of_a_name_at_once(store: AdapterStore) -> None:
    with store.reserve("one"):
        with pytest.raises(InvalidRequest, match="'one' is in progress") as refused, store.reserve("one"):
            pass
        assert (refused.value.code, refused.value.param) == ("upload_in_progress", "name")
        with store.reserve("two"):
            pass
    upload(store, "one", b"later")


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_upload_with_a_missing_file(store: AdapterStore, missing: str) -> None:
    with store.stage() as staging:
        staging.write(WEIGHTS_FILE if missing == CONFIG_FILE else CONFIG_FILE, [b"{}"], LIMIT)
        with pytest.raises(AdapterRefused, match=f"{missing} is missing"):
            store.commit(staging, "one", {})
    assert leftovers(store) == ([], [])


@pytest.mark.parametrize("kind", ["extra", "link"])
def test_staged_folder_with_something_else(store: AdapterStore, kind: str) -> None:
    with store.stage() as staging:
        staging.write(CONFIG_FILE, [b"{}"], LIMIT)
        if kind == "extra":
            staging.write(WEIGHTS_FILE, [b"{}"], LIMIT)
            (staging.path / "training_args.bin").write_bytes(b"pickle")
        else:
            (staging.path / WEIGHTS_FILE).symlink_to("/etc/hostname")
        with pytest.raises(AdapterRefused, match="does not belong"):
            store.commit(staging, "one", {})
    assert leftovers(store) == ([], [])


def test_write_limits(store: AdapterStore) -> None:
    with store.stage() as staging:
        with pytest.raises(TooLarge, match=r"adapter_config\.json is larger than the 10 bytes"):
            staging.write(CONFIG_FILE, [b"12345", b"67890", b"1"], 10)
        assert list(staging.path.iterdir()) == []
        assert staging.write(CONFIG_FILE, [b"12345", b"67890"], 10) == 10
        with pytest.raises(InvalidRequest, match="sent twice"):
            staging.write(CONFIG_FILE, [b"{}"], 10)
        assert (staging.path / CONFIG_FILE).read_bytes() == b"1234567890"
        with pytest.raises(ValueError, match="is not a file of an adapter"):
            staging.write("../store.db", [b""], 10)
    assert leftovers(store) == ([], [])


@pytest.mark.parametrize("name", ["", "../x", "a@1", "a:b", "/a", "a b", "x" * 129, "a\0", "\ud800"])
def test_names_outside_the_grammar(store: AdapterStore, name: str) -> None:
    with pytest.raises(InvalidRequest), store.reserve(name):
        pass
    with pytest.raises(InvalidRequest):
        store.set_pinned(name, True)
    with pytest.raises(NotFound) as missing:
        store.resolve(name)
    assert missing.value.code == "model_not_found"
    with pytest.raises(NotFound):
        store.versions(name)


def test_blob_takes_digests_alone(store: AdapterStore) -> None:
    for text in ("..", "A" * 64, "a" * 63, "a" * 64 + "\n"):
        with pytest.raises(ValueError, match="not a sha256 digest"):
            store.blob(text)


# ---- names ----------------------------------------------------------------------------------------


def test_resolve_unknown(store: AdapterStore) -> None:
    with pytest.raises(NotFound, match="'nobody' does not exist; GET /v1/models") as missing:
        store.resolve("nobody")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    upload(store, "one", b"1")
    for version in (2, 0, -1, 2**31, 2**70):
        with pytest.raises(NotFound, match=rf"'one' has no version {version}; it has 1"):
            store.resolve("one", version)
        with pytest.raises(NotFound, match="has no version"):
            store.rollback("one", version)
        with pytest.raises(NotFound, match="has no version"):
            store.alias("prod", "one", version)
        with pytest.raises(NotFound, match="has no version"):
            store.begin_delete("one", version)
    assert names(store) == [("one", 1)]


def test_alias_follows_or_stays(store: AdapterStore) -> None:
    upload(store, "bot", b"1")
    follows = store.alias("prod", "bot")
    store.alias("stable", "bot", 1)
    upload(store, "bot", b"2")
    assert (follows.served_name, follows.name, follows.version) == ("prod", "bot", 1)
    assert names(store) == [("bot", 2), ("prod", 2), ("stable", 1)]
    assert (store.resolve("stable").current, store.resolve("stable", 2).version) == (False, 2)
    assert [each.version for each in store.versions("prod")] == [1, 2]
    store.rollback("bot")
    assert store.resolve("prod").version == 1
    upload(store, "other", b"3")
    assert store.alias("prod", "other").name == "other"
    store.remove_alias("prod")
    with pytest.raises(NotFound):
        store.resolve("prod")
    with pytest.raises(NotFound, match="no alias 'prod'"):
        store.remove_alias("prod")


def test_alias_refusals(store: AdapterStore) -> None:
    upload(store, "bot", b"1")
    upload(store, "other", b"2")
    store.alias("prod", "bot")
    with pytest.raises(Conflict, match="'other' is an adapter's name"):
        store.alias("other", "bot")
    with pytest.raises(Conflict, match="'bot' is an adapter's name"):
        store.alias("bot", "bot")
    with pytest.raises(Conflict, match="'prod' is an alias of 'bot'"):
        store.alias("next", "prod")
    with pytest.raises(NotFound):
        store.alias("next", "nobody")
    with pytest.raises(Conflict, match="'prod' is an alias of 'bot'"), store.reserve("prod"):
        pass
    for change in (store.rollback, store.begin_delete, lambda name: store.set_pinned(name, True)):
        with pytest.raises(Conflict, match="'prod' is an alias of 'bot'"):
            change("prod")
    with pytest.raises(NotFound, match="no alias 'bot'"):
        store.remove_alias("bot")
    assert names(store) == [("bot", 1), ("other", 1), ("prod", 1)]


def test_upload_loses_to_an_alias_made_meanwhile(store: AdapterStore) -> None:
    upload(store, "bot", b"1")
    with store.reserve("prod"), store.stage() as staging:
        staging.write(CONFIG_FILE, [b"{}"], LIMIT)
        staging.write(WEIGHTS_FILE, [b"2"], LIMIT)
        store.alias("prod", "bot")
        with pytest.raises(Conflict, match="is an alias"):
            store.commit(staging, "prod", {})
    assert leftovers(store) == ([store.resolve("bot").digest], [])


def test_rollback_walks_back(store: AdapterStore) -> None:
    for weights in (b"1", b"2", b"3"):
        upload(store, "bot", weights)
    assert store.rollback("bot").version == 2
    assert store.rollback("bot").version == 1
    with pytest.raises(Conflict, match="nothing to roll back to"):
        store.rollback("bot")
    assert store.resolve("bot").version == 1  # the refusal changed nothing
    assert store.rollback("bot", 3).version == 3
    assert upload(store, "bot", b"4").version == 4
    assert store.rollback("bot").version == 3
    store.begin_delete("bot", 1)
    with pytest.raises(Conflict):
        store.rollback("bot")


def test_pins(store: AdapterStore) -> None:
    upload(store, "bot", b"1")
    assert store.set_pinned("bot", True).pinned
    assert store.resolve("bot").pinned
    assert upload(store, "bot", b"2").pinned
    assert not store.set_pinned("bot", False).pinned


# ---- deletes --------------------------------------------------------------------------------------


def test_delete_of_a_name(store: AdapterStore) -> None:
    first, second = upload(store, "bot", b"1"), upload(store, "bot", b"2")
    upload(store, "other", b"2")
    assert store.begin_delete("bot") == (first.digest,)  # `other` has the second
    with pytest.raises(NotFound):
        store.resolve("bot")
    assert names(store) == [("other", 1)]
    assert store.blob(first.digest).exists()  # running requests may still need it
    store.finish_delete([first.digest, second.digest])
    assert leftovers(store) == ([second.digest], [])
    with pytest.raises(NotFound):
        store.begin_delete("bot")
    assert upload(store, "bot", b"1").version == 3  # numbers are never used again


def test_delete_of_a_version(store: AdapterStore) -> None:
    for weights in (b"1", b"2"):
        upload(store, "bot", weights)
    with pytest.raises(Conflict, match="roll back to another version first"):
        store.begin_delete("bot", 2)
    store.alias("stable", "bot", 1)
    with pytest.raises(Conflict, match="version 1 of adapter 'bot' is the target of 'stable'"):
        store.begin_delete("bot", 1)
    store.alias("stable", "bot")
    store.finish_delete(store.begin_delete("bot", 1))
    assert [each.version for each in store.versions("bot")] == [2]
    with pytest.raises(Conflict, match="adapter 'bot' is the target of 'stable'"):
        store.begin_delete("bot", 2)  # the only one, so the whole adapter
    store.remove_alias("stable")
    store.finish_delete(store.begin_delete("bot", 2))
    assert (names(store), leftovers(store)) == ([], ([], []))


def test_upload_between_begin_and_finish_keeps_the_files(store: AdapterStore) -> None:
    upload(store, "bot", b"1")
    gone = store.begin_delete("bot")
    again = upload(store, "bot", b"1")
    store.finish_delete(gone)
    assert (store.blob(again.digest) / WEIGHTS_FILE).read_bytes() == b"1"
    assert store.resolve("bot").version == 2


def test_deleted_name_can_become_an_alias_and_back(store: AdapterStore) -> None:
    upload(store, "bot", b"1")
    upload(store, "old", b"2")
    store.begin_delete("old")
    assert store.alias("old", "bot").name == "bot"
    store.remove_alias("old")
    assert upload(store, "old", b"2").version == 2
