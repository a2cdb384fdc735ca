"""What is asked for: the job file and the search file as frozen values.

Resolved once, at the edge (`bigray.loading`); everything below reads plain numbers. The serve file is Ray Serve's own
format and is described in `bigray.serve.config`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Task = Literal["classification", "regression"]

METRICS: dict[str, dict[str, Literal["max", "min"]]] = {
    "classification": {"val_accuracy": "max", "val_macro_recall": "max", "val_macro_f1": "max", "val_loss": "min"},
    "regression": {"val_mse": "min", "val_mae": "min", "val_r2": "max", "val_loss": "min"},
}
"""What each task reports after an epoch, and which way is better. The first is the task's default."""


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or ".." in name:
        raise ValueError("use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit, without '..'")
    return name


Name = Annotated[str, AfterValidator(_safe_name)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Spec(BaseModel):
    """Base of every spec: frozen, no unknown keys, no silent conversion of a string to a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SplitSpec(Spec):
    """Shares of the rows kept out of training."""

    validation: Fraction = 0.15
    """Read after every epoch; chooses the winner."""
    holdout: Fraction = 0.15
    """Sealed: read once, for the deployed winner."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives another split of the same rows; independent of the job's seed."""

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> SplitSpec:
        if self.validation + self.holdout >= 1:
            raise ValueError(f"validation + holdout = {self.validation + self.holdout:g} leaves no training rows")
        return self


class DataSpec(Spec):
    """Where the rows are and which column is the target."""

    source: str
    """A Parquet file, folder or glob, a `.csv` or `.npz` file, or `package.module:function`."""
    target: str
    features: Names | None = None
    """Input columns in order; default: every column but the target."""
    split: SplitSpec = SplitSpec()
    normalize: Literal["none", "standard"] = "none"


class ModelSpec(Spec):
    """A callable `(input_shape, num_outputs, **params)` that returns a `torch.nn.Module`."""

    factory: str = Field(pattern=r"^[\w.]+:\w+$")
    params: dict[str, Any] = {}


class TrainingSpec(Spec):
    """How one model is trained."""

    task: Task
    epochs: int = Field(default=10, ge=1)
    global_batch_size: int = Field(default=64, ge=1)
    """Samples of one optimizer step, over all workers."""
    lr: PositiveFloat = 1e-3
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Used by sgd only."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    metric: str | None = None
    """Validation metric that picks the best epoch; default: the first of the task's `METRICS`."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many validated epochs without a better metric; default: train all epochs."""
    val_every: int = Field(default=1, ge=1)
    """Validate after every n-th epoch, and after the last."""
    checkpoint_every_s: PositiveFloat = 30.0
    """Seconds between checkpoints inside a run of epochs; one is always made when training pauses or ends."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; the weights and the optimizer stay in fp32."""

    @model_validator(mode="after")
    def _metric_is_reported(self) -> TrainingSpec:
        if self.metric is not None and self.metric not in METRICS[self.task]:
            raise ValueError(unknown_metric(self.metric, self.task))
        return self

    @property
    def selection_metric(self) -> str:
        return self.metric or next(iter(METRICS[self.task]))

    @property
    def selection_mode(self) -> Literal["max", "min"]:
        return METRICS[self.task][self.selection_metric]


class ScalingSpec(Spec):
    """Workers of one group, and what each holds."""

    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Above 0 the group runs on GPUs over NCCL."""
    max_failures: int = Field(default=3, ge=0)
    """Worker deaths a group survives; after each it goes on from the last checkpoint."""


class JobSpec(Spec):
    """A whole job file: data, one or more models, and how to train them."""

    name: Name
    storage: str = Field(default="runs", min_length=1)
    """A folder, or `s3://bucket/prefix`; each run gets a folder of its own inside."""
    seed: int = Field(default=0, ge=0)
    data: DataSpec
    models: dict[Name, ModelSpec] = Field(min_length=1)
    training: TrainingSpec
    scaling: ScalingSpec = ScalingSpec()

    def fixed_by(self) -> dict[str, Any]:
        """The part that decides the result: all but where it is stored and how many workers share the work."""
        return self.model_dump(mode="json", exclude={"storage", "scaling"})


class RangeSpec(Spec):
    """One dimension of a search space: exactly one of the three."""

    uniform: Annotated[tuple[float, float], Field(strict=False)] | None = None
    log_uniform: Annotated[tuple[float, float], Field(strict=False)] | None = None
    choice: Annotated[tuple[Any, ...], Field(strict=False, min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind_and_not_empty(self) -> RangeSpec:
        given = [kind for kind in ("uniform", "log_uniform", "choice") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of uniform, log_uniform, choice; got {given or 'none'}")
        low, high = self.uniform or self.log_uniform or (0.0, 1.0)
        if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
            raise ValueError(f"empty range, low {low:g} must be less than high {high:g}")
        if self.log_uniform and low <= 0:
            raise ValueError(f"log_uniform needs a low above 0, got {low:g}")
        return self


class AshaSpec(Spec):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934)."""

    grace_epochs: int = Field(default=2, ge=1)
    """No trial is stopped before this epoch."""
    reduction_factor: int = Field(default=3, ge=2)
    """At each rung the best 1/reduction_factor go on; rungs are grace_epochs x reduction_factor^k."""


class SearchSpec(Spec):
    """A search file: the space, the scheduler and the budget."""

    space: dict[str, RangeSpec] = Field(min_length=1)
    """Keys are fields of `TrainingSpec`."""
    search: Literal["random", "grid"] = "random"
    trials: int | None = Field(default=None, ge=1)
    """Trials in all, dealt out evenly to the models; a grid has as many as its product."""
    metric: str | None = None
    """Overrides the job's `training.metric`."""
    scheduler: Literal["asha", "none"] = "asha"
    asha: AshaSpec = AshaSpec()

    @model_validator(mode="after")
    def _space_suits_the_search(self) -> SearchSpec:
        if self.search == "random" and self.trials is None:
            raise ValueError("a random search needs 'trials'")
        if self.search == "grid" and self.trials is not None:
            raise ValueError("a grid runs its whole product: remove 'trials', or use search = \"random\"")
        ranges = [key for key, values in self.space.items() if values.choice is None]
        if self.search == "grid" and ranges:
            raise ValueError(f"a grid needs 'choice' for every key, {ranges} have a range")
        return self


class TrialSpec(Spec):
    """One model with one set of numbers: what a worker group is handed. `train` makes one for each model."""

    trial_id: str
    model_name: str
    model: ModelSpec
    training: TrainingSpec
    seed: int

    @property
    def config_hash(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"trial_id"}))


def digest(document: Any) -> str:
    """Hash of a JSON document, 12 hex digits; equal documents give equal digests in any process."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def unknown_metric(metric: str, task: Task) -> str:
    return f"metric '{metric}' is never reported for {task}; choose one of {', '.join(METRICS[task])}"
