"""What happened, as frozen values. Made on the driver; no Ray, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bigray.storage import Storage

TrialStatus = Literal["finished", "stopped early", "halted", "diverged", "failed"]


@dataclass(frozen=True)
class TrialResult:
    """One trial, with the metrics of its own best epoch."""

    trial_id: str
    model_name: str
    config: dict[str, Any]
    """The settings that tell this trial from the others: learning rate, batch size, and what else was searched."""
    status: TrialStatus
    """"halted": the scheduler ended it at a rung."""
    epochs: int
    """Epochs trained in all."""
    best_epoch: int
    best_step: int
    metrics: dict[str, float]
    """Validation metrics at `best_epoch`; empty for a trial that failed or diverged before it had any."""
    error: str | None = None
    samples_lost: int = 0
    """Rows of complete epochs that took part in no step, as counted where they were loaded."""
    samples_repeated: int = 0
    """Times a row took part again in an epoch."""


@dataclass(frozen=True)
class Leaderboard:
    """All trials of a run, best first, by one metric."""

    run_id: str
    run_uri: str
    """The run's folder."""
    metric: str
    mode: Literal["max", "min"]
    trials: tuple[TrialResult, ...]
    bundle: Storage
    """Where the winner's bundle was written."""
    wall_s: float

    @property
    def winner(self) -> TrialResult:
        """The best trial: the model to deploy is this trial at its `best_step`."""
        return self.trials[0]

    @property
    def samples_lost(self) -> int:
        """Over all trials."""
        return sum(trial.samples_lost for trial in self.trials)

    @property
    def samples_repeated(self) -> int:
        """Over all trials."""
        return sum(trial.samples_repeated for trial in self.trials)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "folder": self.run_uri,
            "bundle": self.bundle.uri,
            "metric": self.metric,
            "mode": self.mode,
            "wall_s": round(self.wall_s, 2),
            "samples_lost": self.samples_lost,
            "samples_repeated": self.samples_repeated,
            "winner": asdict(self.winner),
            "trials": [asdict(trial) for trial in self.trials],
        }


@dataclass(frozen=True)
class HoldoutCheck:
    """The sealed holdout sent to the endpoint over HTTP, beside the same rows predicted offline."""

    num_rows: int
    metrics: dict[str, float]
    """accuracy, or mse and r2, of the HTTP answers."""
    num_equal: int
    """Rows whose HTTP answer equals the offline one: same label, and numbers within 1e-6."""
    largest_difference: float
    """Largest difference of a probability or value between HTTP and offline."""

    @property
    def all_equal(self) -> bool:
        return self.num_equal == self.num_rows
