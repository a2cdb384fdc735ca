from __future__ import annotations

import json
from typing import Any

import pytest

from bigray.serve.observe.stats import StatsHistory, quantile_s
from bigray.serve.observe.telemetry import LATENCY_BOUNDS_S, SHADOW_ROUTE, Telemetry


class Replica:
    """A telemetry whose time is set by hand."""

    def __init__(self, live: str = "v1", candidate: str | None = None) -> None:
        self.now = 0.0
        self.telemetry = Telemetry(lambda: self.now)
        self.telemetry.set_versions(
            "animals", live, candidate=candidate, kind="canary" if candidate else None, share=0.1 if candidate else 0.0
        )

    def answer(self, count: int, seconds: float = 0.002, status: int = 200, version: str = "v1", route="predict"):
        for _ in range(count):
            self.telemetry.record("animals", version, route, status, seconds, 1, 10)

    def snapshot(self) -> dict[str, Any]:
        return self.telemetry.snapshot()


def test_the_document_has_each_replica_and_the_total():
    first, second = Replica(), Replica()
    first.answer(3)
    second.answer(5)
    second.answer(1, status=500)
    document = StatsHistory().summary({"b": second.snapshot(), "a": first.snapshot()})

    assert json.loads(json.dumps(document)) == document
    assert [(one["id"], one["live"], one["requests"], one["errors"]) for one in document["replicas"]] == [
        ("a", "v1", 3, 0),
        ("b", "v1", 6, 1),
    ]
    assert set(document["replicas"][0]) >= {"rate", "p50_ms", "p99_ms", "queued", "utilisation", "uptime_s"}
    assert (document["total"]["requests"], document["total"]["errors"], document["total"]["replicas"]) == (9, 1, 2)
    assert set(document["total"]) >= {"rate", "p50_ms", "p99_ms", "queued"}
    assert document["versions"] == {"live": "v1", "previous": None, "candidate": None, "kind": None, "share": 0.0}


def test_an_endpoint_without_replicas_has_a_document_too():
    document = StatsHistory().summary({})

    assert document["replicas"] == []
    assert document["total"]["replicas"] == 0
    assert document["versions"]["live"] is None


def test_a_rate_is_that_of_the_last_seconds():
    replica, history = Replica(), StatsHistory()
    replica.answer(100_000)
    for _ in range(10):
        history.add({"a": replica.snapshot()})
        replica.now += 1
        replica.answer(50)
    document = history.summary({"a": replica.snapshot()})

    assert document["replicas"][0]["rate"] == pytest.approx(50)
    assert document["total"]["rate"] == pytest.approx(50)


def test_the_first_rate_is_what_the_replica_has_measured_itself():
    replica = Replica()
    replica.telemetry.tick(0.0, 0.0, 1)
    replica.answer(30)
    replica.now = 1.0
    replica.telemetry.tick(1.0, 0.0, 1)

    assert StatsHistory().summary({"a": replica.snapshot()})["total"]["rate"] == pytest.approx(30)


def test_a_snapshot_that_is_read_twice_changes_nothing():
    replica, history = Replica(), StatsHistory()
    history.add({"a": replica.snapshot()})
    replica.now += 2
    replica.answer(20)
    first = history.summary({"a": replica.snapshot()})

    assert first["total"]["rate"] == pytest.approx(10)
    assert history.summary({"a": replica.snapshot()}) == first


def test_latencies_are_those_of_late():
    replica, history = Replica(), StatsHistory()
    replica.answer(10_000, seconds=5.0)
    history.add({"a": replica.snapshot()})
    replica.now += 2
    replica.answer(100, seconds=0.002)
    document = history.summary({"a": replica.snapshot()})

    assert 1.6 <= document["total"]["p50_ms"] <= 2.5
    assert document["replicas"][0]["p99_ms"] <= 2.5


def test_an_endpoint_at_rest_shows_the_latencies_it_had():
    replica, history = Replica(), StatsHistory()
    replica.answer(100, seconds=0.002)
    history.add({"a": replica.snapshot()})
    replica.now += 20

    assert 1.6 <= history.summary({"a": replica.snapshot()})["total"]["p50_ms"] <= 2.5


def test_no_answers_have_no_latency():
    assert StatsHistory().summary({"a": Replica().snapshot()})["total"]["p50_ms"] is None


def test_a_replica_that_has_started_again_begins_anew():
    replica, history = Replica(), StatsHistory()
    replica.now = 50
    replica.answer(1000)
    history.add({"a": replica.snapshot()})
    again = Replica()
    again.now = 1
    history.add({"a": again.snapshot()})
    again.now = 3
    again.answer(10)
    document = history.summary({"a": again.snapshot()})

    assert document["total"]["rate"] == pytest.approx(5)
    assert document["total"]["requests"] == 10


def test_replicas_that_have_gone_are_forgotten():
    first, second, history = Replica(), Replica(), StatsHistory()
    history.add({"a": first.snapshot(), "b": second.snapshot()})

    assert [one["id"] for one in history.summary({"b": second.snapshot()})["replicas"]] == ["b"]


def test_while_a_deployment_spreads_the_majority_tells_the_version():
    snapshots = {"a": Replica("v2").snapshot(), "b": Replica("v1").snapshot(), "c": Replica("v2").snapshot()}
    document = StatsHistory("animals").summary(snapshots)

    assert document["versions"]["live"] == "v2"
    assert [one["live"] for one in document["replicas"]] == ["v2", "v1", "v2"]


def test_a_candidate_is_shown_beside_the_live_version():
    replica = Replica(candidate="v2")
    replica.answer(90)
    replica.answer(9, version="v2")
    replica.answer(1, version="v2", status=500)
    replica.answer(5, version="v2", route=SHADOW_ROUTE)
    document = StatsHistory().summary({"a": replica.snapshot()})

    assert document["versions"] == {
        "live": "v1",
        "previous": None,
        "candidate": "v2",
        "kind": "canary",
        "share": 0.1,
    }
    assert [(one["version"], one["role"], one["requests"], one["errors"]) for one in document["by_version"]] == [
        ("v1", "live", 90, 0),
        ("v2", "candidate", 15, 1),
    ]
    assert document["total"]["requests"] == 100


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_quantile_lies_in_the_bucket_of_the_answer_it_names(share):
    latencies = sorted(0.0003 * 1.07**number for number in range(150))
    counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
    for latency in latencies:
        counts[next(number for number, bound in enumerate(LATENCY_BOUNDS_S) if latency <= bound)] += 1
    exact = latencies[round(share * len(latencies)) - 1]

    assert quantile_s(counts, share) == pytest.approx(exact, rel=0.25)


def test_what_took_longer_than_every_bucket_is_told_as_the_last_bound():
    assert quantile_s([0] * len(LATENCY_BOUNDS_S) + [3], 0.5) == LATENCY_BOUNDS_S[-1]
