"""Load over HTTP against `veneer serve` in its own process, on random weights of Llama-3.1-8B's shapes.

python -m benchmarks.serving [--rates 10,25,40,55] [--peer vllm=http://127.0.0.1:8001] [--url http://…]

Open loop: chat requests of fixed lengths arrive as a Poisson process whatever the server does, each for an
adapter (popularity identical, uniform, zipf or distinct). Reported for each rate: percentiles of the time to the
first token (from when the request was due) and between tokens, tokens/s, and the share of requests that meet
both limits (the second one by the request's mean). `--peer` sends the same load to another server that lists
adapters in /v1/models with their `parent`; with `--url` no server is started, and that one is measured.

Op `http`, case clients/adapters: so many clients stream at once; time of a token, beside an engine alone with
the same configuration, requests and adapters in this process. Both times are from the first request to the last
token, prompts included. The checkpoint and its adapters are made once and kept (16 + 5 GB at 8B).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.device import Row, device_name, print_rows, write_report
from benchmarks.load import POPULARITIES, Result, fire, make_shots, poisson
from benchmarks.models import RANK, SHAPES, checkpoint_folder
from benchmarks.servers import (
    REQUEST_SECONDS,
    adapters_of,
    checked,
    http_row,
    http_us,
    serve_options,
    serving,
)
from tqdm import tqdm


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds; empty when there is nothing."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, (50, 90, 99))
    return dict(zip(("p50", "p90", "p99"), map(float, values), strict=True))


def summarize(results: Sequence[Result], slo_ttft: float, slo_itl: float) -> dict[str, Any]:
    """What one load showed. `slo_ttft` and `slo_itl` in milliseconds; a failed request meets no limit."""
    answered = [result for result in results if result.error is None and result.events]
    ttft = [result.events[0] - result.due for result in answered]
    gaps = [np.diff(result.events) for result in answered]
    met = sum(
        first * 1e3 <= slo_ttft and (not len(gap) or gap.mean() * 1e3 <= slo_itl)
        for first, gap in zip(ttft, gaps, strict=True)
    )
    tokens = sum(result.tokens for result in answered)
    seconds = max((r.events[-1] for r in answered), default=0.0) - min((r.sent for r in results), default=0.0)
    return {
        "requests": len(results),
        "errors": len(results) - len(answered),
        "first_error": next((result.error for result in results if result.error), None),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds if answered else 0.0,
        "events_per_token": sum(len(r.events) for r in answered) / tokens if tokens else 0.0,
        "ttft_ms": percentiles(ttft),
        "inter_token_ms": percentiles(np.concatenate(gaps).tolist() if gaps else []),
        "slo_share": met / len(results) if results else 0.0,
        "sent_late_ms": percentiles([result.sent - result.due for result in results]),
    }


def open_loop(args: argparse.Namespace, servers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every popularity at every rate, the servers taking turns."""
    names = {
        server: [model["id"] for model in adapters_of(url, args.adapters)] for server, url in servers.items()
    }
    words = {"vocabulary": SHAPES[args.shapes]["vocab_size"], "prompt": args.prompt}
    for server, url in servers.items():  # loads the adapters
        warm = make_shots(names[server], [0.0] * args.adapters, "distinct", **words, output=2, seed=1)
        checked(fire(url, warm, processes=args.processes, timeout=REQUEST_SECONDS))
    popularities = args.popularities.split(",")
    runs = [
        (popularity, float(rate), server)
        for popularity in popularities
        for rate in args.rates.split(",")
        for server in servers
    ]
    curves = []
    for popularity, rate, server in (bar := tqdm(runs, unit="load")):
        bar.set_postfix_str(f"{server} {popularity} {rate:g}/s")
        seed = 10_000 * (1 + popularities.index(popularity)) + int(rate)
        times = poisson(rate, args.seconds, seed)
        shots = make_shots(names[server], times, popularity, **words, output=args.tokens, seed=seed)
        results = fire(servers[server], shots, processes=args.processes, timeout=REQUEST_SECONDS)
        found = summarize(results, args.slo_ttft, args.slo_itl)
        curves.append({"server": server, "popularity": popularity, "rate": rate, **found})
    return curves


