"""What a worker group is told and what it tells: plain values, sent through the switchboard."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from bigray.bundle import BundleManifest
from bigray.specs import TrialSpec


@dataclass(frozen=True)
class TrainTo:
    """Train a trial until `epoch` epochs are complete, from wherever its last checkpoint is. Safe to repeat."""

    trial: TrialSpec
    epoch: int


@dataclass(frozen=True)
class ExportBundle:
    """Write the best weights of a trial as a bundle."""

    trial: TrialSpec
    manifest: BundleManifest


@dataclass(frozen=True)
class Stop:
    """Leave the command loop; Ray Train then ends the workers."""


Command = TrainTo | ExportBundle | Stop


@dataclass(frozen=True)
class Wish:
    """What a group is asked to do at the end of a step, by all its ranks at the same one."""

    save: bool = False
    """Take a checkpoint."""
    stop: bool = False
    """Return from training after that."""
    leave: bool = False
    """The generation is broken: give up its process group at once, whatever the training thread waits for."""


@dataclass(frozen=True)
class TrialState:
    """Where a trial stands when its group hands it back."""

    epoch: int
    step: int
    ended: str | None
    """None while it could go on; else "finished", "stopped early" or "diverged"."""
    metrics: dict[str, float]
    """Of the last validated epoch."""
    best_epoch: int
    best_step: int
    best_metrics: dict[str, float]
    """Of the best epoch so far by the trial's selection metric; empty when none was validated."""
    samples_lost: int = 0
    """Training rows that took part in no step of their epoch, over the complete epochs; 0, or something is wrong."""
    samples_repeated: int = 0
    """Times a row took part again in an epoch."""
    rollbacks: int = 0
    """Times the trial went back because of a NaN or an infinity."""
    improvements: tuple[tuple[int, float], ...] = ()
    """Each epoch that was the best so far, with its value of the selection metric, in order."""

    def best_value_at(self, epoch: int) -> float:
        """The best value up to an epoch; NaN before the first validation.

        A trial that goes on from a checkpoint tells a scheduler at each rung what it told the first time.
        """
        values = [value for number, value in self.improvements if number <= epoch]
        return values[-1] if values else math.nan


@dataclass(frozen=True)
class Event:
    """Something that happened, on its way to the journal and the screen."""

    kind: str
    """From workers: resumed, epoch, checkpoint, warning. From the switchboard: lost, regrouped, hang. From who drives
    them: started, state, failed, bundle. From `bigray verify`: killed, held. To the listener only: starting, resuming,
    complete, groups, exporting, ranked."""
    trial_id: str
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_state(cls, trial_id: str, state: TrialState) -> Event:
        """A trial's state as its group handed it back: what the leaderboard is made of."""
        return cls("state", trial_id, asdict(state))
