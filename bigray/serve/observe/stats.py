"""The live numbers of an endpoint: the counters of all its replicas, made into rates and latencies (replica).

A replica's snapshots carry its own time, so a rate needs no clock of the reader's, and one that is read twice is seen
to be the same.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add, sub
from typing import Any

from bigray.serve.observe.telemetry import LATENCY_BOUNDS_S, MODEL_ROUTES, SHADOW_ROUTE

Snapshot = Mapping[str, Any]

LATENCY_WINDOW_S = 30.0
RATE_WINDOW_S = (2.0, 8.0)
"""A rate is that of the last seconds: at least so many where there are snapshots for it, and at most."""
LEAST_GAP_S = 0.5
"""Snapshots closer than this are kept as one."""


@dataclass(frozen=True)
class Traffic:
    """What was asked and answered in some time, by a replica or by all."""

    requests: int = 0
    errors: int = 0
    """Answers of 5xx, those of a full queue too."""
    shed: int = 0
    counts: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS_S) + 1)
    """Good answers by `LATENCY_BOUNDS_S`."""

    def __add__(self, other: Traffic) -> Traffic:
        counts = tuple(map(add, self.counts, other.counts))
        return Traffic(self.requests + other.requests, self.errors + other.errors, self.shed + other.shed, counts)

    def __sub__(self, other: Traffic) -> Traffic:
        counts = tuple(map(sub, self.counts, other.counts))
        return Traffic(self.requests - other.requests, self.errors - other.errors, self.shed - other.shed, counts)


@dataclass(frozen=True)
class Point:
    """How far a replica was at one snapshot."""

    uptime_s: float
    total: Traffic
    versions: Mapping[str, Traffic]


@dataclass(frozen=True)
class Reading:
    """A replica's last snapshot, and what has happened of late."""

    snapshot: Snapshot
    point: Point
    rate: float
    """Requests a second."""
    recent: Traffic
    recent_versions: Mapping[str, Traffic]


class StatsHistory:
    """Keeps the snapshots of the last seconds; `model` is the one whose versions are told (the first, if not given)."""

    def __init__(self, model: str | None = None) -> None:
        self._model = model
        self._points: dict[str, deque[Point]] = {}

    def add(self, snapshots: Mapping[str, Snapshot]) -> None:
        """Take the latest snapshot of each replica; those that are not among them are forgotten."""
        self._points = {replica: self._points.get(replica, deque()) for replica in snapshots}
        for replica, snapshot in snapshots.items():
            _append(self._points[replica], point_of(snapshot))

    def summary(self, snapshots: Mapping[str, Snapshot]) -> dict[str, Any]:
        """The document of `GET /stats`, these snapshots added."""
        self.add(snapshots)
        readings = {replica: read(snapshot, self._points[replica]) for replica, snapshot in snapshots.items()}
        return summarise(readings, self._model)


def point_of(snapshot: Snapshot) -> Point:
    total = snapshot["total"]
    versions: dict[str, Traffic] = {}
    for series in snapshot["requests"]:
        if series["route"] in MODEL_ROUTES or series["route"] == SHADOW_ROUTE:
            versions[series["version"]] = versions.get(series["version"], Traffic()) + _traffic_of(series)
    traffic = Traffic(total["requests"], total["errors"], total["shed"], tuple(total["counts"]))
    return Point(snapshot["uptime_s"], traffic, versions)


def read(snapshot: Snapshot, earlier: Iterable[Point]) -> Reading:
    """What the snapshot says beside the earlier points of the same replica."""
    point = point_of(snapshot)
    aged = [(point.uptime_s - one.uptime_s, one) for one in earlier if one.uptime_s < point.uptime_s]
    window = next((one for age_s, one in aged if age_s <= LATENCY_WINDOW_S), None)
    recent = point.total - window.total if window else point.total
    versions = {
        version: traffic - window.versions.get(version, Traffic()) if window else traffic
        for version, traffic in point.versions.items()
    }
    return Reading(snapshot, point, _rate(snapshot, point, aged), recent, versions)


def summarise(readings: Mapping[str, Reading], model: str | None = None) -> dict[str, Any]:
    """The numbers of each replica, of all together, and of each version that is held."""
    snapshots = [reading.snapshot for reading in readings.values()]
    versions = _versions(snapshots, model)
    return {
        "replicas": [_replica(replica, reading, model) for replica, reading in sorted(readings.items())],
        "total": _total(list(readings.values())),
        "versions": versions,
        "by_version": [
            _version(version, role, list(readings.values()))
            for role in ("live", "candidate", "previous")
            if (version := versions[role])
        ],
    }


