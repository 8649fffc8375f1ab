"""A server around the toy engine of tests/server, for clients that are programs of their own.

    PYTHONPATH=src:. python tests/clients/toy_server.py --port 8123

Prints its address when it is ready and serves until it is interrupted. It has the adapters `sql` and `team/poet`;
its `/openapi.json` names them.
"""

from __future__ import annotations

import argparse
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.server.conftest import BASE, MakeServer, write_model

MODELS = (BASE, "sql", "team/poet")


def name_models(document: dict[str, Any]) -> None:
    """Say in the document which models there are, so that made-up requests get further than to a 404."""
    for schema in document["components"]["schemas"].values():
        model = schema.get("properties", {}).get("model")
        if model:
            absent = [] if "model" in schema.get("required", []) else [None]
            schema["properties"]["model"] = {"enum": [*MODELS, *absent]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    port = parser.parse_args().port
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with tempfile.TemporaryDirectory() as folder:
        make = MakeServer(Path(folder), write_model(Path(folder) / "model"))
        server = make(adapters=MODELS[1:], listening=socket.create_server(("127.0.0.1", port)))
        name_models(server.app.openapi())
        print(server.until_ready().url, flush=True)
        ended.wait()
        make.stop()


if __name__ == "__main__":
    main()
