"""Prometheus metrics of one server, in a registry of their own.

Two sources: the routes report requests as they happen (the `Metrics` protocol of `state.py`), and the
engine's last `Stats` are turned into samples when somebody scrapes. Engine totals count since the engine
started; they fall to zero when it restarts, which Prometheus' `rate()` expects of counters.

Names that clients choose become labels, so their number is bounded: the first `limit` names seen keep their
own series, later ones share `_other`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from veneer.engine.messages import AdapterStats, EngineInfo, HotAdapter, Stats
from veneer.server.jobs import Progress
from veneer.training.jobs.job_schema import Status

# Not wanted: a series beside each counter that says when it began.
disable_created_metrics()  # type: ignore[no-untyped-call]

OTHER = "_other"
BASE = "_base"  # the label of requests without an adapter; adapter names cannot start with "_"
STATES = ("starting", "ready", "draining", "dead")

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class BoundedLabels:
    """Maps names to label values, at most `limit` different ones plus `_other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def label(self, name: str) -> str:
        if name not in self._seen:
            if len(self._seen) >= self._limit:
                return OTHER
            self._seen.add(name)
        return name


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """What a scrape needs to know of the engine. `names` maps adapter digests to names."""

    model_name: str
    state: str
    restarts: int = 0
    info: EngineInfo | None = None
    stats: Stats | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    jobs: Mapping[str, int] = field(default_factory=dict)  # by status
    training: Progress | None = None


class PrometheusMetrics:
    """Implements `veneer.server.state.Metrics`; `render` gives the text of /metrics."""

    def __init__(self, *, max_adapters: int = 64, max_fields: int = 64) -> None:
        self.registry = CollectorRegistry()
        self.adapter_labels = BoundedLabels(max_adapters)
        self._field_labels = BoundedLabels(max_fields)
        self._engine = _EngineCollector(self.adapter_labels)
        self.registry.register(self._engine)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"veneer_{name}", text, labels, registry=self.registry)

        self._requests = counter("requests", "Requests finished, by route and outcome", "route", "outcome")
        self._tokens = counter("tokens", "Tokens of finished requests, by kind", "kind")
        self._adapter_requests = counter("adapter_requests", "Requests started, by adapter", "adapter")
        self._adapter_tokens = counter("adapter_tokens", "Tokens, by adapter and kind", "adapter", "kind")
        self._fields = counter("unknown_request_fields", "Request fields accepted and not known", "field")
        self._in_progress = Gauge(
            "veneer_requests_in_progress",
            "Requests being answered, by route",
            ["route"],
            registry=self.registry,
        )
        self._first_token = Histogram(
            "veneer_time_to_first_token_seconds",
            "From a request's receipt to its first token",
            registry=self.registry,
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self._inter_token = Histogram(
            "veneer_inter_token_latency_seconds",
            "Between two tokens of a sequence",
            registry=self.registry,
            buckets=_INTER_TOKEN_SECONDS,
        )

    def request_started(self, route: str, adapter_name: str | None) -> None:
        self._in_progress.labels(route).inc()
        self._adapter_requests.labels(self._adapter(adapter_name)).inc()

    def first_token(self, adapter_name: str | None, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def tokens(self, adapter_name: str | None, prompt: int, completion: int) -> None:
        adapter = self._adapter(adapter_name)
        for kind, count in (("prompt", prompt), ("completion", completion)):
            self._tokens.labels(kind).inc(count)
            self._adapter_tokens.labels(adapter, kind).inc(count)

    def request_finished(self, route: str, adapter_name: str | None, outcome: str) -> None:
        self._in_progress.labels(route).dec()
        self._requests.labels(route, outcome).inc()

    def unknown_field(self, name: str) -> None:
        self._fields.labels(self._field_labels.label(name[:64])).inc()

    def render(self, engine: EngineView) -> bytes:
        """Prometheus' text format, with the engine's state as it is now."""
        self._engine.view = engine
        return generate_latest(self.registry)

    def _adapter(self, name: str | None) -> str:
        return BASE if name is None else self.adapter_labels.label(name)


class _EngineCollector(Collector):
    """Turns the engine's last `Stats` and `EngineInfo` into metric families."""

    def __init__(self, labels: BoundedLabels) -> None:
        self._labels = labels
        self.view: EngineView | None = None

    def collect(self) -> Iterator[Metric]:
        if self.view is None:
            return
        yield from _engine_families(self.view)
        yield from _job_families(self.view)
        if self.view.stats is not None:
            yield from _step_families(self.view.model_name, self.view.stats)
            yield from self._adapter_families(self.view, self.view.stats)
            if self.view.stats.hot_adapter is not None:
                yield from _hot_families(self.view.stats.hot_adapter)

    def _adapter_families(self, view: EngineView, stats: Stats) -> Iterator[Metric]:
        loads: dict[str, int] = defaultdict(int)
        evictions: dict[str, int] = defaultdict(int)
        for digest, adapter in stats.adapters.items():
            name = view.names.get(digest)
            label = OTHER if name is None else self._labels.label(name)
            loads[label] += adapter.loads
            evictions[label] += adapter.evictions
        yield _by_adapter("veneer_adapter_loads", "Copies of an adapter to the device", loads)
        yield _by_adapter("veneer_adapter_evictions", "Evictions of an adapter from the device", evictions)
        yield _lora_requests_info(view, stats.adapters)


def _engine_families(view: EngineView) -> Iterator[Metric]:
    state = GaugeMetricFamily("veneer_engine_state", "1 for the state the engine is in", labels=["state"])
    for name in STATES:
        state.add_metric([name], float(name == view.state))
    yield state
    yield CounterMetricFamily(
        "veneer_engine_restarts", "Starts of the engine after the first", value=view.restarts
    )
    if view.info is not None:
        names = ("model_type", "device", "dtype", "quantization", "kernels")
        info = GaugeMetricFamily("veneer_engine_info", "What the engine serves with", labels=names)
        info.add_metric([getattr(view.info, name) for name in names], 1)
        yield info
        yield GaugeMetricFamily(
            "veneer_engine_notes", "Fallbacks in effect; /health has the text", len(view.info.notes)
        )
        yield GaugeMetricFamily("veneer_base_bytes", "Resident weights of the base", view.info.base_bytes)


def _job_families(view: EngineView) -> Iterator[Metric]:
    jobs = GaugeMetricFamily(
        "veneer_fine_tuning_jobs", "Fine-tuning jobs that are remembered", labels=["status"]
    )
    for status in get_args(Status):
        jobs.add_metric([status], view.jobs.get(status, 0))
    yield jobs
    running = view.training or Progress("")
    for name, text, value in (
        ("step", "Step of the job that is trained, 0 without one", running.step),
        ("steps_total", "Steps that it will have", running.total_steps),
        ("tokens", "Tokens that it has been trained on", running.tokens),
        ("tokens_per_second", "Between its last two reports", running.tokens_per_second or 0.0),
    ):
        yield GaugeMetricFamily(f"veneer_training_{name}", text, value)


def _step_families(model_name: str, stats: Stats) -> Iterator[Metric]:
    gauges = {
        "sequences_running": ("Sequences in the running batch", stats.running),
        "sequences_waiting": ("Sequences in the queue", stats.waiting),
        "kv_pages_used": ("KV pages in use", stats.pages_used),
        "kv_pages_total": ("KV pages there are", stats.pages_total),
        "adapter_device_bytes": ("Adapter weights on the device", stats.device_adapter_bytes),
        "adapter_host_bytes": ("Adapter weights in host memory", stats.host_adapter_bytes),
    }
    counters = {
        "engine_steps": ("Steps run", stats.steps),
        "engine_eager_steps": ("Steps run without a CUDA graph", stats.eager_steps),
        "prefill_tokens": ("Prompt tokens computed", stats.prefill_tokens),
        "decode_tokens": ("Tokens generated", stats.decode_tokens),
        "draft_tokens": ("Tokens drafted by lookup", stats.draft_tokens),
        "accepted_draft_tokens": ("Of these, tokens that were taken", stats.accepted_draft_tokens),
        "prefix_cache_hit_tokens": ("Prompt tokens found in the prefix cache", stats.prefix_hit_tokens),
        "prefix_cache_query_tokens": ("Prompt tokens looked up there", stats.prefix_query_tokens),
        "preemptions": ("Sequences preempted for want of KV pages", stats.preemptions),
    }
    for name, (text, count) in gauges.items():
        yield GaugeMetricFamily(f"veneer_{name}", text, count)
    for name, (text, count) in counters.items():
        yield CounterMetricFamily(f"veneer_{name}", text, count)
    # The names that gateways and dashboards written for vLLM look for.
    used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    for name, text, value in (
        ("vllm:num_requests_running", "Sequences in the running batch", float(stats.running)),
        ("vllm:num_requests_waiting", "Sequences in the queue", float(stats.waiting)),
        ("vllm:kv_cache_usage_perc", "Part of the KV pages in use, 0 to 1", used),
    ):
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([model_name], value)
        yield family
    for name, text, count in (
        ("vllm:spec_decode_num_draft_tokens", "Tokens drafted", stats.draft_tokens),
        ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted", stats.accepted_draft_tokens),
    ):
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        counter.add_metric([model_name], count)
        yield counter


def _hot_families(hot: HotAdapter) -> Iterator[Metric]:
    gauges = {
        "bytes": ("Merged copy of the adapter that dominates, 0 without one", hot.bytes),
        "error": ("Relative error of its weights", hot.error),
        "lost": ("The same over the size of what the adapter changes", hot.lost),
        "tokens_per_second": ("Of busy time, with the copy", hot.tokens_per_second),
        "tokens_per_second_before": ("Of equal rounds without it", hot.tokens_per_second_before),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"veneer_hot_adapter_{name}", text, value or 0)
    yield CounterMetricFamily("veneer_hot_adapter_steps", "Steps run on merged copies", hot.steps)
    yield CounterMetricFamily("veneer_hot_adapter_copies_made", "Merged copies made", hot.made)
    dropped = CounterMetricFamily(
        "veneer_hot_adapter_copies_dropped", "Merged copies dropped or not possible", labels=["reason"]
    )
    for reason, times in sorted(hot.dropped.items()):
        dropped.add_metric([reason], times)
    yield dropped


def _by_adapter(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["adapter"])
    for adapter, value in sorted(values.items()):
        family.add_metric([adapter], value)
    return family


def _lora_requests_info(view: EngineView, adapters: Mapping[str, AdapterStats]) -> Metric:
    """vLLM's gauge: names as labels, the time of the observation as the value.

    Gateways route by it, so the lists are not cut; they are short (adapters with requests right now).
    """
    running, waiting = (
        ",".join(sorted({view.names[d] for d, a in adapters.items() if getattr(a, what) and d in view.names}))
        for what in ("running", "waiting")
    )
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters with running and waiting requests",
        labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
    )
    max_loras = view.info.max_loras if view.info is not None else 0
    family.add_metric([str(max_loras), waiting, running], time.time())
    return family
