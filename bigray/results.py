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


@dataclass(frozen=True)
class Kill:
    """A worker that `verify` ended with SIGKILL, and how its group went on."""

    rank: int
    pid: int
    node: str
    step: int
    """About where the trial was: carried on from its last event."""
    recovery_s: float | None = None
    """From the signal to the moment the driver heard that training goes on; None where the trial was over before."""
    went_on_at_step: int | None = None
    went_on_from: str | None = None
    """memory: a peer's; storage: a checkpoint."""


@dataclass(frozen=True)
class Resize:
    """The stop of a group with a checkpoint, and the start of another that goes on."""

    step: int | None
    """Where the second one went on."""
    workers_before: int
    workers_after: int
    """The same number is a plain restart: no other fits the cluster or the job."""


@dataclass(frozen=True)
class WeightDifference:
    """The weights at the end of two runs."""

    is_bit_equal: bool
    relative: float | None
    """Euclidean norm of the difference of all weights over that of the reference; None where it is not defined: other
    names, shapes or counters, or numbers that are not finite."""
    worst: str | None
    """The tensor with the largest relative difference of its own."""


@dataclass(frozen=True)
class MetricDifference:
    """The validation metrics of two runs, epoch by epoch, as their journals have them."""

    num_epochs: int
    """Epochs that both report."""
    largest: float | None
    """Largest absolute difference of a metric; None where they report different metrics, or none at all."""
    missing: tuple[int, ...]
    """Epochs whose report one of them lacks: it went with a killed worker before it was sent."""


@dataclass(frozen=True)
class SampleCounts:
    """Rows of complete epochs that took part in no step, and times that rows took part again."""

    lost: int
    repeated: int


@dataclass(frozen=True)
class ModelVerification:
    """One model trained twice: undisturbed, and with kills and a resize."""

    model_name: str
    kills: tuple[Kill, ...]
    kills_planned: int
    resize: Resize | None
    """None where the trial was over before its group could be stopped."""
    weights: WeightDifference | None
    """None where one of the two runs has none: see `reasons`."""
    metrics: MetricDifference
    samples: SampleCounts
    """Of the disturbed run."""
    reference_samples: SampleCounts
    verdict: str
    """"identical", "equal within <tolerance>", or "DIFFERENT"."""
    reasons: tuple[str, ...]
    """Why it is different, one line each; empty where it is not."""
    notes: tuple[str, ...] = ()
    """What the verdict does not cover: kills that came too late, a resize that was a restart."""

    @property
    def is_same(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    job: str
    folder: str
    """Holds both runs of every model."""
    exact: bool
    """Whether the job asks for bit-equal weights (`training.exact`)."""
    models: tuple[ModelVerification, ...]
    wall_s: float

    @property
    def is_same(self) -> bool:
        """Whether every model came out as it has to."""
        return all(model.is_same for model in self.models)

    def describe_differences(self) -> str:
        """In one line; empty where there are none."""
        found = [f"{model.model_name}: {'; '.join(model.reasons)}" for model in self.models if not model.is_same]
        return f"{self.job}: DIFFERENT after faults: {'; '.join(found)}" if found else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "folder": self.folder,
            "exact": self.exact,
            "is_same": self.is_same,
            "wall_s": round(self.wall_s, 2),
            "models": [asdict(model) for model in self.models],
        }
