"""How many replicas: from the work that replicas report to a count (pure), and the same inside Serve's controller.

Serve's own policy counts the requests under way, which says little about how much of a replica they use. Here each
replica reports the share of its capacity in use and what it turned away; their sum is the work that arrives, in
replicas' worth. Queues speak too: requests that wait or are shed ask for one more, whatever the utilisation.

Serve pickles this module by value into its controller, so it holds nothing at module level but plain constants.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bigray.serve.scaling.settings import ScalingSettings

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

STATE_KEY = "bigray"
WHY_KEY = "bigray_why"
"""Keys of Serve's policy state: what the policy remembers, and its last decision in a line."""

UTILISATION = "bigray_utilisation"
OFFERED = "bigray_offered_per_s"
SHED = "bigray_shed_per_s"
QUEUE_AGE = "bigray_queue_age_s"
QUEUED = "bigray_queued"
"""What a replica's `record_autoscaling_stats()` returns: rates over the last second, the rest as it is now."""

SATURATED = 0.9
"""Mean utilisation from which callers may be held up by the replicas, so that their rate says nothing of the need."""
LOOSER = 0.8
"""Replicas are let go as if the target utilisation were this much lower: between the two marks the count stays."""
SMOOTHING_S = 1.0
"""Time constant for the work of replicas that keep up; under pressure the newest value counts."""
AVERAGE_S = 5.0
"""Time constant for the work by which replicas are let go, since the peaks of random arrivals are not a need."""
WINDOW_S = 1.0
"""What replicas' rates cover, and so the least time between two raises: the second needs to have seen new numbers."""
SETTLE_S = 2.0
"""After a replica came or went, the reports still show the time before for so long."""
MOST_HIDDEN = 10.0
"""At most so many times the work that is done is believed to arrive."""
NOTHING = 1e-9
"""Less is rounding."""
LESSON_LENGTH = 10.0
"""Times `scale_down_after_s` for which it is remembered that a count was too small for a rate of requests."""


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica reports."""

    utilisation: float = 0.0
    """Share of its capacity in use: CPU time over its CPUs, or model time over wall time, the larger."""
    offered_per_s: float = 0.0
    shed_per_s: float = 0.0
    """Of the offered ones, those turned away for want of room."""
    queue_age_s: float = 0.0
    """How long the oldest request has waited."""
    num_queued: float = 0.0


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be."""

    replicas: int
    why: str
    """One line with the numbers."""


@dataclass(frozen=True)
class Lesson:
    """So many replicas had to be joined by more, under pressure, for so many requests a second."""

    replicas: int
    offered_per_s: float
    until: float


@dataclass(frozen=True)
class ScalingMemory:
    """What one decision hands to the next. Times are those of `now`."""

    at: float | None = None
    """Of the last decision."""
    since: float = 0.0
    """Start of the time without a gap over which `keeps` is the highest need."""
    keeps: tuple[tuple[float, int], ...] = ()
    """(time, replicas to keep), the highest first: those that no later one has topped."""
    queue: tuple[tuple[float, float], ...] = ()
    """(time, requests waiting), the last second and a little more."""
    work: float | None = None
    """Smoothed, in replicas."""
    average: float = 0.0
    """The same over a longer time."""
    offered_per_s: float = 0.0
    """Over the longer time as well."""
    running: int = 0
    settled_at: float = 0.0
    raised_at: float = -math.inf
    offered_at: float = 0.0
    lesson: Lesson | None = None

    def to_plain(self) -> dict[str, Any]:
        """For Serve's policy state: dicts, tuples and numbers, which JSON takes."""
        raised_at = self.raised_at if math.isfinite(self.raised_at) else None
        return {**vars(self), "raised_at": raised_at, "lesson": self.lesson and dict(vars(self.lesson))}

    @classmethod
    def from_plain(cls, document: Any) -> ScalingMemory:
        """What `to_plain` made, also by way of JSON; anything else is an empty memory."""
        try:
            return cls(
                at=document["at"],
                since=document["since"],
                keeps=tuple((at, count) for at, count in document["keeps"]),
                queue=tuple((at, queued) for at, queued in document["queue"]),
                work=document["work"],
                average=document["average"],
                offered_per_s=document["offered_per_s"],
                running=document["running"],
                settled_at=document["settled_at"],
                raised_at=-math.inf if document["raised_at"] is None else document["raised_at"],
                offered_at=document["offered_at"],
                lesson=document["lesson"] and Lesson(**document["lesson"]),
            )
        except (KeyError, TypeError, ValueError):
            return cls()