def quantile_s(counts: Sequence[int], share: float) -> float | None:
    """The latency below which that share of the answers lies, estimated within its bucket; None of no answers."""
    total = sum(counts)
    if total == 0:
        return None
    rank = share * total
    sums = list(accumulate(counts))
    number = next(number for number, below in enumerate(sums) if below >= rank and counts[number])
    if number == len(LATENCY_BOUNDS_S):
        return LATENCY_BOUNDS_S[-1]
    high = LATENCY_BOUNDS_S[number]
    low = LATENCY_BOUNDS_S[number - 1] if number else high / 2
    inside = (rank - (sums[number] - counts[number])) / counts[number]
    return float(low * (high / low) ** max(inside, 0.0))


def _append(points: deque[Point], point: Point) -> None:
    if points and point.uptime_s < points[-1].uptime_s:  # the replica has started again under its name
        points.clear()
    if not points or point.uptime_s - points[-1].uptime_s >= LEAST_GAP_S:
        points.append(point)
    while points[-1].uptime_s - points[0].uptime_s > LATENCY_WINDOW_S:
        points.popleft()


def _traffic_of(series: Mapping[str, Any]) -> Traffic:
    statuses = series["statuses"]
    errors = sum(count for status, count in statuses.items() if int(status) >= 500)
    return Traffic(sum(statuses.values()), errors, 0, tuple(series["counts"]))


def _rate(snapshot: Snapshot, point: Point, aged: Sequence[tuple[float, Point]]) -> float:
    """Over the last seconds, or what the replica itself has measured where nobody has asked of late."""
    least_s, most_s = RATE_WINDOW_S
    fitting = [(age_s, one) for age_s, one in aged if age_s <= most_s]
    if not fitting:
        return float(snapshot["load"]["offered_per_s"])
    long_enough = [pair for pair in fitting if pair[0] >= least_s]
    age_s, earlier = long_enough[-1] if long_enough else fitting[0]
    return (point.total.requests - earlier.total.requests) / age_s


def _replica(replica: str, reading: Reading, model: str | None) -> dict[str, Any]:
    snapshot, load = reading.snapshot, reading.snapshot["load"]
    return {
        "id": replica,
        "live": _held(snapshot, model).get("live"),
        **_numbers(reading.point.total, reading.recent, reading.rate),
        "shed": reading.point.total.shed,
        "queued": load["queued"],
        "utilisation": load["utilisation"],
        "uptime_s": snapshot["uptime_s"],
    }


def _total(readings: Sequence[Reading]) -> dict[str, Any]:
    total = sum((reading.point.total for reading in readings), Traffic())
    recent = sum((reading.recent for reading in readings), Traffic())
    return {
        **_numbers(total, recent, sum(reading.rate for reading in readings)),
        "shed": total.shed,
        "queued": sum(reading.snapshot["load"]["queued"] for reading in readings),
        "replicas": len(readings),
    }


def _version(version: str, role: str, readings: Sequence[Reading]) -> dict[str, Any]:
    total = sum((reading.point.versions.get(version, Traffic()) for reading in readings), Traffic())
    recent = sum((reading.recent_versions.get(version, Traffic()) for reading in readings), Traffic())
    numbers = _numbers(total, recent, 0.0)
    del numbers["rate"]
    return {"version": version, "role": role, **numbers}


def _numbers(total: Traffic, recent: Traffic, rate: float) -> dict[str, Any]:
    """Latencies of late, or since the start where nothing was answered of late."""
    counts = recent.counts if any(recent.counts) else total.counts
    return {
        "requests": total.requests,
        "errors": total.errors,
        "rate": round(rate, 2),
        "p50_ms": _milliseconds(quantile_s(counts, 0.5)),
        "p99_ms": _milliseconds(quantile_s(counts, 0.99)),
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds * 1e3:.4g}")


def _held(snapshot: Snapshot, model: str | None) -> Mapping[str, Any]:
    """The versions that a replica holds of the model, or of its first."""
    versions: Mapping[str, Mapping[str, Any]] = snapshot["versions"]
    return versions.get(model, {}) if model is not None else next(iter(versions.values()), {})


def _versions(snapshots: Sequence[Snapshot], model: str | None) -> dict[str, Any]:
    """What most replicas say: for some seconds of a deployment they differ."""
    said = Counter(tuple(_held(snapshot, model).get(name) for name in _NAMES) for snapshot in snapshots)
    most = said.most_common(1)[0][0] if said else (None,) * len(_NAMES)
    return dict(zip(_NAMES, most, strict=True))


_NAMES = ("live", "previous", "candidate", "kind", "share")
