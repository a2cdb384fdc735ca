"""What a run's events add up to so far: the state behind the live view. Pure; prints nothing.

Each event takes the same time, however many trials there are: a sweep sends thousands of events a second.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bigray.ranking import proposed_trials, settings_of
from bigray.specs import TrialSpec
from bigray.training.commands import Event

OPEN_STATUSES = ("waiting", "running", "paused", "promoted")
"""paused: at a rung, the scheduler may still promote it. promoted: waits for a group to go on."""
PACE_WINDOW_S = 60.0
LEAST_FOR_A_PACE = (5, 3.0)
"""Trials and seconds before which a pace, and the time left by it, says nothing."""


@dataclass
class TrialProgress:
    """One row of the live view."""

    trial: TrialSpec
    epoch: int = 0
    status: str = "waiting"
    train_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    samples_per_s: float | None = None
    epoch_s: float | None = None
    micro_batch_size: int | None = None
    """Set where it ran out of memory and was split."""
    source: str | None = None
    """The trial whose weights it took over last."""
    has_paused: bool = False
    """Whether it has been handed back by a group: its first part is over."""

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.trial)

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the last epoch at the pace of the newest one."""
        if self.epoch_s is None or self.status != "running":
            return None
        return (self.trial.training.epochs - self.epoch) * self.epoch_s