@dataclass(frozen=True)
class Demand:
    """What the replicas together are asked to do."""

    utilisation: float
    """Mean over the running replicas; one that has not reported counts as idle."""
    offered_per_s: float
    shed_per_s: float
    queue_age_s: float
    num_queued: float
    growth_per_s: float
    """Of the queue; negative while it drains."""
    pressed: bool
    """Requests wait too long or are shed, or the replicas are saturated."""
    draining: bool
    """There is a backlog, and it will soon be gone without more replicas."""
    work: float
    """Arriving, in replicas."""
    backlog: float
    """Replicas that the waiting requests would keep busy for `drain_within_s`."""

    @property
    def is_idle(self) -> bool:
        return self.offered_per_s <= 0 and self.num_queued <= 0

    def __str__(self) -> str:
        return (
            f"{self.offered_per_s:.0f}/s offered, {self.shed_per_s:.0f}/s shed, {self.num_queued:.0f} waiting, "
            f"oldest {self.queue_age_s:.2f} s, utilisation {self.utilisation:.0%}"
        )


def decide(
    loads: Sequence[ReplicaLoad],
    *,
    running: int,
    target: int,
    settings: ScalingSettings,
    memory: ScalingMemory,
    now: float,
) -> tuple[Decision, ScalingMemory]:
    """The count for this load (pure); called every 0.1 s or so with the newest reports.

    `loads` are those of the replicas that have reported, out of `running`; where none runs, one load may tell what
    waits for them. `target` is the count decided last: more than `running` while replicas start.
    """
    memory = _continued(memory, running, now)
    if not loads and (running or target):
        bounded = _bounded(target, settings)
        why = f"no reports from {running} running replicas, count held at {bounded}"
        return Decision(bounded, why), replace(memory, since=now, keeps=(), queue=())
    queue = _queue_history(memory.queue, sum(load.num_queued for load in loads), now)
    demand = _measure(loads, running, _growth(queue), settings)
    memory = replace(
        memory,
        at=now,
        queue=queue,
        work=demand.work if demand.pressed else _smoothed(memory, memory.work, demand.work, SMOOTHING_S, now),
        average=_smoothed(memory, memory.average, demand.work, AVERAGE_S, now),
        offered_per_s=_smoothed(memory, memory.offered_per_s, demand.offered_per_s, AVERAGE_S, now),
        offered_at=memory.offered_at if demand.is_idle else now,
        # what the silent ones do is not known, so nothing is let go
        since=now if len(loads) < running else memory.since,
        lesson=memory.lesson if memory.lesson and memory.lesson.until > now else None,
    )
    floor = 0 if _may_be_none(demand, running, target, settings, memory, now) else 1
    wanted, memory = _wanted(demand, floor, running, target, settings, memory, now)
    return _step(demand, wanted, floor, running, target, settings, memory, now)


def _may_be_none(
    demand: Demand, running: int, target: int, settings: ScalingSettings, memory: ScalingMemory, now: float
) -> bool:
    if settings.min_replicas > 0 or not demand.is_idle:
        return False
    return (running == 0 and target == 0) or now - memory.offered_at >= settings.scale_to_zero_after_s


def _wanted(
    demand: Demand,
    floor: int,
    running: int,
    target: int,
    settings: ScalingSettings,
    memory: ScalingMemory,
    now: float,
) -> tuple[int, ScalingMemory]:
    """What is wanted now, without bounds; the memory gets what must be kept for a while."""
    work, utilisation, lesson = memory.work or 0.0, settings.target_utilisation, memory.lesson
    wanted = max(floor, _replicas_for(work, demand.backlog, utilisation)) + settings.spare
    keep = max(floor, _replicas_for(memory.average, demand.backlog, utilisation * LOOSER)) + settings.spare
    settled = running >= target and now >= memory.settled_at
    if demand.pressed and settled and not demand.draining and running >= wanted:
        wanted = running + 1
    if lesson is not None and memory.offered_per_s >= LOOSER * lesson.offered_per_s:
        keep = max(keep, lesson.replicas + 1)
    return wanted, replace(memory, keeps=_highest(memory.keeps, max(keep, wanted), now, settings.scale_down_after_s))


def _continued(memory: ScalingMemory, running: int, now: float) -> ScalingMemory:
    if memory.at is None or now < memory.at:  # the first decision, or the clock went back
        return ScalingMemory(at=now, since=now, running=running, settled_at=now, offered_at=now)
    if memory.running != running:
        return replace(memory, running=running, settled_at=now + SETTLE_S)
    return memory


def _queue_history(
    history: tuple[tuple[float, float], ...], queued: float, now: float
) -> tuple[tuple[float, float], ...]:
    """The last `WINDOW_S` at a fifth of a second, and one entry before them."""
    if history and now - history[-1][0] < WINDOW_S / 5:
        return history
    while len(history) > 1 and history[1][0] <= now - WINDOW_S:
        history = history[1:]
    return (*history, (now, queued))


