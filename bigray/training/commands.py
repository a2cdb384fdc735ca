"""What a worker group is told and what it tells: plain values, sent through the switchboard."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest
from bigray.results import Ledger
from bigray.specs import TrialSpec


@dataclass(frozen=True)
class TrainTo:
    """Train a trial until `epoch` epochs are complete, from wherever its last checkpoint is. Safe to repeat."""

    trial: TrialSpec
    epoch: int
    take_over: TakeOver | None = None
    """Begin from another trial's weights, where this trial has no checkpoint of that epoch or a later one yet."""
    stack: str | None = None
    """The stack that holds the trial's newest state, where it was trained in one and has no later checkpoint."""
    time_a_row: bool = False
    """Tell in the end how long a prediction of one row takes: it may decide between finalists."""
    keep_begin: bool = False
    """Keep the checkpoint it begins from, as one of `keep.last`, until the next command: another trial may take it
    over (population based training)."""


@dataclass(frozen=True)
class TakeOver:
    """What population based training copies: weights and optimizer state of a trial as it stood at an epoch."""

    source: TrialSpec
    epoch: int


@dataclass(frozen=True)
class Lane:
    """One trial of a stack."""

    trial: TrialSpec
    stack: str | None = None
    """The stack that holds its newest state; None: it begins (or has a checkpoint of its own)."""


@dataclass(frozen=True)
class TrainStack:
    """Train trials that differ in numbers only, stacked, until `epoch` epochs are complete. Safe to repeat.

    The result is a `TrialState` for each lane, in order; their state is in `paths.stack(name)`.
    """

    name: str
    lanes: tuple[Lane, ...]
    epoch: int


@dataclass(frozen=True)
class ProbeStack:
    """Time a step of a trial trained alone, by all ranks together, beside one of a stack. The result is a `Probe`."""

    trial: TrialSpec
    num_lanes: int


@dataclass(frozen=True)
class Probe:
    """How a trial is trained fastest here."""

    alone_step_s: float
    """Of one optimizer step of one trial."""
    stacked_step_s: float | None
    """Of one optimizer step of each of `num_lanes` trials, over their number; None where it cannot be stacked."""
    why_not: str | None = None
    """What keeps the trial from being stacked."""

    @property
    def is_stacked(self) -> bool:
        """Whether stacking is faster by more than the noise of a short measurement."""
        return self.stacked_step_s is not None and self.stacked_step_s < 0.9 * self.alone_step_s


@dataclass(frozen=True, eq=False)
class ExportBundle:
    """Write the best weights of a trial as a bundle."""

    trial: TrialSpec
    manifest: BundleManifest
    stack: str | None = None
    """As for `TrainTo`."""
    holdout: bytes | None = field(default=None, repr=False)
    """The sealed rows as they go into the bundle: workers have no others of them."""
    golden_rows: NDArray[np.float32] | None = field(default=None, repr=False)
    """Codes of the rows that become the golden questions."""


@dataclass(frozen=True)
class Stop:
    """Leave the command loop; Ray Train then ends the workers."""


Command = TrainTo | TrainStack | ProbeStack | ExportBundle | Stop


@dataclass(frozen=True)
class Wish:
    """What a group is asked to do at the end of a step, by all its ranks at the same one."""

    save: bool = False
    """Take a checkpoint."""
    stop: bool = False
    """Return from training after that."""
    rest: bool = False
    """Return from training at the end of the epoch."""
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
    num_parameters: int = 0
    micro_batch_size: int | None = None
    """Set where the trial ran out of memory and was split: the rows of a forward pass that it went on with."""
    ledger: Ledger = field(default_factory=Ledger)
    """Of the command that this state ends, not of those before."""

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
    """From workers: resumed, epoch, checkpoint, warning, exploited, latency. From the switchboard: started, lost,
    regrouped, hang, recycled. From who drives them: state, failed, retried, bundle. From a sweep: sweep, proposed,
    promoted, probe, leg, rested, budget, finalists, extended. From training with folds: cross_validated, proposed. From
    `bigray verify`: killed, held. To the listener only: starting, resuming, complete, groups, exporting, ranked."""
    trial_id: str
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_state(cls, trial_id: str, state: TrialState, group: int = 0, waited_s: float = 0.0) -> Event:
        """A trial's state as its group handed it back, after it waited for that: what the leaderboard is made of."""
        return cls("state", trial_id, {**asdict(state), "group": group, "waited_s": round(waited_s, 4)})
