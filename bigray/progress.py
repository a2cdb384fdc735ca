"""What a run's events add up to so far: the state behind the live view. Pure; prints nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from bigray.ranking import settings_of
from bigray.specs import TrialSpec
from bigray.training.commands import Event


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

    def __init__(self) -> None:
        self.trials: dict[str, TrialProgress] = {}
        self.metric = ""
        self.mode = "max"
        self.phase = "starting"
        self.started = time.monotonic()

    def update(self, event: Event) -> None:
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is not None:
            handler(event)

    @property
    def num_ended(self) -> int:
        return sum(row.status not in ("waiting", "running", "paused") for row in self.trials.values())

    @property
    def leader(self) -> TrialProgress | None:
        """The trial with the best value so far."""
        rows = [row for row in self.trials.values() if row.best is not None]
        sign = 1.0 if self.mode == "max" else -1.0
        return max(rows, key=lambda row: sign * (row.best or 0.0), default=None)

    def _on_starting(self, event: Event) -> None:
        trials: tuple[TrialSpec, ...] = event.values["trials"]
        self.trials = {trial.trial_id: TrialProgress(trial) for trial in trials}
        self.metric = trials[0].training.selection_metric
        self.mode = trials[0].training.selection_mode

    _on_resuming = _on_starting

    def _on_groups(self, event: Event) -> None:
        groups, workers = event.values["groups"], event.values["workers"]
        self.phase = f"starting {groups} worker group{'s' if groups > 1 else ''} of {workers}"

    def _on_started(self, event: Event) -> None:
        for row in self.trials.values():  # a group takes a new trial when the scheduler has ended its last one
            if row.status == "paused":
                row.status = "halted"
        self.trials[event.trial_id].status = "running"

    def _on_resumed(self, event: Event) -> None:
        self.trials[event.trial_id].epoch = event.values["epoch"]

    def _on_epoch(self, event: Event) -> None:
        self.phase = "training"
        row, values = self.trials[event.trial_id], event.values
        row.status = "running"
        row.epoch, row.train_loss = values["epoch"], values["train_loss"]
        row.metrics, row.best = values["metrics"], values["best_metrics"].get(self.metric)
        row.samples_per_s, row.epoch_s = values["samples_per_s"], values["epoch_s"]

    def _on_state(self, event: Event) -> None:
        row = self.trials[event.trial_id]
        row.epoch = event.values["epoch"]
        row.best = event.values["best_metrics"].get(self.metric, row.best)
        row.status = event.values["ended"] or "paused"

    def _on_failed(self, event: Event) -> None:
        self.trials[event.trial_id].status = "failed"

    def _on_exporting(self, event: Event) -> None:
        self.phase = f"exporting {event.trial_id}"
        for row in self.trials.values():
            if row.status == "paused":
                row.status = "halted"