def _growth(history: tuple[tuple[float, float], ...]) -> float:
    (first_at, first), (last_at, last) = history[0], history[-1]
    return (last - first) / (last_at - first_at) if last_at - first_at >= WINDOW_S / 2 else 0.0


def _measure(loads: Sequence[ReplicaLoad], running: int, growth_per_s: float, settings: ScalingSettings) -> Demand:
    busy = offered = shed = queued = queue_age_s = arriving = 0.0
    for load in loads:  # one pass: there may be hundreds, ten times a second
        busy += load.utilisation
        offered += load.offered_per_s
        shed += load.shed_per_s
        queued += load.num_queued
        queue_age_s = max(queue_age_s, load.queue_age_s)
        arriving += load.utilisation * _times_more(load.offered_per_s, load.offered_per_s - load.shed_per_s)
    utilisation = busy / max(running, 1)
    pressed = shed > 0 or queue_age_s > settings.max_queue_age_s or utilisation > SATURATED
    accepted = max(0.0, offered - shed)
    backlog = 0.0
    if pressed:  # a queue that grows hides work as shedding does; the noise of a short one is not worth following
        done = accepted - growth_per_s
        arriving *= _times_more(accepted, done)
        backlog = (
            queued * busy / max(done, accepted / MOST_HIDDEN, NOTHING) / settings.drain_within_s if queued else 0.0
        )
    draining = shed <= 0 and growth_per_s < 0 and queued <= -growth_per_s * settings.drain_within_s
    return Demand(
        utilisation, offered, shed, queue_age_s, queued, growth_per_s, pressed, draining, arriving, min(backlog, busy)
    )


def _times_more(all_of: float, part: float) -> float:
    """`all_of / part`, or what is believed of it where next to nothing was done."""
    return 1.0 if all_of <= NOTHING else all_of / max(part, all_of / MOST_HIDDEN)


def _smoothed(memory: ScalingMemory, before: float | None, value: float, constant_s: float, now: float) -> float:
    if memory.work is None or memory.at is None or before is None:
        return value
    return value + (before - value) * math.exp(-(now - memory.at) / constant_s)


def _replicas_for(work: float, backlog: float, utilisation: float) -> int:
    """A backlog may use the replicas up, since it passes."""
    return math.ceil(max(work / utilisation, work + backlog) - NOTHING)


def _highest(
    keeps: tuple[tuple[float, int], ...], keep: int, now: float, window_s: float
) -> tuple[tuple[float, int], ...]:
    """The sliding maximum: whatever a newer and higher need tops is forgotten."""
    return (*((at, count) for at, count in keeps if at > now - window_s and count > keep), (now, keep))


def _step(
    demand: Demand,
    wanted: int,
    floor: int,
    running: int,
    target: int,
    settings: ScalingSettings,
    memory: ScalingMemory,
    now: float,
) -> tuple[Decision, ScalingMemory]:
    """At most one change: up at once, to double at most; down when the need has been lower for long enough."""
    current = _bounded(target, settings)
    up = _bounded(min(wanted, 2 * max(current, 1)), settings)
    kept = memory.keeps[0][1]
    down = _bounded(kept, settings)
    because = (
        f"work of {memory.work:.2f} replicas at {settings.target_utilisation:.0%} each asks for {wanted}; {demand}"
    )
    if up > current and now - memory.raised_at >= WINDOW_S:
        if demand.pressed:
            until = now + LESSON_LENGTH * settings.scale_down_after_s
            memory = replace(memory, lesson=Lesson(current, demand.offered_per_s, until))
        return Decision(up, f"{target} -> {up}: {because}"), replace(memory, raised_at=now)
    if floor == 0 and _bounded(wanted, settings) < current:
        why = f"{target} -> {wanted}: no request for {now - memory.offered_at:.0f} s"
        return Decision(_bounded(wanted, settings), why), replace(memory, since=now, keeps=())
    if down < current and now - memory.since >= settings.scale_down_after_s:
        why = f"{target} -> {down}: no need for more than {kept} in {settings.scale_down_after_s:g} s; {demand}"
        return Decision(down, why), replace(memory, since=now, keeps=())
    state = "held" if current == target else f"within its bounds, was {target}"
    starting = f", {target - running} starting" if target > running else ""
    return Decision(current, f"{current} {state}{starting}: {because}"), memory


def _bounded(replicas: int, settings: ScalingSettings) -> int:
    return max(settings.min_replicas, min(settings.max_replicas, replicas))


