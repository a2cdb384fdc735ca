from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from bigray.serve.observe.telemetry import (
    BATCH_BOUNDS_ROWS,
    LATENCY_BOUNDS_S,
    MOST_BATCH_SERIES,
    MOST_SERIES,
    SHADOW_ROUTE,
    Telemetry,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def telemetry(clock: Clock) -> Telemetry:
    return Telemetry(clock)


def answer(telemetry: Telemetry, status: int = 200, seconds: float = 0.002, **others: Any) -> None:
    facts = {"model": "animals", "version": "v1", "route": "predict", "rows": 2, "body_bytes": 100, **others}
    telemetry.record(status=status, seconds=seconds, **facts)


def test_a_snapshot_counts_answers_by_status_and_by_latency(telemetry):
    answer(telemetry, seconds=0.0004)
    answer(telemetry, seconds=0.00041)
    answer(telemetry, seconds=99)
    answer(telemetry, status=400, seconds=0.1)
    (series,) = telemetry.snapshot()["requests"]

    assert (series["model"], series["version"], series["route"]) == ("animals", "v1", "predict")
    assert series["statuses"] == {"200": 3, "400": 1}
    assert [number for number, count in enumerate(series["counts"]) if count] == [1, 2, len(LATENCY_BOUNDS_S)]
    assert series["rows"] == 6
    assert series["bytes"] == 400


def test_refusals_do_not_make_a_replica_look_fast(telemetry):
    answer(telemetry, status=503, seconds=0.0001)
    (series,) = telemetry.snapshot()["requests"]

    assert sum(series["counts"]) == 0
    assert series["seconds"] == 0


def test_the_total_is_of_the_traffic_alone(telemetry):
    answer(telemetry)
    answer(telemetry, status=500)
    answer(telemetry, route="infer")
    for route in ("health", "page", "other", SHADOW_ROUTE):
        answer(telemetry, route=route)
    total = telemetry.snapshot()["total"]

    assert (total["requests"], total["errors"], total["rows"]) == (3, 1, 4)
    assert sum(total["counts"]) == 2


def test_batches_are_counted_by_their_rows(telemetry):
    for rows in (1, 2, 3, 5000):
        telemetry.record_batch("animals", "v1", rows, 0.01, 0.5)
    (batches,) = telemetry.snapshot()["batches"]

    assert batches["counts"] == [1, 1, 1, *[0] * (len(BATCH_BOUNDS_ROWS) - 3), 1]
    assert (batches["rows"], batches["seconds"], batches["waited_s"]) == (5006, 0.04, 2.0)


def test_a_snapshot_is_small_json_after_a_hundred_deployments(telemetry):
    for deployment in range(100):
        version = f"{deployment:012x}"
        telemetry.set_versions("animals", version, previous=f"{deployment - 1:012x}")
        for route in ("predict", "infer", "grpc"):
            for seconds in (*LATENCY_BOUNDS_S, 99):
                for _ in range(11):
                    answer(telemetry, version=version, route=route, seconds=seconds)
        telemetry.record_batch("animals", version, 8, 0.25, 0.0)
    snapshot = telemetry.snapshot()

    assert json.loads(json.dumps(snapshot)) == snapshot
    assert len(json.dumps(snapshot)) < 20_000
    assert len(snapshot["requests"]) == MOST_SERIES
    assert len(snapshot["batches"]) == MOST_BATCH_SERIES


def test_what_a_snapshot_no_longer_tells_of_stays_in_the_total(telemetry):
    for deployment in range(100):
        answer(telemetry, version=f"v{deployment}", status=500 if deployment == 0 else 200)
    total = telemetry.snapshot()["total"]

    assert (total["requests"], total["errors"], sum(total["counts"])) == (100, 1, 99)


def test_the_version_that_answers_keeps_its_series(telemetry):
    telemetry.set_versions("animals", "live")
    answer(telemetry, version="live")
    for deployment in range(2 * MOST_SERIES):
        answer(telemetry, version=f"v{deployment}")

    assert "live" in {series["version"] for series in telemetry.snapshot()["requests"]}


def test_models_do_not_push_each_other_out(telemetry):
    for number in range(2 * MOST_SERIES):
        answer(telemetry, model=f"model-{number}")

    assert len(telemetry.snapshot()["requests"]) == 2 * MOST_SERIES


def test_a_retired_version_takes_no_time_back(telemetry, clock):
    telemetry.tick(clock.now, 0.0, 1)
    for deployment in range(3 * MOST_BATCH_SERIES):
        telemetry.record_batch("animals", f"v{deployment}", 1, 0.01, 0.0)
    telemetry.tick(clock.now + 1, 0.0, 1)

    assert telemetry.load(clock.now + 1)["utilisation"] == pytest.approx(0.24)


def test_a_replica_that_nobody_asks_is_idle(telemetry, clock):
    assert telemetry.load(clock.now) == {
        "utilisation": 0.0,
        "offered_per_s": 0.0,
        "shed_per_s": 0.0,
        "queue_age_s": 0.0,
        "queued": 0,
    }


def test_what_a_process_does_while_nobody_asks_is_no_load(telemetry, clock):
    telemetry.tick(clock.now, 5.0, 1)
    telemetry.tick(clock.now + 1, 5.9, 1)

    assert telemetry.load(clock.now + 1)["utilisation"] == 0.0


@pytest.mark.parametrize(
    ("model_s", "cpu_s", "num_cpus", "utilisation"), [(0.6, 0.1, 1, 0.6), (0.1, 0.8, 1, 0.8), (0.1, 0.8, 4, 0.2)]
)
def test_utilisation_is_that_of_what_is_nearest_its_limit(telemetry, clock, model_s, cpu_s, num_cpus, utilisation):
    telemetry.tick(clock.now, 5.0, num_cpus)
    telemetry.ongoing(1)
    telemetry.record_batch("animals", "v1", 1, model_s, 0.0)
    telemetry.tick(clock.now + 1, 5.0 + cpu_s, num_cpus)

    assert telemetry.load(clock.now + 1)["utilisation"] == pytest.approx(utilisation)


def test_a_long_batch_counts_as_work_while_it_runs(telemetry, clock):
    telemetry.tick(clock.now, 0.0, 1)
    telemetry.begin_batch("animals", "v1")
    for _ in range(5):
        clock.now += 0.2
        telemetry.tick(clock.now, 0.0, 1)
    assert telemetry.load(clock.now)["utilisation"] == pytest.approx(1.0)

    telemetry.record_batch("animals", "v1", 1, 1.0, 0.0)
    for _ in range(10):
        clock.now += 0.2
        telemetry.tick(clock.now, 0.0, 1)
    assert telemetry.load(clock.now)["utilisation"] == pytest.approx(0.0)


def test_load_is_that_of_the_last_second(telemetry, clock):
    telemetry.tick(clock.now, 0.0, 1)
    for number in range(10):
        clock.now += 0.2
        for _ in range(4 if number < 5 else 8):
            answer(telemetry)
        telemetry.tick(clock.now, 0.0, 1)

    assert telemetry.load(clock.now)["offered_per_s"] == pytest.approx(40)


def test_requests_that_wait_count_as_offered(telemetry, clock):
    telemetry.tick(clock.now, 0.0, 1)
    for _ in range(30):
        telemetry.ongoing(1)
    for _ in range(10):
        telemetry.ongoing(-1)
        answer(telemetry)
    telemetry.queued(19, 0.7)
    telemetry.tick(clock.now + 1, 0.0, 1)
    load = telemetry.load(clock.now + 1)

    assert load["offered_per_s"] == pytest.approx(30)
    assert load["queued"] == 19
    assert load["queue_age_s"] == pytest.approx(0.7)
    assert telemetry.snapshot()["load"]["ongoing"] == 20


def test_a_wait_between_two_ticks_is_not_missed(telemetry, clock):
    telemetry.tick(clock.now, 0.0, 1)
    telemetry.record_batch("animals", "v1", 1, 0.01, 0.3)
    telemetry.record_batch("animals", "v1", 1, 0.01, 0.1)
    telemetry.tick(clock.now + 0.2, 0.0, 1)
    assert telemetry.load(clock.now + 0.2)["queue_age_s"] == pytest.approx(0.3)

    for number in range(2, 9):
        telemetry.tick(clock.now + 0.2 * number, 0.0, 1)
    assert telemetry.load(clock.now + 1.6)["queue_age_s"] == 0


def test_shed_requests_are_told_apart(telemetry, clock):
    telemetry.tick(clock.now, 0.0, 1)
    for _ in range(5):
        telemetry.shed("animals")
        answer(telemetry, status=503)
    telemetry.refused("401")
    telemetry.tick(clock.now + 1, 0.0, 1)
    snapshot = telemetry.snapshot()

    assert telemetry.load(clock.now + 1)["shed_per_s"] == pytest.approx(5)
    assert telemetry.load(clock.now + 1)["offered_per_s"] == pytest.approx(5)
    assert (snapshot["shed"], snapshot["refused"]) == ({"animals": 5}, {"401": 1})
    assert snapshot["total"]["shed"] == 5


def test_an_event_loop_that_is_stuck_is_full(telemetry, clock):
    telemetry.tick(clock.now, 0.0, 1)
    telemetry.tick(clock.now + 0.2, 0.0, 1)

    assert telemetry.load(clock.now + 1)["utilisation"] == 0
    assert telemetry.load(clock.now + 5)["utilisation"] == 1


def test_a_snapshot_tells_the_versions_and_the_time(telemetry, clock):
    clock.now += 12.5
    telemetry.set_versions("animals", "v2", previous="v1", candidate="v3", kind="canary", share=0.1)
    snapshot = telemetry.snapshot()

    assert snapshot["uptime_s"] == 12.5
    assert snapshot["versions"] == {
        "animals": {"live": "v2", "previous": "v1", "candidate": "v3", "kind": "canary", "share": 0.1}
    }


def test_threads_that_count_and_one_that_reads_lose_nothing(telemetry):
    def on_the_loop() -> None:
        for number in range(5000):
            answer(telemetry, status=200 + number % 7, version=f"v{number // 1000}")

    def in_the_model() -> None:
        for number in range(5000):
            telemetry.record_batch("animals", f"v{number // 1000}", 3, 0.001, 0.0)

    threads = [threading.Thread(target=on_the_loop), threading.Thread(target=in_the_model)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        telemetry.snapshot()
    snapshot = telemetry.snapshot()

    assert snapshot["total"]["requests"] == 5000
    assert sum(batches["rows"] for batches in snapshot["batches"]) == 15_000
