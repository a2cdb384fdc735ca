from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from bigray.bundle import ModelBundle
from bigray.data.features import Column
from bigray.errors import StorageError
from bigray.serve.sample import write_sample_bundle
from bigray.serve.scaling.measure import HTTP_SECONDS_PER_REQUEST, measure_service, service_model
from bigray.serve.scaling.settings import ScalingSettings
from bigray.serve.scaling.simulation import ServiceModel, simulate
from bigray.serve.scaling.tables import simulation_chart, simulation_table
from bigray.serve.scaling.trace import RateProfile, Trace, load_trace, poisson_trace


def poisson(rate_per_s: float, duration_s: float, seed: int = 0) -> Trace:
    profile = RateProfile(np.array([0.0]), np.array([rate_per_s]), duration_s)
    return poisson_trace("steady", profile, np.random.default_rng(seed))


def requests(*arrivals_s: float, duration_s: float | None = None, rows: int = 1) -> Trace:
    times = np.array(arrivals_s, float)
    return Trace("listed", times, np.full(len(times), rows), duration_s or float(times[-1]))


def fixed(replicas: int) -> ScalingSettings:
    return ScalingSettings(min_replicas=replicas, max_replicas=replicas)


def test_one_replica_waits_as_queueing_theory_says():
    """M/D/1: mean wait = utilisation x service time / (2 (1 - utilisation))."""
    service = ServiceModel(0.01, max_queue_s=1000)
    for utilisation, rate in ((0.5, 50), (0.8, 80)):
        result = simulate(poisson(rate, 1500, seed=1), service, fixed(1))
        assert result.mean_wait_s == pytest.approx(utilisation * 0.01 / (2 * (1 - utilisation)), rel=0.1)
        assert result.shed == 0


def test_requests_that_come_alone_take_their_service_time():
    result = simulate(requests(0, 1, 2, rows=10), ServiceModel(0.1, 0.02), fixed(1))
    assert result.latency_s == pytest.approx(dict.fromkeys(("mean", "p50", "p95", "p99", "max"), 0.3))


def test_two_replicas_share_what_comes_together():
    one, two = (simulate(requests(0, 0, 0, 0), ServiceModel(0.1), fixed(count)) for count in (1, 2))
    assert one.latency_s["max"] == pytest.approx(0.4)
    assert two.latency_s["max"] == pytest.approx(0.2)


def test_a_request_that_would_wait_too_long_is_shed():
    result = simulate(requests(*[0.0] * 10), ServiceModel(0.1, max_queue_s=0.45), fixed(1))
    assert result.shed == 5
    assert result.latency_s["max"] == pytest.approx(0.5)
    assert result.timeline.shed_per_s.sum() * result.timeline.bin_s > 0


def test_a_step_brings_replicas_and_a_quiet_time_takes_them():
    result = simulate(load_trace("step"), ServiceModel(0.01), ScalingSettings(max_replicas=10))
    assert 3 <= result.peak_replicas <= 5
    assert [change.after > change.before for change in result.changes] == sorted(
        (change.after > change.before for change in result.changes), reverse=True
    )
    assert result.changes[-1].after == 1
    assert result.reaction_s is not None
    assert 3 < result.reaction_s < 6  # of which a replica takes 3 to start
    assert result.shed < 0.02 * result.requests
    assert result.latency_s["p50"] == pytest.approx(0.01)


def test_a_replica_that_starts_sooner_reacts_sooner():
    slow, quick = (
        simulate(load_trace("step"), ServiceModel(0.01, startup_s=startup_s), ScalingSettings(max_replicas=10))
        for startup_s in (10, 1)
    )
    assert slow.reaction_s == pytest.approx(quick.reaction_s + 9, abs=0.3)
    assert quick.shed < slow.shed


def test_old_reports_react_late():
    trace, service, settings = load_trace("step"), ServiceModel(0.01), ScalingSettings(max_replicas=10)
    fresh, stale = (simulate(trace, service, settings, metric_delay_s=delay) for delay in (0.1, 5))
    assert stale.reaction_s > fresh.reaction_s + 3


def test_bursts_do_not_leave_the_bounds():
    result = simulate(
        load_trace("bursts", rate_per_s=20), ServiceModel(0.05), ScalingSettings(min_replicas=2, max_replicas=4)
    )
    assert result.peak_replicas <= 4
    assert result.timeline.replicas.min() >= 2


def test_a_spare_replica_sheds_less():
    trace, service = load_trace("bursts", rate_per_s=20), ServiceModel(0.03)
    bare, spare = (simulate(trace, service, ScalingSettings(max_replicas=10, spare=spare)) for spare in (0, 1))
    assert spare.shed < bare.shed
    assert spare.replica_seconds > bare.replica_seconds


def test_a_steady_stream_of_long_and_short_requests_settles():
    arrivals = np.arange(0, 600, 0.05)
    rows = np.where(np.arange(len(arrivals)) % 40 == 0, 300, 1)
    result = simulate(
        Trace("mixed", arrivals, rows, 600.0), ServiceModel(0.001, 0.002), ScalingSettings(max_replicas=6)
    )
    assert len(result.changes) < 10


