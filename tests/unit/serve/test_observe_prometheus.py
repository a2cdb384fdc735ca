from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bigray.serve.observe.prometheus import CONTENT_TYPE, render_prometheus
from bigray.serve.observe.telemetry import BATCH_BOUNDS_ROWS, LATENCY_BOUNDS_S, Telemetry


def telemetry(model: str = "animals") -> Telemetry:
    now = iter([10.0, 22.5])
    one = Telemetry(lambda: next(now))
    one.set_versions(model, "v1")
    one.record(model, "v1", "predict", 200, 0.002, 4, 100)
    one.record(model, "v1", "predict", 200, 99.0, 1, 100)
    one.record(model, "v1", "predict", 503, 0.0001, 0, 100)
    one.record_batch(model, "v1", 5, 0.25, 0.125)
    one.shed(model)
    one.refused("401")
    one.queued(3, 0.5)
    return one


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What a Prometheus server would read; a sample that comes twice is a fault."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def key(name: str, **labels: Any) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_every_number_is_read_back_with_its_labels():
    found = samples(render_prometheus({"a": telemetry().snapshot()}))
    series = {"replica": "a", "model": "animals", "version": "v1", "route": "predict"}
    batches = {"replica": "a", "model": "animals", "version": "v1"}

    assert found[key("bigray_requests_total", **series, status="200")] == 2
    assert found[key("bigray_requests_total", **series, status="503")] == 1
    assert found[key("bigray_errors_total", **series)] == 1
    assert found[key("bigray_request_rows_total", **series)] == 5
    assert found[key("bigray_request_bytes_total", **series)] == 300
    assert found[key("bigray_model_seconds_total", **batches)] == 0.25
    assert found[key("bigray_batch_wait_seconds_total", **batches)] == 0.125
    assert found[key("bigray_shed_total", replica="a", model="animals")] == 1
    assert found[key("bigray_refused_total", replica="a", kind="401")] == 1
    assert found[key("bigray_queue_requests", replica="a")] == 3
    assert found[key("bigray_live_version_info", **batches)] == 1
    assert found[key("bigray_uptime_seconds", replica="a")] == 12.5
    for name in ("bigray_utilisation", "bigray_queue_oldest_seconds", "bigray_ongoing_requests"):
        assert key(name, replica="a") in found


def test_a_histogram_adds_up_from_bucket_to_bucket():
    found = samples(render_prometheus({"a": telemetry().snapshot()}))
    series = {"replica": "a", "model": "animals", "version": "v1", "route": "predict"}
    buckets = [
        found[key("bigray_request_seconds_bucket", **series, le=bound)]
        for bound in (*(f"{bound:g}" for bound in LATENCY_BOUNDS_S), "+Inf")
    ]

    assert buckets == sorted(buckets)
    assert found[key("bigray_request_seconds_bucket", **series, le="0.0016")] == 0
    assert found[key("bigray_request_seconds_bucket", **series, le="0.0025")] == 1
    assert buckets[-1] == found[key("bigray_request_seconds_count", **series)] == 2
    assert found[key("bigray_request_seconds_sum", **series)] == pytest.approx(99.002)


def test_bucket_bounds_are_told_exactly():
    for bound in (*LATENCY_BOUNDS_S, *BATCH_BOUNDS_ROWS):
        assert float(f"{bound:g}") == bound


def test_replicas_stand_beside_each_other():
    found = samples(render_prometheus({"a": telemetry().snapshot(), "b": telemetry().snapshot()}))

    assert {dict(labels)["replica"] for _, labels in found} == {"a", "b"}


def test_names_with_quotes_and_line_breaks_stay_inside_their_label():
    model = 'a "big"\\\n# TYPE cat'
    found = samples(render_prometheus({"a": telemetry(model).snapshot()}))

    assert found[key("bigray_shed_total", replica="a", model=model)] == 1


def test_a_candidate_is_told_with_its_share():
    one = telemetry()
    one.set_versions("animals", "v1", candidate="v2", kind="canary", share=0.25)
    found = samples(render_prometheus({"a": one.snapshot()}))

    labels = {"replica": "a", "model": "animals", "version": "v2", "kind": "canary"}
    assert found[key("bigray_candidate_share", **labels)] == 0.25


def test_no_replicas_are_an_empty_page():
    assert render_prometheus({}) == b""


def test_a_replica_that_has_answered_nothing_has_gauges():
    found = samples(render_prometheus({"a": Telemetry().snapshot()}))

    assert key("bigray_utilisation", replica="a") in found
    assert not any(name.startswith("bigray_request") for name, _ in found)


def test_the_content_type_names_the_format():
    assert CONTENT_TYPE.startswith(b"text/plain; version=0.0.4")