def draw(curves: Sequence[Mapping[str, Any]], args: argparse.Namespace, path: Path) -> None:
    """Three curves against the rate: first token, between tokens, share within the limits."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (first, between, share) = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for server, popularity in dict.fromkeys((curve["server"], curve["popularity"]) for curve in curves):
        mine = [c for c in curves if (c["server"], c["popularity"]) == (server, popularity) and c["ttft_ms"]]
        rates, label = [c["rate"] for c in mine], f"{server}, {popularity}"
        for axes, key in ((first, "ttft_ms"), (between, "inter_token_ms")):
            (line,) = axes.plot(rates, [c[key].get("p50") for c in mine], marker="o", label=f"{label} p50")
            axes.plot(
                rates,
                [c[key].get("p99") for c in mine],
                marker="x",
                linestyle="--",
                color=line.get_color(),
                label=f"{label} p99",
            )
        share.plot(rates, [c["slo_share"] for c in mine], marker="o", label=label)
    first.set_title("time to first token, ms")
    between.set_title("between tokens, ms")
    share.set_title(f"share with first token ≤ {args.slo_ttft:g} ms and mean ≤ {args.slo_itl:g} ms a token")
    share.set_ylim(-0.02, 1.02)
    for axes in (first, between):
        axes.set_yscale("log")
    for axes in (first, between, share):
        axes.set_xlabel("requests a second")
        axes.legend(fontsize="x-small")
    figure.suptitle(
        f"{device_name()}: {args.adapters} adapters of rank {RANK}, {args.prompt} tokens in, {args.tokens} out"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def print_curves(curves: Sequence[Mapping[str, Any]]) -> None:
    columns = ("rate", "tok/s", "TTFT p50", "p99", "ITL p50", "p99", "SLO", "errors")
    print("\n" + f"{'server':10}{'popularity':12}" + "".join(f"{name:>9}" for name in columns))
    for curve in curves:
        times = [curve[key].get(p, 0.0) for key in ("ttft_ms", "inter_token_ms") for p in ("p50", "p99")]
        values = [curve["rate"], curve["tokens_per_s"], *times, curve["slo_share"], curve["errors"]]
        print(f"{curve['server']:10}{curve['popularity']:12}" + "".join(f"{value:9.2f}" for value in values))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", help="measure this running server instead of starting one")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="repeatable")
    parser.add_argument("--shapes", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path, help="of the checkpoint (in the cache)")
    parser.add_argument("--serve", default="", help="more options of `veneer serve`")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--popularities", default=",".join(POPULARITIES))
    parser.add_argument("--rates", default="10,25,40,55", help="requests a second")
    parser.add_argument("--seconds", type=float, default=4.0, help="of arrivals at each rate")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--slo-ttft", type=float, default=500.0, help="ms to the first token")
    parser.add_argument("--slo-itl", type=float, default=25.0, help="ms between tokens, a request's mean")
    parser.add_argument("--clients", type=int, default=64, help="of op http; also sequences in one step")
    parser.add_argument("--http-tokens", type=int, default=256, help="of each answer in op http")
    parser.add_argument("--rounds", type=int, default=3, help="of op http")
    parser.add_argument("--processes", type=int, default=4, help="that send the load")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="a folder")
    args = parser.parse_args(argv)
    peers = dict(peer.split("=", 1) for peer in args.peer)
    rows: list[Row] = []
    if args.url:
        curves = open_loop(args, {"server": args.url, **peers})
    else:
        options = serve_options(args, args.folder or checkpoint_folder(args.layers, args.shapes))
        with serving(options) as url:
            ours = http_us(args, url)
            curves = open_loop(args, {"veneer": url, **peers})
            digests = [model["digest"] for model in adapters_of(url, args.adapters)]
        rows.append(http_row(args, options, digests, ours))
        print_rows(rows)
    print_curves(curves)
    load = {"prompt": args.prompt, "tokens": args.tokens, "adapters": args.adapters, "rank": RANK}
    slo = {"ttft_ms": args.slo_ttft, "mean_inter_token_ms": args.slo_itl}
    extra = {"load": load, "slo": slo, "curves": curves}
    path = write_report(args.output, "serving", rows, extra, lambda image: draw(curves, args, image))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