class RunProgress:
    """Updated by each event of a run, in order."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.trials: dict[str, TrialProgress] = {}
        self.running: dict[str, TrialProgress] = {}
        """In the order they were started."""
        self.counts: Counter[str] = Counter()
        """Trials by status."""
        self.happened: Counter[str] = Counter()
        """promoted, exploited, retried, recycled: how often."""
        self.metric = ""
        self.mode = "max"
        self.phase = "starting"
        self.run = ""
        self.budget: str | None = None
        """The budget, once it is used up."""
        self.leader: TrialProgress | None = None
        """The trial with the best value so far, of those that did not fail or diverge."""
        self.started = clock()
        self._clock = clock
        self._planned = 0
        self._num_ended_before = 0
        """In earlier attempts: their trials send nothing any more."""
        self._first_start: float | None = None
        self._handed_back: deque[float] = deque()
        """When trials came back for the first time, within the window of the pace."""
        self._num_handed_back = 0

    def update(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is not None and (not event.trial_id or event.trial_id in self.trials):
            handler(event)

    @property
    def num_trials(self) -> int:
        """In all, with those that a search is still to propose."""
        return max(self._planned, len(self.trials))

    @property
    def num_waiting(self) -> int:
        return max(0, self.counts["waiting"] + self.num_trials - len(self.trials) - self._num_ended_before)

    @property
    def num_ended(self) -> int:
        num_open = sum(self.counts[status] for status in OPEN_STATUSES)
        return len(self.trials) - num_open + self._num_ended_before

    @property
    def trials_per_s(self) -> float | None:
        """Trials whose first part came to its end, over the last minute; None before it says something."""
        if self._first_start is None:
            return None
        now = self._clock()
        self._forget_before(now - PACE_WINDOW_S)
        window_s = min(now - self._first_start, PACE_WINDOW_S)
        least, least_s = LEAST_FOR_A_PACE
        if len(self._handed_back) < least or window_s < least_s:
            return None
        return len(self._handed_back) / window_s

    @property
    def remaining_s(self) -> float | None:
        """Until the trials that are still to begin have had their turn, by the pace of the others."""
        pace, todo = self.trials_per_s, self.num_trials - self._num_ended_before - self._num_handed_back
        return todo / pace if pace and todo > 0 else None

    def best_rows(self, count: int) -> list[TrialProgress]:
        """The best so far, best first."""
        rows = [row for row in self.trials.values() if row.best is not None and _may_win(row)]
        return sorted(rows, key=lambda row: -self._goodness(row))[:count]

    def _goodness(self, row: TrialProgress) -> float:
        value = row.best if row.best is not None and math.isfinite(row.best) else None
        if value is None:
            return -math.inf
        return value if self.mode == "max" else -value

    def _set_status(self, row: TrialProgress, status: str) -> None:
        if row.status == status:
            return
        self.counts[row.status] -= 1
        self.counts[status] += 1
        if row.status == "running":
            self.running.pop(row.trial.trial_id, None)
        if status == "running":
            self.running[row.trial.trial_id] = row
            if self._first_start is None:
                self._first_start = self._clock()
        row.status = status
        if row is self.leader and not _may_win(row):  # at most once for each trial
            self.leader = next(iter(self.best_rows(1)), None)

    def _set_best(self, row: TrialProgress, best: float | None) -> None:
        if best is None or not math.isfinite(best):
            return
        row.best = best
        if _may_win(row) and (self.leader is None or self._goodness(row) > self._goodness(self.leader)):
            self.leader = row

    def _hand_back(self, row: TrialProgress) -> None:
        if row.has_paused:
            return
        row.has_paused = True
        self._num_handed_back += 1
        self._handed_back.append(self._clock())
        self._forget_before(self._handed_back[-1] - PACE_WINDOW_S)

    def _forget_before(self, moment: float) -> None:
        while self._handed_back and self._handed_back[0] < moment:
            self._handed_back.popleft()

    def _add(self, trials: Iterable[TrialSpec]) -> None:
        for trial in trials:
            if trial.trial_id not in self.trials:
                self.trials[trial.trial_id] = TrialProgress(trial)
                self.counts["waiting"] += 1

    def _on_starting(self, event: Event) -> None:
        trials: tuple[TrialSpec, ...] = event.values["trials"]
        self.run = event.values.get("run", "")
        self._planned = event.values.get("total") or 0
        self._add(trials)
        if trials:
            self._learn_metric(trials[0])

    def _on_resuming(self, event: Event) -> None:
        self._on_starting(event)
        self._num_ended_before = event.values.get("ended", 0)

    def _on_proposed(self, event: Event) -> None:
        trials = proposed_trials(event.values)
        self._add(trials)
        if trials and not self.metric:
            self._learn_metric(trials[0])

    def _learn_metric(self, trial: TrialSpec) -> None:
        self.metric, self.mode = trial.training.selection_metric, trial.training.selection_mode

    def _on_groups(self, event: Event) -> None:
        groups, workers = event.values["groups"], event.values["workers"]
        self.phase = f"starting {groups} worker group{'s' if groups > 1 else ''} of {workers}"

    def _on_started(self, event: Event) -> None:
        self._set_status(self.trials[event.trial_id], "running")

    def _on_resumed(self, event: Event) -> None:
        self.trials[event.trial_id].epoch = event.values["epoch"]

    def _on_epoch(self, event: Event) -> None:
        if self.phase.startswith(("starting", "timing")):
            self.phase = "training"
        row, values = self.trials[event.trial_id], event.values
        self._set_status(row, "running")
        row.epoch, row.train_loss = values["epoch"], values["train_loss"]
        row.metrics = values["metrics"]
        row.samples_per_s, row.epoch_s = values["samples_per_s"], values["epoch_s"]
        self._set_best(row, values["best_metrics"].get(self.metric))

    def _on_state(self, event: Event) -> None:
        row = self.trials[event.trial_id]
        row.epoch = event.values["epoch"]
        row.micro_batch_size = event.values.get("micro_batch_size") or row.micro_batch_size
        self._set_status(row, event.values["ended"] or "paused")
        self._set_best(row, event.values["best_metrics"].get(self.metric))
        self._hand_back(row)

    def _on_promoted(self, event: Event) -> None:
        self.happened["promoted"] += 1
        self._set_status(self.trials[event.trial_id], "promoted")

    def _on_halted(self, event: Event) -> None:
        self._set_status(self.trials[event.trial_id], "halted")

    def _on_failed(self, event: Event) -> None:
        row = self.trials[event.trial_id]
        self._set_status(row, "failed")
        self._hand_back(row)

    def _on_exploited(self, event: Event) -> None:
        self.happened["exploited"] += 1
        self.trials[event.trial_id].source = event.values["source"]

    def _on_retried(self, event: Event) -> None:
        self.happened["retried"] += 1
        row = self.trials[event.trial_id]
        row.micro_batch_size = event.values["micro_batch_size"]
        self._set_status(row, "running")

    def _on_recycled(self, event: Event) -> None:
        self.happened["recycled"] += 1

    def _on_probe(self, event: Event) -> None:
        if self.phase.startswith("starting"):
            self.phase = "timing stacked training"

    def _on_budget(self, event: Event) -> None:
        self.budget = str(event.values.get("text", ""))
        self.phase = "budget used up, ending"

    def _on_finalists(self, event: Event) -> None:
        self.phase = f"training {len(event.values['trials'])} finalists again"

    def _on_exporting(self, event: Event) -> None:
        self.phase = f"exporting {event.trial_id}"
        if self.budget is not None:  # with a larger one they go on
            return
        for row in self.trials.values():
            if row.status in ("paused", "promoted"):
                self._set_status(row, "halted")


def _may_win(row: TrialProgress) -> bool:
    return row.status not in ("failed", "diverged")
