"""What a replica counts while it serves, cheap enough to be counted for every request (replica).

Every number has one writer: what belongs to requests is written on the event loop, what belongs to batches by the one
thread in which that version's model runs. So plain `+=` loses nothing under the interpreter lock, and a reader on a
third thread sees a number that is at most one request old. Only opening and retiring a series takes a lock.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import add
from typing import Any, TypedDict, TypeVar

# fmt: off
LATENCY_BOUNDS_S = (
    0.00025, 0.0004, 0.00063, 0.001, 0.0016, 0.0025, 0.004, 0.0063, 0.01, 0.016, 0.025, 0.04, 0.063,
    0.1, 0.16, 0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0, 6.3, 10.0, 17.0, 30.0,
)
# fmt: on
"""Upper bounds of the latency buckets, five to a factor of ten; one more bucket holds what took longer."""
BATCH_BOUNDS_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)

MODEL_ROUTES = frozenset({"predict", "infer", "grpc", "generate", "explain"})
"""Routes that ask the model; only they count as traffic, and not the health checks or the page."""
SHADOW_ROUTE = "shadow"
"""The route of a mirrored request, whose answer nobody sees: counted for its version, and no traffic."""

MOST_SERIES = 24
"""Requests are counted by model, version and route. Of more of these for one model the oldest go into the total alone,
so that a replica that has seen a hundred deployments still sends a small snapshot."""
MOST_BATCH_SERIES = 8
"""The same of batches, which are counted by model and version."""
WINDOW_S = 1.0
"""The load is that of about so many seconds."""
LATE_TICK_S = 2.0
"""An event loop that has not ticked for so long is stuck in work, whatever was measured before."""

Key = TypeVar("Key", bound=tuple[str, ...])


class Load(TypedDict):
    """How busy a replica has been over the last second; what the autoscaler decides by."""

    utilisation: float
    """1 = the model, or the replica's share of the processors, has no time left."""
    offered_per_s: float
    """Requests that came, the refused ones too."""
    shed_per_s: float
    queue_age_s: float
    """Longest that a request has waited for the model."""
    queued: int


