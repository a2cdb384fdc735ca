"""Faults on purpose, for `bigray verify`: workers that are killed and a group that is resized (driver).

What is to happen is planned from a seed; when a step has come is read from the trial's own events, which also tell how
long the group took to go on.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import ray

from bigray.results import Kill
from bigray.specs import TrialSpec
from bigray.training.commands import Event
from bigray.training.groups import HOLD_TIMEOUT_S, WorkerGroups
from bigray.training.hangs import kill_process
from bigray.training.membership import Member
from bigray.training.runner import drive_trials
from bigray.training.switchboard import ask

LAST_KILL = 0.9
"""No kill is planned after this part of the steps: the group has to come back before the trial ends."""
RESIZE_BETWEEN = (0.4, 0.6)
LOOK_EVERY_S = 0.02
HEARD_AFTER_S = 1.0
"""A group hears with its next sign of life that it is to stop, and goes on training until then."""
ENDING_S = 5.0
"""A trial that was over when its group was told to stop is told of within this."""
GROUP = 0
"""A run of one trial has one group."""


class GroupHeld(Exception):
    """The group has stopped for a resize; the run is to go on with another number of workers."""


@dataclass(frozen=True)
class PlannedKill:
    """A SIGKILL that is due."""

    step: int
    seat: float
    """Which worker, as a part of their number: 0 is rank 0, and just below 1 the last rank."""


@dataclass(frozen=True)
class FaultPlan:
    """What a trial has to survive. The group is stopped at `resize_step`, and goes on with another size."""

    resize_step: int
    before: tuple[PlannedKill, ...]
    after: tuple[PlannedKill, ...]


def plan_faults(num_steps: int, num_kills: int, seed: str) -> FaultPlan:
    """Random kills, one in each of `num_kills` equal parts of the trial, and a resize after about half of its steps."""
    generator = random.Random(seed)
    span = LAST_KILL * num_steps / max(1, num_kills)
    kills = [
        PlannedKill(int((number + generator.random()) * span), seat=generator.random()) for number in range(num_kills)
    ]
    resize_step = int(num_steps * generator.uniform(*RESIZE_BETWEEN))
    return FaultPlan(
        resize_step=resize_step,
        before=tuple(kill for kill in kills if kill.step < resize_step),
        after=tuple(kill for kill in kills if kill.step >= resize_step),
    )


def other_size(now: int, most: int) -> int:
    """Workers after a resize: half as many, or two in the place of one; `now` where `most` does not allow another."""
    if now > 1:
        return now // 2
    return 2 if most >= 2 else 1


class Watch:
    """Where a trial is, and how its group gets over each kill: from the trial's events.

    Between two events the step is carried on at the pace of an undisturbed run. `note` is called by the thread that
    carries the events, the rest by the one that kills.
    """

    def __init__(self, trial_id: str, steps_per_s: float) -> None:
        self._trial_id, self._steps_per_s = trial_id, steps_per_s
        self._step: int | None = None
        self._known_at, self._is_moving = 0.0, False
        self._kills: list[Kill] = []
        self._struck_at: float | None = None
        """Of the last kill, until the group has gone on."""
        self._has_regrouped = False
        self._went_on_at_step: int | None = None
        self._lock = threading.Lock()

    @property
    def kills(self) -> tuple[Kill, ...]:
        """So far; without a recovery where the group has not gone on."""
        with self._lock:
            return tuple(self._kills)

    @property
    def is_recovering(self) -> bool:
        with self._lock:
            return self._struck_at is not None

    @property
    def went_on_at_step(self) -> int | None:
        """Where the trial first went on from a checkpoint or a peer."""
        with self._lock:
            return self._went_on_at_step

    def step(self, now_s: float) -> int | None:
        """About where the trial is; None before its first event."""
        with self._lock:
            if self._step is None:
                return None
            moved_s = now_s - self._known_at if self._is_moving else 0.0
            return self._step + int(moved_s * self._steps_per_s)

    def strike(self, kill: Kill, now_s: float) -> None:
        """A worker is about to be killed."""
        with self._lock:
            self._kills.append(kill)
            self._struck_at, self._has_regrouped, self._is_moving = now_s, False, False

    def note(self, event: Event, now_s: float) -> None:
        """Take in what happened."""
        with self._lock:
            if event.kind == "regrouped":
                self._has_regrouped = True
            elif event.kind in ("resumed", "epoch", "checkpoint") and event.trial_id == self._trial_id:
                self._note_step(event, event.values["step"], now_s)

    def _note_step(self, event: Event, step: int, now_s: float) -> None:
        is_back = event.kind == "resumed"
        if is_back and self._went_on_at_step is None:
            self._went_on_at_step = step
        if self._struck_at is not None and self._has_regrouped and (is_back or step > self._kills[-1].step):
            recovery_s = now_s - self._struck_at
            source = event.values["from"] if is_back else None
            self._kills[-1] = replace(
                self._kills[-1],
                recovery_s=recovery_s,
                went_on_at_step=step if is_back else None,
                went_on_from=source,
            )
            self._struck_at = None
        if is_back or self._step is None or step > self._step:  # a checkpoint may be told of late
            self._step, self._known_at = step, now_s
            self._is_moving = self._struck_at is None


class Disturbance:
    """Drives one part of a trial's run while its workers are killed; ends it at `hold_step`, if there is one."""

    def __init__(self, trial_id: str, kills: Sequence[PlannedKill], hold_step: int | None, steps_per_s: float) -> None:
        self.watch = Watch(trial_id, steps_per_s)
        self.num_workers = 0
        """Of the group, as it was when it was last looked at."""
        self._trial_id, self._due = trial_id, list(kills)
        self._hold_step, self._steps_per_s = hold_step, steps_per_s

    def note(self, event: Event) -> None:
        """Listens to the run."""
        self.watch.note(event, time.monotonic())

    def drive(self, groups: WorkerGroups, trials: Sequence[TrialSpec]) -> None:
        """Train, and strike when a step has come (main thread of the driver).

        Raises:
            GroupHeld: `hold_step` was reached; the group has stopped.
        """
        here = ray.get_runtime_context().get_node_id()
        pool = ThreadPoolExecutor(1, thread_name_prefix="disturbed")
        try:
            training = pool.submit(drive_trials, groups, trials)
            while not wait([training], LOOK_EVERY_S).done:
                step = None if self.watch.is_recovering else self.watch.step(time.monotonic())
                if step is None:
                    continue
                if self._due and self._due[0].step <= step:
                    self._kill(groups.switchboard, step, here)
                elif self._is_time_to_hold(step):
                    self._hold(groups.switchboard, step, training)
            training.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # held, its thread ends with the switchboard

    def _is_time_to_hold(self, step: int) -> bool:
        """Early enough to stop at about `hold_step`, but after every kill that is to come before."""
        if self._hold_step is None or self._due:
            return False
        return self._hold_step <= step + HEARD_AFTER_S * self._steps_per_s

    def _kill(self, switchboard: Any, step: int, here_node_id: str) -> None:
        members: tuple[Member, ...] = ask(switchboard.members.remote(GROUP))
        if not members:  # between two generations
            return
        self.num_workers = len(members)
        rank = int(self._due.pop(0).seat * len(members))
        member = members[rank]
        values = {"rank": rank, "pid": member.pid, "node": member.node_ip, "step": step}
        ask(switchboard.push.remote(Event("killed", self._trial_id, values)))
        self.watch.strike(Kill(rank, member.pid, member.node_ip, step), time.monotonic())
        kill_process(member, here_node_id)

    def _hold(self, switchboard: Any, step: int, training: Future[list[Event]]) -> None:
        """As SIGTERM does it: the group commits a checkpoint and stops. Returns where the trial was over before."""
        self.num_workers = len(ask(switchboard.members.remote(GROUP))) or self.num_workers
        if not ask(switchboard.hold_all.remote(HOLD_TIMEOUT_S)) and wait([training], ENDING_S).done:
            return
        ask(switchboard.push.remote(Event("held", self._trial_id, {"step": step, "workers": self.num_workers})))
        raise GroupHeld