def test_an_endpoint_at_zero_starts_for_a_request_and_ends_again():
    settings = ScalingSettings(min_replicas=0, max_replicas=2, scale_to_zero_after_s=20)
    result = simulate(requests(10, 10, duration_s=100), ServiceModel(0.1, startup_s=3), settings)
    assert result.latency_s["max"] == pytest.approx(3.2, abs=0.2)  # start, the other, itself
    assert [(change.before, change.after) for change in result.changes] == [(0, 1), (1, 0)]
    assert result.replica_seconds == pytest.approx(3 + 20, abs=1.5)


def test_the_last_requests_are_answered_though_no_replica_runs():
    settings = ScalingSettings(min_replicas=0, max_replicas=1)
    result = simulate(requests(0, 5, duration_s=5), ServiceModel(0.5, startup_s=30), settings)
    assert result.shed == 0
    assert result.latency_s["max"] == pytest.approx(30.6, abs=0.3)


def test_replica_time_and_cost_add_up():
    result = simulate(
        requests(0, 359.9, duration_s=360), ServiceModel(0.01, cpus=2), fixed(3), price_per_replica_hour=0.05
    )
    assert result.replica_seconds == pytest.approx(3 * 360)
    assert result.cpu_hours == pytest.approx(0.6)
    assert result.cost == pytest.approx(0.015)
    assert simulate(requests(0), ServiceModel(0.01), fixed(1)).cost is None


def test_the_timeline_has_the_rates_and_the_replicas():
    result = simulate(load_trace("step"), ServiceModel(0.01), ScalingSettings(max_replicas=10))
    timeline = result.timeline
    lengths = {len(value) for name, value in vars(timeline).items() if name != "bin_s"}
    assert lengths == {300}
    assert timeline.requests_per_s.sum() * timeline.bin_s == pytest.approx(result.requests)
    assert timeline.requests_per_s[70:170].mean() == pytest.approx(200, rel=0.05)
    assert timeline.replicas.max() == result.peak_replicas
    assert (timeline.target[61:66] >= timeline.replicas[61:66]).all()


def test_the_same_trace_gives_the_same_result():
    first, again = (
        simulate(load_trace("step", rate_per_s=20), ServiceModel(0.02), ScalingSettings(max_replicas=4)).to_json()
        for _ in range(2)
    )
    assert first == again


@pytest.mark.parametrize("trace", [requests(0.0), requests(0.0, 0.0, duration_s=0.0), load_trace("step", rate_per_s=1)])
def test_results_are_json_and_tables(trace):
    settings = ScalingSettings(min_replicas=0, max_replicas=2)
    result = simulate(trace, ServiceModel(0.3, max_queue_s=0.1), settings, price_per_replica_hour=1)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["requests"] == len(trace)
    assert document["settings"]["max_replicas"] == 2
    assert document["changes"][0]["why"]
    console = Console(file=io.StringIO(), width=100)
    console.print(simulation_table(result), simulation_chart(result))
    assert max(map(len, console.file.getvalue().splitlines())) <= 100


def test_the_table_and_the_chart_show_what_happened():
    result = simulate(
        load_trace("step"), ServiceModel(0.01), ScalingSettings(max_replicas=10), price_per_replica_hour=1
    )
    console = Console(file=io.StringIO(), width=100)
    console.print(simulation_table(result), simulation_chart(result, width=80))
    shown = console.file.getvalue()
    assert f"{result.requests:,} in 300 s" in shown
    assert "1 to 10 allowed, at most 4 ran" in shown
    assert f"the next replica took requests {result.reaction_s:.1f} s later" in shown
    assert "at the price given for a replica hour" in shown
    assert shown.count("█") > 100
    assert "0 s to 300 s" in shown


def test_a_thousand_requests_a_second_get_the_replicas_they_need():
    result = simulate(poisson(1000, 60), ServiceModel(0.004), ScalingSettings(max_replicas=12))
    assert result.requests > 58_000
    assert result.peak_replicas in range(6, 10)


def test_a_bundle_is_measured(tmp_path):
    location = write_sample_bundle(
        str(tmp_path), columns=(Column(name="image", shape=(64,)),), params={"hidden": [32]}, onnx=False
    )
    service = measure_service(location, threads=1)
    assert HTTP_SECONDS_PER_REQUEST < service.seconds_per_request < 0.1
    assert 0 <= service.seconds_per_row < service.seconds_per_request
    assert service.startup_s > 3
    assert ModelBundle.load(location).manifest.name == "sample"


def test_a_bundle_that_is_none_is_said():
    with pytest.raises(StorageError, match="no bundle here"):
        measure_service("/nowhere/at/all")


def test_the_line_goes_through_both_batch_sizes():
    service = service_model(0.001, 0.001 + 63 * 0.0001, startup_s=3)
    assert service.seconds_per_row == pytest.approx(0.0001)
    assert service.seconds_per_request == pytest.approx(HTTP_SECONDS_PER_REQUEST + 0.0009)
    flat = service_model(0.001, 0.0009, startup_s=3)
    assert (flat.seconds_per_row, flat.seconds_per_request) == (0, pytest.approx(HTTP_SECONDS_PER_REQUEST + 0.001))