class Telemetry:
    """Counters, histograms and gauges of one replica; `clock` is in seconds and is that of `tick` and `load`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()
        self._series: dict[tuple[str, str, str], _Series] = {}
        self._batches: dict[tuple[str, str], _Batches] = {}
        self._retired = _Totals()
        self._shed: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        self._versions: dict[str, dict[str, Any]] = {}
        self._running: dict[tuple[str, str], float] = {}
        self._ongoing = self._queued = 0
        self._queue_age_s = self._waited_peak_s = 0.0
        self._samples: tuple[_Sample, ...] = ()

    def record(
        self, model: str, version: str, route: str, status: int, seconds: float, rows: int, body_bytes: int
    ) -> None:
        """Count one answer, whatever its status (event loop).

        The model and the version are those that answered, and empty where none did: never words of the caller.
        Only answers below 400 have a latency, since refusals are quick and would make an overloaded replica look fast.
        """
        series = self._series.get((model, version, route))
        if series is None:
            series = self._open_series((model, version, route))
        statuses = series.statuses
        statuses[status] = statuses.get(status, 0) + 1
        series.body_bytes += body_bytes
        if status < 400:
            series.counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
            series.seconds += seconds
            series.rows += rows

    def begin_batch(self, model: str, version: str) -> None:
        """A batch enters the model (its thread). Without it a batch of seconds counts as work only when it ends."""
        self._running[model, version] = self._clock()

    def record_batch(self, model: str, version: str, rows: int, seconds: float, waited_s: float) -> None:
        """Count one batch that the model has answered (its thread); `waited_s` is the age of its oldest request when
        the model took it."""
        self._running.pop((model, version), None)
        batches = self._batches.get((model, version))
        if batches is None:
            batches = self._open_batches((model, version))
        batches.counts[bisect_left(BATCH_BOUNDS_ROWS, rows)] += 1
        batches.rows += rows
        batches.seconds += seconds
        batches.waited_s += waited_s
        # the only number with several writers: at worst the smaller of two peaks stands for a fifth of a second
        if waited_s > self._waited_peak_s:
            self._waited_peak_s = waited_s

    def shed(self, model: str) -> None:
        """A request was refused since the queue was full; its 503 is recorded besides (event loop)."""
        self._shed[model] = self._shed.get(model, 0) + 1

    def refused(self, kind: str) -> None:
        """A request was refused before the model was asked; `kind` is a name of the app's, as `401` (event loop)."""
        self._refused[kind] = self._refused.get(kind, 0) + 1

    def ongoing(self, change: int) -> None:
        """A request for the model came (+1) or was answered (-1) (event loop)."""
        self._ongoing += change

    def queued(self, num_requests: int, oldest_age_s: float) -> None:
        """How many requests wait for a model now, and for how long the oldest has; called before each `tick`."""
        self._queued, self._queue_age_s = num_requests, oldest_age_s

    def set_versions(
        self,
        model: str,
        live: str,
        previous: str | None = None,
        candidate: str | None = None,
        kind: str | None = None,
        share: float = 0.0,
    ) -> None:
        """Which versions of a model this replica holds; `kind` and `share` tell of the candidate's rollout."""
        names = {"live": live, "previous": previous, "candidate": candidate}
        # of one model: a version that was forced in may have another name than the one before
        self._versions = {model: {**names, "kind": kind, "share": share}}

    def tick(self, now: float, cpu_seconds: float, num_cpus: float) -> None:
        """Note how far things are, about five times a second (event loop).

        `cpu_seconds` is what this process has used so far, `num_cpus` what it may use, above 0.
        """
        series, batches, retired = self._held()
        finished = retired.requests + sum(one.num_requests for key, one in series.items() if key[2] in MODEL_ROUTES)
        running = sum(now - since for since in self._running.copy().values())
        sample = _Sample(
            at=now,
            model_s=retired.model_s + sum(one.seconds for one in batches.values()) + running,
            cpu_s=cpu_seconds / num_cpus,
            offered=finished + self._ongoing,
            ongoing=self._ongoing,
            shed=sum(self._shed.values()),
            queue_age_s=max(self._queue_age_s, self._waited_peak_s),
        )
        self._waited_peak_s = 0.0
        self._samples = _within_window((*self._samples, sample))

    def load(self, now: float) -> Load:
        """How busy the replica is (any thread); nothing before two ticks."""
        load = _load_of(self._samples, self._queued)
        if self._samples and now - self._samples[-1].at > LATE_TICK_S:
            load["utilisation"] = max(load["utilisation"], 1.0)
        return load

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON: cumulative counters, histograms (counts of each bucket by itself) and gauges (any thread).

        `total` is of the traffic (`MODEL_ROUTES`) since the start, series that are no longer told of among it.
        """
        series, batches, retired = self._held()
        now = self._clock()
        total = retired.with_series(one for key, one in series.items() if key[2] in MODEL_ROUTES)
        shed = self._shed.copy()
        return {
            "uptime_s": round(now - self._started, 3),
            "versions": self._versions.copy(),
            "requests": [_series_document(key, one) for key, one in series.items()],
            "batches": [_batches_document(key, one) for key, one in batches.items()],
            "shed": shed,
            "refused": self._refused.copy(),
            "load": {**self.load(now), "ongoing": self._ongoing},
            "total": {**total.document(), "shed": sum(shed.values())},
        }

    def _held(self) -> tuple[dict[tuple[str, str, str], _Series], dict[tuple[str, str], _Batches], _Totals]:
        """Copies of the tables, so that one who reads them is not disturbed by one who opens a series."""
        with self._lock:
            return self._series.copy(), self._batches.copy(), self._retired

    def _open_series(self, key: tuple[str, str, str]) -> _Series:
        with self._lock:
            if (oldest := self._to_retire(key, self._series, MOST_SERIES)) is not None:
                gone = self._series.pop(oldest)
                if oldest[2] in MODEL_ROUTES:
                    self._retired = self._retired.with_series([gone])
            return self._series.setdefault(key, _Series())

    def _open_batches(self, key: tuple[str, str]) -> _Batches:
        with self._lock:
            if (oldest := self._to_retire(key, self._batches, MOST_BATCH_SERIES)) is not None:
                self._retired = self._retired.with_batches(self._batches.pop(oldest))
            return self._batches.setdefault(key, _Batches())

    def _to_retire(self, key: Key, table: Iterable[Key], most: int) -> Key | None:
        """The model's oldest series where it has its fill: one of a version that is not held, if there is one."""
        keys = [other for other in table if other[0] == key[0]]
        if len(keys) < most:
            return None
        held = set(self._versions.get(key[0], {}).values())
        return next((other for other in keys if other[1] not in held), keys[0])


