"""What a trace would do to an endpoint: replicas as queues, scaled by the same `decide` that Serve's controller calls.

A discrete-event model (driver, no Ray). Each replica serves its requests in order, one at a time; a request goes to the
replica with the fewest under way, as HAProxy's leastconn sends it; one that would wait too long is shed. Requests of
one replica do not share batches here, so a real one does a little better under load.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigray.serve.scaling.policy import WINDOW_S, Decision, ReplicaLoad, ScalingMemory, decide
from bigray.serve.scaling.settings import ScalingSettings
from bigray.serve.scaling.trace import Trace

FloatArray = NDArray[np.float64]

MOST_BINS = 600


@dataclass(frozen=True)
class ServiceModel:
    """How fast one replica is."""

    seconds_per_request: float
    """What a request costs whatever its rows: HTTP, and the model's call."""
    seconds_per_row: float = 0.0
    startup_s: float = 3.0
    """From the decision to the first request a new replica takes."""
    max_queue_s: float = 1.0
    """A request that would wait longer is shed."""
    cpus: float = 1.0
    """That a replica holds."""


@dataclass(frozen=True)
class Timeline:
    """The course of a simulation in bins of equal length; all of one length."""

    bin_s: float
    time_s: FloatArray
    """Start of each bin."""
    replicas: FloatArray
    """Ready ones, mean over the bin."""
    target: FloatArray
    """Mean over the bin."""
    requests_per_s: FloatArray
    shed_per_s: FloatArray
    p99_s: FloatArray
    """Latency of the requests that arrived in the bin; NaN where none was answered."""


@dataclass(frozen=True)
class ScaleChange:
    """One decision that changed the count."""

    time_s: float
    before: int
    after: int
    why: str


