"""What happened, as frozen values. Made on the driver; no Ray, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bigray.storage import Storage

TrialStatus = Literal["finished", "stopped early", "halted", "diverged", "failed"]


@dataclass(frozen=True)
class Ledger:
    """Where the time of a trial went, in seconds on rank 0; added up over its commands. In a stack, a lane's share."""

    start_s: float = 0.0
    """Building the model, loading a checkpoint, joining the process group."""
    data_s: float = 0.0
    """Gathering the rows of a batch and putting them on the device."""
    compute_s: float = 0.0
    """Forward, backward and optimizer step, with the averaging of gradients."""
    evaluation_s: float = 0.0
    checkpoint_s: float = 0.0
    """The loop held up by a snapshot, and the wait for the last one to be committed."""
    reporting_s: float = 0.0
    other_s: float = 0.0
    """The rest of the command: what no phase claims."""
    cpu_s: float = 0.0
    """Processor time of all ranks."""
    gpu_s: float = 0.0
    """GPUs held x time."""
    peak_rss_bytes: int = 0
    """Largest resident memory of a rank while it trained."""
    peak_gpu_bytes: int = 0

    def plus(self, other: Ledger) -> Ledger:
        """The sum; of peaks, the larger."""
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        for name in ("peak_rss_bytes", "peak_gpu_bytes"):
            sums[name] = max(getattr(self, name), getattr(other, name))
        return Ledger(**sums)

    @property
    def wall_s(self) -> float:
        """From the command's arrival at the group to its completion."""
        parts = (self.start_s, self.data_s, self.compute_s, self.evaluation_s, self.checkpoint_s, self.reporting_s)
        return sum(parts) + self.other_s


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
    num_parameters: int = 0
    micro_batch_size: int | None = None
    """Set where the trial ran out of memory and went on with smaller forward passes, of this many rows."""
    waiting_s: float = 0.0
    """Between a decision to train the trial (further) and a group that was free for it."""
    ledger: Ledger = field(default_factory=Ledger)
    """Over all commands of the trial."""
    fold: int | None = None
    """The fold of `data.k_folds` that it was validated on, from 0; None: the usual split."""


@dataclass(frozen=True)
class Finalist:
    """One of the best trials, trained again with several seeds, or on each fold of the data."""

    trial_id: str
    values: tuple[float, ...]
    """The metric of each seed's, or fold's, best epoch."""
    mean: float
    low: float
    """Of the 95 % interval of the mean (Student's t)."""
    high: float
    num_parameters: int
    latency_ms: float | None
    """Median time to predict one row; measured only where it decides."""
    is_tied: bool
    """Whether its interval overlaps that of the finalist with the best mean."""
    best_seed_trial: str
    """What is deployed where this finalist wins: the trial of its best seed; with folds, that on the usual split."""
    over: Literal["seeds", "folds"] = "seeds"
    """What `values` are of."""


@dataclass(frozen=True)
class CrossValidation:
    """One model, validated on each fold of the data by what the other folds trained."""

    model_name: str
    values: tuple[float, ...]
    """The metric of each fold's best epoch, in the order of the folds; of those that came to one."""
    num_folds: int
    mean: float
    deviation: float
    """Standard deviation over the folds; NaN of less than two."""
    low: float
    """Of the 95 % interval of the mean (Student's t)."""
    high: float
    num_parameters: int
    """Of its largest trial."""
    final_trial: str
    """Where this model wins: its trial on the usual split, which is the one that is exported."""


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
    finalists: tuple[Finalist, ...] = ()
    """Where the search asks for finalists: the winner first, then by mean."""
    cross_validation: tuple[CrossValidation, ...] = ()
    """Of a training with `data.k_folds`: each model, the best mean first."""
    slots: int = 1
    """Worker groups that trained at once."""
    training_wall_s: float = 0.0
    """From the first trial's start to the last one's end, over all attempts."""
    notes: tuple[str, ...] = ()
    """What was left out of the data, one line each."""

    @property
    def winner(self) -> TrialResult:
        """The model to deploy, at its `best_step`: the best trial, or the trial of the finalist that won, or the last
        trial of the model with the best mean over its folds."""
        if self.cross_validation:
            final = self.cross_validation[0].final_trial
            # there is none where no fold came to a value
            return next((trial for trial in self.trials if trial.trial_id == final), self.trials[0])
        if not self.finalists:
            return self.trials[0]
        return next(trial for trial in self.trials if trial.trial_id == self.finalists[0].best_seed_trial)

    @property
    def efficiency(self) -> float | None:
        """Seconds of forward, backward and optimizer steps over all groups, for each second of each group."""
        if not self.training_wall_s:
            return None
        return sum(trial.ledger.compute_s for trial in self.trials) / (self.training_wall_s * self.slots)

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
            "notes": list(self.notes),
            "winner": asdict(self.winner),
            "cross_validation": [asdict(model) for model in self.cross_validation],
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
