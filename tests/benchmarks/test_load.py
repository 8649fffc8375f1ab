"""The load generator: who is asked for what and when, and that it reads streams however they are cut."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from benchmarks.load import POPULARITIES, Result, Shot, choose, fire, make_shots, poisson
from benchmarks.serving import summarize

EVENTS = (
    {"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None},
    {"choices": [{"delta": {"content": " w7"}}], "usage": None},
    {"choices": [{"delta": {"content": '"quoted\n\n'}}], "usage": None},
    {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def stream(spaced: bool) -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    events = [json.dumps(event, separators=separators) for event in EVENTS]
    data = [f"data: {event}\n\n".encode() for event in [*events, "[DONE]"]]
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in data) + b"0\r\n\r\n"


class Handler(socketserver.StreamRequestHandler):
    """Answers by the model that is asked for."""

    def handle(self) -> None:
        head = b"".join(iter(self.rfile.readline, b"\r\n"))
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        match json.loads(self.rfile.read(length))["model"]:
            case "whole":
                self.wfile.write(stream(spaced=False))
            case "bytewise":
                for byte in stream(spaced=True):
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
            case "slow":
                half = stream(spaced=False).index(b"quoted")
                self.wfile.write(stream(spaced=False)[:half])
                time.sleep(0.3)
                self.wfile.write(stream(spaced=False)[half:])
            case "refused":
                self.wfile.write(b"HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\nno such model")
            case "cut":
                self.wfile.write(stream(spaced=False)[:-60])
            case "failing":
                self.wfile.write(HEAD + b'1c\r\ndata: {"error": "it failed"}\n\n\r\n')
                self.rfile.read()
            case "silent":
                self.rfile.read()  # until the client goes


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def shoot(url: str, *models: str, processes: int = 1, timeout: float = 30.0) -> dict[str, Result]:
    shots = [Shot(0.0, model, "w1 w2 w3", 2) for model in models]
    return {result.model: result for result in fire(url, shots, processes=processes, timeout=timeout)}


def test_streams_are_read_however_they_are_cut(url: str) -> None:
    found = shoot(url, "whole", "bytewise", "slow", processes=2)
    for result in found.values():
        assert (result.error, result.tokens, len(result.events)) == (None, 2, 2)
        assert result.sent < result.events[0]
    first, second = found["slow"].events
    assert second - first > 0.05


def test_failures_are_told(url: str) -> None:
    found = shoot(url, "refused", "cut", "failing", "whole")
    assert "404" in (found["refused"].error or "")
    assert "no such model" in (found["refused"].error or "")
    assert "closed early" in (found["cut"].error or "")
    assert "it failed" in (found["failing"].error or "")
    assert found["whole"].error is None


def test_a_silent_server_times_out(url: str) -> None:
    assert shoot(url, "silent", timeout=0.2)["silent"].error == "no whole answer within 0.2 s"


def test_nobody_listens() -> None:
    assert shoot("http://127.0.0.1:9", "whole")["whole"].error


def test_requests_are_sent_when_they_are_due(url: str) -> None:
    shots = [Shot(0.1 * index, "whole", "w1", 2) for index in range(4)]
    results = sorted(fire(url, shots, processes=2, timeout=30), key=lambda result: result.due)
    assert [result.due for result in results] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert all(result.sent >= result.due - 1e-3 for result in results)
    assert results[0].sent < results[-1].due  # not all at the end


def test_popularities() -> None:
    drawn = {name: Counter(choose(name, 8, 4000, seed=1)) for name in POPULARITIES}
    assert drawn["identical"] == {0: 4000}
    assert set(drawn["distinct"].values()) == {500}
    assert all(400 < count < 600 for count in drawn["uniform"].values())
    harmonic = sum(1 / (k + 1) for k in range(8))
    for k in range(8):
        assert drawn["zipf"][k] == pytest.approx(4000 / (k + 1) / harmonic, rel=0.2)
    assert choose("zipf", 8, 50, seed=2) != choose("zipf", 8, 50, seed=3)
    with pytest.raises(ValueError, match="identical, uniform, zipf, distinct"):
        choose("skewed", 8, 1, seed=0)


def test_poisson_arrivals() -> None:
    times = poisson(100.0, 40.0, seed=5)
    gaps = [b - a for a, b in pairwise(times)]
    assert times == sorted(times)
    assert times[-1] < 40.0
    assert sum(gaps) / len(gaps) == pytest.approx(0.01, rel=0.1)
    # exponential: the standard deviation is the mean
    assert (sum(g * g for g in gaps) / len(gaps) - 0.01**2) ** 0.5 == pytest.approx(0.01, rel=0.15)


def test_prompts_differ_and_have_the_length() -> None:
    shots = make_shots(["a", "b"], [0.0, 0.5, 1.0], "distinct", vocabulary=100, prompt=5, output=9, seed=0)
    assert [shot.model for shot in shots] == ["a", "b", "a"]
    assert [len(shot.prompt.split()) for shot in shots] == [5, 5, 5]
    assert len({shot.prompt for shot in shots}) == 3
    assert all(0 <= int(word[1:]) < 100 for shot in shots for word in shot.prompt.split())


def test_summary() -> None:
    results = [
        Result("a", due=1.0, sent=1.01, events=[1.1, 1.2, 1.4], tokens=3),  # 100 ms, then 150 ms on average
        Result("a", due=2.0, sent=2.0, events=[2.5, 2.51], tokens=2),  # 500 ms, then 10 ms
        Result("a", due=3.0, sent=3.0, events=[3.1, 3.12], tokens=2),  # 100 ms, then 20 ms
        Result("a", due=3.5, sent=3.5, events=[3.6], tokens=1, error="cut"),
    ]
    found = summarize(results, slo_ttft=200.0, slo_itl=100.0)
    assert (found["requests"], found["errors"], found["first_error"]) == (4, 1, "cut")
    assert found["slo_share"] == 0.25
    assert found["ttft_ms"]["p50"] == pytest.approx(100.0)
    assert found["inter_token_ms"]["p50"] == pytest.approx(60.0)
    assert found["tokens_per_s"] == pytest.approx(7 / (3.12 - 1.01))
    assert found["sent_late_ms"]["p99"] == pytest.approx(9.7)


def test_summary_of_nothing() -> None:
    found = summarize([Result("a", due=0.0, error="refused")], slo_ttft=1.0, slo_itl=1.0)
    assert (found["errors"], found["tokens_per_s"], found["ttft_ms"], found["slo_share"]) == (1, 0.0, {}, 0.0)