@dataclass(frozen=True)
class SimulationResult:
    """What the trace met with."""

    trace: str
    service: ServiceModel
    settings: ScalingSettings
    duration_s: float
    requests: int
    shed: int
    latency_s: dict[str, float]
    """`mean`, `p50`, `p95`, `p99` and `max` of the answered requests; NaN where none was."""
    mean_wait_s: float
    peak_replicas: int
    """Most that ran at once."""
    replica_seconds: float
    """From the decision that starts a replica to its last answer."""
    cpu_hours: float
    cost: float | None
    """At the price given for an hour of a replica."""
    changes: tuple[ScaleChange, ...]
    reaction_s: float | None
    """From the first step of the profile to the next replica that could take requests; None where there is neither."""
    timeline: Timeline

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is None."""
        document = {
            key: value for key, value in vars(self).items() if key not in ("service", "settings", "changes", "timeline")
        }
        timeline = {key: _plain(value) for key, value in vars(self.timeline).items()}
        return {
            **{key: _plain(value) for key, value in document.items()},
            "service": asdict(self.service),
            "settings": self.settings.model_dump(),
            "changes": [asdict(change) for change in self.changes],
            "timeline": timeline,
        }


def simulate(
    trace: Trace,
    service: ServiceModel,
    settings: ScalingSettings,
    *,
    metric_delay_s: float = 0.2,
    decision_interval_s: float = 0.1,
    price_per_replica_hour: float | None = None,
) -> SimulationResult:
    """Play a trace against replicas that `decide` scales, from `min_replicas` on.

    Replicas report every `decision_interval_s` what they did in the last second, and the policy sees it
    `metric_delay_s` later.
    """
    fleet = _Fleet(service, settings.min_replicas)
    controller = _Controller(fleet, settings, math.ceil(metric_delay_s / decision_interval_s - 1e-9))
    dispatcher = _Dispatcher(fleet, trace, service)
    clock = _Clock()
    ends = np.arange(1, math.floor(trace.duration_s / decision_interval_s) + 2) * decision_interval_s
    bounds = np.searchsorted(trace.arrivals_s, ends, side="left").tolist()
    for end, bound in zip(ends.tolist(), bounds, strict=True):
        dispatcher.run_to(bound)
        dispatcher.hand_out(fleet.turn(end))
        controller.decide(end, dispatcher.held)
        clock.record(end, len(fleet.ready), controller.target)
    end = float(ends[-1])
    while dispatcher.held:  # a scaled-down endpoint that still has to start for the last requests
        end += decision_interval_s
        dispatcher.hand_out(fleet.turn(end))
        controller.decide(end, dispatcher.held)
    fleet.stop(trace.duration_s)
    return _summed_up(trace, service, settings, fleet, controller, dispatcher, clock, price_per_replica_hour)


@dataclass(eq=False)
class _Replica:
    """A queue with one server. All that is in it was decided on arrival, since nothing overtakes."""

    asked_at: float
    ready_at: float
    stopped_at: float = math.inf
    free_at: float = 0.0
    """When its last request is answered."""
    last_at: float = 0.0
    """When it last got a request."""
    assigned_s: float = 0.0
    """Work it ever got."""
    offered: int = 0
    shed: int = 0
    under_way: deque[tuple[float, float]] = field(default_factory=deque)
    """(answered at, handed over at) of the requests not yet answered, in order."""
    history: deque[tuple[float, float, int, int]] = field(default_factory=deque)
    """(time, seconds busy, offered, shed) so far, at each report of the last window."""

    def __post_init__(self) -> None:
        # it is up, if idle, before it is ready: its first rates are over a whole window as well
        self.history.append((self.ready_at - WINDOW_S, 0.0, 0, 0))

    def report(self, now: float) -> ReplicaLoad:
        """What a replica tells Serve: rates over the last window, the queue as it is."""
        queue, history = self.under_way, self.history
        while queue and queue[0][0] <= now:
            queue.popleft()
        busy_s = self.assigned_s - max(0.0, self.free_at - now)
        history.append((now, busy_s, self.offered, self.shed))
        while history[1][0] <= now - WINDOW_S + 1e-9:
            history.popleft()
        then, busy_then_s, offered_then, shed_then = history[0]
        span = now - then
        return ReplicaLoad(
            (busy_s - busy_then_s) / span,
            (self.offered - offered_then) / span,
            (self.shed - shed_then) / span,
            now - queue[1][1] if len(queue) > 1 else 0.0,
            max(0, len(queue) - 1),
        )


class _Fleet:
    """The replicas: starting, ready, and gone."""

    def __init__(self, service: ServiceModel, num_ready: int) -> None:
        self._startup_s = service.startup_s
        self.ready = [_Replica(0.0, 0.0) for _ in range(num_ready)]
        self.starting: list[_Replica] = []
        self.gone: list[_Replica] = []
        self.became_ready_s: list[float] = []
        self.peak = num_ready

    def turn(self, now: float) -> list[_Replica]:
        """Those that have started become ready."""
        new = [replica for replica in self.starting if replica.ready_at <= now]
        if new:
            self.starting = [replica for replica in self.starting if replica.ready_at > now]
            self.ready += new
            self.became_ready_s += [now] * len(new)
            self.peak = max(self.peak, len(self.ready))
        return self.ready

    def resize(self, target: int, now: float) -> None:
        """Start what is missing; let go first what has not started, then the last that came."""
        missing = target - len(self.ready) - len(self.starting)
        self.starting += [_Replica(now, now + self._startup_s) for _ in range(missing)]
        for _ in range(-missing):
            replica = self.starting.pop() if self.starting else self.ready.pop()
            replica.stopped_at = max(now, replica.free_at)
            self.gone.append(replica)

    def stop(self, now: float) -> None:
        """The trace has ended."""
        for replica in (*self.ready, *self.starting):
            replica.stopped_at = max(now, replica.free_at)
            self.gone.append(replica)

    @property
    def replica_seconds(self) -> float:
        return sum(replica.stopped_at - replica.asked_at for replica in self.gone)


class _Dispatcher:
    """Hands each request to a replica and knows at once when it will be answered."""

    def __init__(self, fleet: _Fleet, trace: Trace, service: ServiceModel) -> None:
        self._fleet = fleet
        self._arrivals: list[float] = trace.arrivals_s.tolist()
        self._services: list[float] = (service.seconds_per_request + service.seconds_per_row * trace.rows).tolist()
        self._max_queue_s = service.max_queue_s
        self._next = 0
        self.held: list[int] = []
        """Requests that wait for the first replica."""
        self.answered = [math.nan] * len(trace)
        """When; NaN where the request was shed."""

    def run_to(self, bound: int) -> None:
        """Hand out all requests before index `bound`."""
        arrivals, services = self._arrivals, self._services
        indices = range(self._next, bound)
        self._next = bound
        replicas = self._fleet.ready
        if not replicas:
            self.held += indices
            return
        send = self._send
        for index in indices:
            now = arrivals[index]
            send(_least_busy(replicas, now), index, services[index], now)

    def hand_out(self, ready: list[_Replica]) -> None:
        """What waited for the first replica goes to it, and to those that came with it."""
        if not ready or not self.held:
            return
        held, self.held = self.held, []
        for index in held:
            replica = min(ready, key=lambda one: len(one.under_way))
            self._send(replica, index, self._services[index], replica.ready_at)

    def _send(self, replica: _Replica, index: int, service_s: float, now: float) -> None:
        replica.offered += 1
        replica.last_at = now
        free_at = replica.free_at
        if free_at < now:
            free_at = now
        elif free_at - now > self._max_queue_s:
            replica.shed += 1
            return
        free_at += service_s
        replica.free_at = self.answered[index] = free_at
        replica.assigned_s += service_s
        replica.under_way.append((free_at, now))


def _least_busy(replicas: list[_Replica], now: float) -> _Replica:
    """The fewest requests under way; of several, the one that has waited longest for its turn."""
    best = replicas[0]
    fewest = 1 << 60
    for replica in replicas:
        queue = replica.under_way
        while queue and queue[0][0] <= now:
            queue.popleft()
        length = len(queue)
        if length < fewest or (length == fewest and replica.last_at < best.last_at):
            best, fewest = replica, length
    return best


class _Controller:
    """Serve's controller: sees reports late, asks the policy, sets the target."""

    def __init__(self, fleet: _Fleet, settings: ScalingSettings, delay_ticks: int) -> None:
        self._fleet = fleet
        self._settings = settings
        self._reports: deque[list[tuple[_Replica, ReplicaLoad]]] = deque(maxlen=delay_ticks + 1)
        self._memory = ScalingMemory()
        self.target = settings.min_replicas
        self.changes: list[ScaleChange] = []

    def decide(self, now: float, held: Sequence[int]) -> None:
        ready = self._fleet.ready
        self._reports.append([(replica, replica.report(now)) for replica in ready])
        decision, self._memory = decide(
            self._loads(ready, held),
            running=len(ready),
            target=self.target,
            settings=self._settings,
            memory=self._memory,
            now=now,
        )
        if decision.replicas != self.target:
            self._change(decision, now)

    def _loads(self, ready: list[_Replica], held: Sequence[int]) -> list[ReplicaLoad]:
        if not ready:
            return [ReplicaLoad(num_queued=len(held))] if held else []
        return [load for replica, load in self._reports[0] if replica.stopped_at == math.inf]

    def _change(self, decision: Decision, now: float) -> None:
        self.changes.append(ScaleChange(round(now, 3), self.target, decision.replicas, decision.why))
        self.target = decision.replicas
        self._fleet.resize(self.target, now)


