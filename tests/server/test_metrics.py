"""Metrics: what is reported comes out, in a text that Prometheus parses, with bounded numbers of series."""

from __future__ import annotations

import time

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from veneer.engine.messages import AdapterStats, EngineInfo, HotAdapter, Stats
from veneer.server.metrics import BASE, OTHER, EngineView, PrometheusMetrics

INFO = EngineInfo(
    model_type="llama",
    device="cpu",
    device_name="CPU",
    dtype="float32",
    quantization="nf4",
    kernels="torch",
    base_bytes=1000,
    vocab_size=10,
    hidden_size=8,
    max_model_len=100,
    eos_token_ids=[0],
    num_pages=50,
    page_size=16,
    max_loras=4,
    max_lora_rank=64,
    adapter_memory=1,
    host_adapter_memory=1,
    notes=["no GPU"],
)


def stats(**adapters: AdapterStats) -> Stats:
    return Stats(
        running=2,
        waiting=3,
        pages_used=10,
        pages_total=40,
        steps=7,
        eager_steps=2,
        prefill_tokens=100,
        decode_tokens=50,
        draft_tokens=8,
        accepted_draft_tokens=5,
        prefix_hit_tokens=30,
        prefix_query_tokens=90,
        preemptions=1,
        adapters=adapters,
        device_adapter_bytes=11,
        host_adapter_bytes=12,
    )


def scrape(metrics: PrometheusMetrics, view: EngineView) -> dict[tuple[str, ...], float]:
    """Samples by (name, label value, …), label values in the order of their label names."""
    text = metrics.render(view).decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


EMPTY = EngineView(model_name="tiny", state="starting")


def test_requests_and_tokens() -> None:
    metrics = PrometheusMetrics()
    metrics.request_started("/v1/completions", None)
    metrics.request_started("/v1/completions", "poet")
    metrics.tokens("poet", 7, 5)
    metrics.tokens(None, 1, 2)
    metrics.first_token("poet", 0.2)
    metrics.inter_token(0.004)
    metrics.request_finished("/v1/completions", "poet", "ok")
    metrics.unknown_field("frobnicate")
    found = scrape(metrics, EMPTY)
    assert found["veneer_requests_total", "ok", "/v1/completions"] == 1
    assert found["veneer_requests_in_progress", "/v1/completions"] == 1
    assert found["veneer_adapter_requests_total", "poet"] == 1
    assert found["veneer_adapter_requests_total", BASE] == 1
    assert found["veneer_tokens_total", "prompt"] == 8
    assert found["veneer_tokens_total", "completion"] == 7
    assert found["veneer_adapter_tokens_total", "poet", "completion"] == 5
    assert found["veneer_time_to_first_token_seconds_bucket", "0.1"] == 0
    assert found["veneer_time_to_first_token_seconds_bucket", "0.25"] == 1
    assert found["veneer_inter_token_latency_seconds_count",] == 1
    assert found["veneer_unknown_request_fields_total", "frobnicate"] == 1


def test_engine_totals_become_counters() -> None:
    view = EngineView(model_name="tiny", state="ready", restarts=2, info=INFO, stats=stats())
    found = scrape(PrometheusMetrics(), view)
    assert found["veneer_engine_state", "ready"] == 1
    assert found["veneer_engine_state", "dead"] == 0
    assert found["veneer_engine_restarts_total",] == 2
    assert found["veneer_engine_notes",] == 1
    assert found["veneer_engine_steps_total",] == 7
    assert found["veneer_prefix_cache_hit_tokens_total",] == 30
    assert found["veneer_preemptions_total",] == 1
    assert found["veneer_kv_pages_used",] == 10
    assert found["vllm:num_requests_running", "tiny"] == 2
    assert found["vllm:num_requests_waiting", "tiny"] == 3
    assert found["vllm:kv_cache_usage_perc", "tiny"] == 0.25


def test_a_merged_copy_is_told_of() -> None:
    hot = HotAdapter(
        state="serving", format="nf4", bytes=9, error=0.1, steps=5, made=3, dropped={"memory": 2}
    )
    view = EngineView(
        model_name="tiny", state="ready", info=INFO, stats=msgspec.structs.replace(stats(), hot_adapter=hot)
    )
    found = scrape(PrometheusMetrics(), view)
    assert found["veneer_hot_adapter_bytes",] == 9
    assert found["veneer_hot_adapter_error",] == 0.1
    assert found["veneer_hot_adapter_tokens_per_second",] == 0
    assert found["veneer_hot_adapter_steps_total",] == 5
    assert found["veneer_hot_adapter_copies_made_total",] == 3
    assert found["veneer_hot_adapter_copies_dropped_total", "memory"] == 2


def test_lora_requests_info_has_vllms_labels() -> None:
    view = EngineView(
        model_name="tiny",
        state="ready",
        info=INFO,
        stats=stats(
            d1=AdapterStats(running=1), d2=AdapterStats(running=2, waiting=1), d3=AdapterStats(device=True)
        ),
        names={"d1": "poet", "d2": "cook", "d3": "idle"},
    )
    before = time.time()
    text = PrometheusMetrics().render(view).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (sample,) = families["vllm:lora_requests_info"].samples
    assert sample.labels == {
        "max_lora": "4",
        "running_lora_adapters": "cook,poet",
        "waiting_lora_adapters": "cook",
    }
    assert before <= sample.value <= time.time()


def test_adapter_series_are_bounded() -> None:
    metrics = PrometheusMetrics(max_adapters=3)
    digests = {f"d{number}": AdapterStats(loads=1, evictions=2) for number in range(10)}
    for number in range(10):
        metrics.request_started("/r", f"adapter-{number}")
        metrics.tokens(f"adapter-{number}", 1, 1)
    names = {f"d{number}": f"adapter-{number}" for number in range(9)}  # d9 was deleted: it has no name
    view = EngineView(model_name="tiny", state="ready", info=INFO, stats=stats(**digests), names=names)
    found = scrape(metrics, view)
    for family in ("veneer_adapter_requests_total", "veneer_adapter_loads_total"):
        labels = {key[1] for key in found if key[0] == family}
        assert labels == {"adapter-0", "adapter-1", "adapter-2", OTHER}
    assert found["veneer_adapter_requests_total", OTHER] == 7
    assert found["veneer_adapter_loads_total", OTHER] == 7
    assert found["veneer_adapter_evictions_total", OTHER] == 14
    assert found["veneer_adapter_tokens_total", OTHER, "prompt"] == 7


def test_unknown_fields_are_bounded_in_number_and_length() -> None:
    metrics = PrometheusMetrics(max_fields=2)
    for name in ("a" * 1000, "b", "c", "d"):
        metrics.unknown_field(name)
    found = scrape(metrics, EMPTY)
    series = {
        key[1]: value for key, value in found.items() if key[0] == "veneer_unknown_request_fields_total"
    }
    assert series == {"a" * 64: 1, "b": 1, OTHER: 2}


@pytest.mark.parametrize("name", ['quote"d', "back\\slash", "new\nline", "ü"])
def test_any_text_can_be_a_label(name: str) -> None:
    metrics = PrometheusMetrics()
    metrics.unknown_field(name)
    assert scrape(metrics, EMPTY)["veneer_unknown_request_fields_total", name] == 1