@dataclass(slots=True)
class _Series:
    """The answers of one route by one version."""

    statuses: dict[int, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    seconds: float = 0.0
    rows: int = 0
    body_bytes: int = 0

    @property
    def num_requests(self) -> int:
        return sum(self.statuses.copy().values())

    @property
    def num_errors(self) -> int:
        return sum(count for status, count in self.statuses.copy().items() if status >= 500)


@dataclass(slots=True)
class _Batches:
    """The batches that one version has answered."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BATCH_BOUNDS_ROWS) + 1))
    rows: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0


@dataclass(frozen=True)
class _Totals:
    """The traffic since the start; first that of the series which are no longer told of."""

    requests: int = 0
    errors: int = 0
    rows: int = 0
    model_s: float = 0.0
    counts: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS_S) + 1)

    def with_series(self, many: Iterable[_Series]) -> _Totals:
        requests, errors, rows, counts = self.requests, self.errors, self.rows, self.counts
        for one in many:
            requests, errors, rows = requests + one.num_requests, errors + one.num_errors, rows + one.rows
            counts = tuple(map(add, counts, one.counts))
        return _Totals(requests, errors, rows, self.model_s, counts)

    def with_batches(self, batches: _Batches) -> _Totals:
        return replace(self, model_s=self.model_s + batches.seconds)

    def document(self) -> dict[str, Any]:
        return {"requests": self.requests, "errors": self.errors, "rows": self.rows, "counts": list(self.counts)}


@dataclass(frozen=True)
class _Sample:
    """How far a replica was at one tick; all but the age are sums since the start."""

    at: float
    model_s: float
    cpu_s: float
    offered: int
    ongoing: int
    shed: int
    queue_age_s: float


def _within_window(samples: tuple[_Sample, ...]) -> tuple[_Sample, ...]:
    """The last of them, as many as span `WINDOW_S`."""
    latest = samples[-1].at
    first = max((number for number, one in enumerate(samples) if latest - one.at >= WINDOW_S), default=0)
    return samples[first:]


def _load_of(samples: tuple[_Sample, ...], num_queued: int) -> Load:
    first, last = (samples[0], samples[-1]) if samples else (None, None)
    if first is None or last is None or last.at <= first.at:
        return Load(utilisation=0.0, offered_per_s=0.0, shed_per_s=0.0, queue_age_s=0.0, queued=num_queued)
    wall_s = last.at - first.at
    # a process that is asked nothing has no load, whatever it does to come up or to load a candidate
    is_asked = last.offered > first.offered or any(sample.ongoing for sample in samples)
    busy_s = max(last.model_s - first.model_s, last.cpu_s - first.cpu_s if is_asked else 0.0, 0.0)
    return Load(
        utilisation=round(busy_s / wall_s, 4),
        offered_per_s=round(max(last.offered - first.offered, 0) / wall_s, 3),
        shed_per_s=round((last.shed - first.shed) / wall_s, 3),
        queue_age_s=round(max(one.queue_age_s for one in samples[1:]), 4),
        queued=num_queued,
    )


def _series_document(key: tuple[str, str, str], series: _Series) -> dict[str, Any]:
    model, version, route = key
    return {
        "model": model,
        "version": version,
        "route": route,
        "statuses": {str(status): count for status, count in series.statuses.copy().items()},
        "counts": series.counts.copy(),
        "seconds": round(series.seconds, 6),
        "rows": series.rows,
        "bytes": series.body_bytes,
    }


def _batches_document(key: tuple[str, str], batches: _Batches) -> dict[str, Any]:
    model, version = key
    return {
        "model": model,
        "version": version,
        "counts": batches.counts.copy(),
        "rows": batches.rows,
        "seconds": round(batches.seconds, 6),
        "waited_s": round(batches.waited_s, 6),
    }
