"""A server around the toy engine of tests/server, for clients that are programs of their own.

    PYTHONPATH=src:. python tests/clients/toy_server.py --port 8123

Prints its address when it is ready and serves until it is interrupted. It has the adapters `sql` and `team/poet`.
"""

from __future__ import annotations

import argparse
import signal
import socket
import tempfile
import threading
from pathlib import Path

from tests.server.conftest import MakeServer, write_model


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
        server = make(adapters=("sql", "team/poet"), listening=socket.create_server(("127.0.0.1", port)))
        print(server.until_ready().url, flush=True)
        ended.wait()
        make.stop()


if __name__ == "__main__":
    main()