class ArrivalPolicy:
    """`decide` as Serve's autoscaling policy: built from `policy_kwargs`, called by the controller every 0.1 s.

    The bounds are those of the deployment's `autoscaling_config`. It never raises, since the controller would stop
    with it; what is wrong holds the count, and is told in the policy state and in the controller's log.
    """

    def __init__(self, **settings: Any) -> None:
        self._fault = ""
        try:
            self._settings = ScalingSettings(**{**settings, "min_replicas": 0, "max_replicas": 1})
        except ValueError as error:
            self._settings = ScalingSettings()
            self._fault = f"policy_kwargs are not valid, count held: {' '.join(str(error).split())}"
        self._told = ""

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The count, and the state that Serve hands back with the next call."""
        try:
            if self._fault:
                return self._held(ctx, self._fault)
            return self._decided(ctx)
        except Exception as error:
            # the memory goes too: the next call must not stumble over the same thing
            return self._held(ctx, f"count held, the policy failed: {type(error).__name__}: {error}")

    def _decided(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        loads, problem = read_loads(ctx)
        target = ctx.target_num_replicas
        decision, memory = decide(
            loads,
            running=ctx.current_num_replicas,
            target=target,
            settings=self._within_bounds(ctx),
            memory=ScalingMemory.from_plain(ctx.policy_state.get(STATE_KEY)),
            now=time.time() if ctx.current_time is None else ctx.current_time,
        )
        if not loads and ctx.current_num_replicas:
            decision = without_reports(decision, ctx)
        why = f"{decision.why}; {problem}" if problem else decision.why
        if decision.replicas != target:
            self._tell(why)
        return decision.replicas, {STATE_KEY: memory.to_plain(), WHY_KEY: why}

    def _within_bounds(self, ctx: AutoscalingContext) -> ScalingSettings:
        low, high = int(ctx.capacity_adjusted_min_replicas), int(ctx.capacity_adjusted_max_replicas)
        if (self._settings.min_replicas, self._settings.max_replicas) != (low, high):
            self._settings = self._settings.model_copy(update={"min_replicas": low, "max_replicas": high})
        return self._settings

    def _held(self, ctx: Any, why: str) -> tuple[int, dict[str, Any]]:
        self._tell(why)
        return getattr(ctx, "target_num_replicas", 1), {WHY_KEY: why}

    def _tell(self, why: str) -> None:
        if why != self._told:
            self._told = why
            logging.getLogger("ray.serve").info("bigray: %s", why)


def read_loads(ctx: AutoscalingContext) -> tuple[list[ReplicaLoad], str]:
    """The newest report of each replica, and one line on the replicas that have not reported a utilisation.

    Where no replica runs it is one load: the requests that wait for the first.
    """
    running = ctx.current_num_replicas
    if not running:
        waiting = _number(ctx.total_num_requests) or 0.0
        return ([ReplicaLoad(num_queued=waiting)] if waiting > 0 else []), ""
    metrics = ctx.raw_metrics or {}
    loads = list(_loads(metrics))
    missing = running - len(loads)
    problem = f"{missing} of {running} replicas have not reported {UTILISATION}" if loads and missing > 0 else ""
    return loads, problem


def _loads(metrics: Mapping[str, Mapping[Any, Any]]) -> Iterator[ReplicaLoad]:
    offered, shed, queue_age, queued = [metrics.get(name) or {} for name in (OFFERED, SHED, QUEUE_AGE, QUEUED)]
    for replica, series in (metrics.get(UTILISATION) or {}).items():
        utilisation = _newest(series)
        if utilisation is not None:
            yield ReplicaLoad(
                utilisation,
                _newest(offered.get(replica)) or 0.0,
                _newest(shed.get(replica)) or 0.0,
                _newest(queue_age.get(replica)) or 0.0,
                _newest(queued.get(replica)) or 0.0,
            )


def _newest(series: Any) -> float | None:
    """The last value of one of Serve's time series, which are lists of (timestamp, value)."""
    return _number(series[-1].value) if series else None


def _number(value: Any) -> float | None:
    """As a finite number from 0 up; None for anything else."""
    if type(value) is float and 0.0 <= value < math.inf:  # the usual case, hundreds of times a call
        return value
    if isinstance(value, (int, float)) and math.isfinite(value):
        return max(0.0, float(value))
    return None


def without_reports(decision: Decision, ctx: AutoscalingContext) -> Decision:
    """Before the first report: Serve's own count of requests under way may raise the count, never lower it."""
    requests = _number(ctx.total_num_requests) or 0.0
    per_replica = ctx.config.get_target_ongoing_requests() if ctx.config is not None else 0
    if per_replica <= 0 or ctx.target_num_replicas > ctx.current_num_replicas:
        return decision
    asked = min(math.ceil(requests / per_replica), 2 * ctx.current_num_replicas, ctx.capacity_adjusted_max_replicas)
    if asked <= decision.replicas:
        return decision
    why = f"{decision.replicas} -> {asked}: no reports yet, and {requests:.0f} requests under way"
    return Decision(asked, f"{why} where {per_replica:g} a replica are the target")