class _Clock:
    """The counts at each decision."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ready: list[int] = []
        self.target: list[int] = []

    def record(self, now: float, ready: int, target: int) -> None:
        self.times.append(now)
        self.ready.append(ready)
        self.target.append(target)


def _summed_up(
    trace: Trace,
    service: ServiceModel,
    settings: ScalingSettings,
    fleet: _Fleet,
    controller: _Controller,
    dispatcher: _Dispatcher,
    clock: _Clock,
    price: float | None,
) -> SimulationResult:
    latencies = np.array(dispatcher.answered) - trace.arrivals_s
    answered = np.isfinite(latencies)
    waits = latencies[answered] - (service.seconds_per_request + service.seconds_per_row * trace.rows[answered])
    seconds = fleet.replica_seconds
    return SimulationResult(
        trace=trace.name,
        service=service,
        settings=settings,
        duration_s=trace.duration_s,
        requests=len(trace),
        shed=int((~answered).sum()),
        latency_s=_percentiles(latencies[answered]),
        mean_wait_s=float(waits.mean()) if len(waits) else math.nan,
        peak_replicas=fleet.peak,
        replica_seconds=seconds,
        cpu_hours=seconds * service.cpus / 3600,
        cost=None if price is None else price * seconds / 3600,
        changes=tuple(controller.changes),
        reaction_s=_reaction(trace.steps_s, fleet.became_ready_s),
        timeline=_timeline(trace, latencies, clock),
    )


def _percentiles(latencies: FloatArray) -> dict[str, float]:
    if not len(latencies):
        return dict.fromkeys(("mean", "p50", "p95", "p99", "max"), math.nan)
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99)).tolist()
    return {"mean": float(latencies.mean()), "p50": p50, "p95": p95, "p99": p99, "max": float(latencies.max())}


def _reaction(steps_s: Sequence[float], became_ready_s: Iterable[float]) -> float | None:
    if not steps_s:
        return None
    return next((ready - steps_s[0] for ready in became_ready_s if ready > steps_s[0]), None)


def _timeline(trace: Trace, latencies: FloatArray, clock: _Clock) -> Timeline:
    bin_s = float(max(1, math.ceil(trace.duration_s / MOST_BINS)))
    count = max(1, math.ceil(trace.duration_s / bin_s))
    starts: FloatArray = np.arange(count, dtype=np.float64) * bin_s
    of_request = np.minimum((trace.arrivals_s / bin_s).astype(np.int64), count - 1)
    of_tick = np.minimum((np.array(clock.times) / bin_s - 1e-9).astype(np.int64), count - 1)
    ticks = np.maximum(np.bincount(of_tick, minlength=count), 1)
    lengths = np.minimum(bin_s, np.maximum(trace.duration_s - starts, 1e-9))
    shed = np.isnan(latencies)
    return Timeline(
        bin_s=bin_s,
        time_s=starts,
        replicas=np.bincount(of_tick, clock.ready, count) / ticks,
        target=np.bincount(of_tick, clock.target, count) / ticks,
        requests_per_s=np.bincount(of_request, minlength=count) / lengths,
        shed_per_s=np.bincount(of_request[shed], minlength=count) / lengths,
        p99_s=_p99_of_bins(of_request, latencies, count),
    )


def _p99_of_bins(of_request: NDArray[np.int64], latencies: FloatArray, count: int) -> FloatArray:
    edges = np.searchsorted(of_request, np.arange(count + 1))
    values = np.full(count, math.nan)
    for number, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
        part = latencies[start:stop]
        part = part[np.isfinite(part)]
        if len(part):
            values[number] = np.percentile(part, 99)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
