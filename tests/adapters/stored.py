"""What tests of the store share: an upload, and what is there afterwards."""

from __future__ import annotations

from typing import Any

from veneer.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.schema import AdapterVersion
from veneer.adapters.store import AdapterStore

LIMIT = 1 << 20


def upload(
    store: AdapterStore, name: str, weights: bytes, config: bytes = b"{}", **details: Any
) -> AdapterVersion:
    with store.reserve(name), store.stage() as staging:
        staging.write(CONFIG_FILE, [config], LIMIT)
        staging.write(WEIGHTS_FILE, [weights], LIMIT)
        return store.commit(staging, name, details)


def leftovers(store: AdapterStore) -> tuple[list[str], list[str]]:
    """What lies in blobs/ and in staging/."""
    blobs, staging = (
        sorted(entry.name for entry in (store.root / folder).iterdir()) for folder in ("blobs", "staging")
    )
    return blobs, staging


def names(store: AdapterStore) -> list[tuple[str, int]]:
    return [(each.served_name, each.version) for each in store.list()]
