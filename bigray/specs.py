"""What is asked for: the job file and the search file as frozen values.

Resolved once, at the edge (`bigray.loading`); everything below reads plain numbers. The serve file is Ray Serve's own
format and is described in `bigray.serve.config`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from bigray.errors import did_you_mean

BuiltInTask = Literal["classification", "regression", "binary", "multilabel", "language"]
IMPORT_PATH = r"^[\w.]+:\w+$"

METRICS: dict[str, dict[str, Literal["max", "min"]]] = {
    "classification": {
        "val_accuracy": "max",
        "val_macro_recall": "max",
        "val_macro_precision": "max",
        "val_macro_f1": "max",
        "val_loss": "min",
    },
    "regression": {"val_mse": "min", "val_mae": "min", "val_r2": "max", "val_loss": "min"},
    "binary": {
        "val_f1": "max",
        "val_accuracy": "max",
        "val_precision": "max",
        "val_recall": "max",
        "val_roc_auc": "max",
        "val_pr_auc": "max",
        "val_loss": "min",
    },
    "multilabel": {"val_macro_f1": "max", "val_micro_f1": "max", "val_exact_match": "max", "val_loss": "min"},
    "language": {"val_loss": "min", "val_perplexity": "min", "val_token_accuracy": "max"},
}
"""What each task reports after an epoch, and which way is better. The first is the task's default."""

_TORCH_OPTIMIZERS = (
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"),
    "SGD",
)
OPTIMIZERS = {name.lower(): name for name in _TORCH_OPTIMIZERS}
"""Those of `torch.optim` that take a plain step: what a job file writes, in lower case -> name of the class."""


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or ".." in name:
        raise ValueError("use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit, without '..'")
    return name


def _from_anywhere(path: str) -> str:
    """A worker need not run where the command was given."""
    if not path:
        raise ValueError("is empty, give the path of a safetensors file")
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


Name = Annotated[str, AfterValidator(_safe_name)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


def _task_name(task: str) -> str:
    if task not in METRICS and not re.fullmatch(IMPORT_PATH, task):
        raise ValueError(f"use {', '.join(METRICS)}, or 'package.module:Task' for one of your own")
    return task


def _worker_count(value: Any) -> int | tuple[int, int]:
    bounds = (value, value) if _is_int(value) else value
    if not (isinstance(bounds, list | tuple) and len(bounds) == 2 and all(_is_int(bound) for bound in bounds)):
        raise ValueError("use a number from 1, or [least, most]")
    least, most = bounds
    if not 1 <= least <= most:
        raise ValueError("use a number from 1, or [least, most] with 1 <= least <= most")
    return value if _is_int(value) else (least, most)


def _batch_size(value: Any) -> int | Literal["auto"]:
    if value == "auto" or (_is_int(value) and value >= 1):
        return cast("int | Literal['auto']", value)
    raise ValueError("use a number from 1, or 'auto'")


def _class_weights(value: Any) -> Literal["none", "balanced"] | tuple[float, ...]:
    if value in ("none", "balanced"):
        return cast("Literal['none', 'balanced']", value)
    if isinstance(value, list | tuple) and value and all(_is_positive(weight) for weight in value):
        return tuple(float(weight) for weight in value)
    raise ValueError("use 'none', 'balanced', or a list of positive numbers, one for each class")


def _label(value: Any) -> str | int:
    if isinstance(value, str) or _is_int(value):
        return cast("str | int", value)
    raise ValueError("use the class as text or as a whole number")


def _value(value: Any) -> str | float:
    if isinstance(value, str) or (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ):
        return value
    raise ValueError("use text or a finite number")


def _threshold(value: Any) -> Threshold:
    if value == "f1":
        return "f1"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value <= 1:
        return float(value)
    if isinstance(value, dict) and list(value) == ["recall"] and _is_positive(value["recall"]) and value["recall"] <= 1:
        return {"recall": float(value["recall"])}
    raise ValueError("use 'f1', a number from 0 to 1, or { recall = 0.99 }: the highest that finds that share")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _optimizer(name: str) -> str:
    if name.lower() not in OPTIMIZERS:
        raise ValueError(f"not an optimizer{did_you_mean(name.lower(), OPTIMIZERS)}")
    return name.lower()


OptimizerName = Annotated[str, AfterValidator(_optimizer)]
# one validator for a whole union: pydantic's own report has a line for each member, under a name nobody wrote
TaskName = Annotated[str, AfterValidator(_task_name)]
AS_IT_IS = PlainSerializer(lambda value: value)
WorkerCount = Annotated[int | tuple[int, int], PlainValidator(_worker_count), AS_IT_IS]
BatchSize = Annotated[int | Literal["auto"], PlainValidator(_batch_size), AS_IT_IS]
Label = Annotated[str | int, PlainValidator(_label), AS_IT_IS]
Threshold = Literal["f1"] | float | dict[Literal["recall"], float]
ThresholdRule = Annotated[Threshold, PlainValidator(_threshold), AS_IT_IS]
Value = Annotated[str | float, PlainValidator(_value), AS_IT_IS]
ClassWeights = Annotated[Literal["none", "balanced"] | tuple[float, ...], PlainValidator(_class_weights), AS_IT_IS]


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


MissingPolicy = Literal["stop", "drop", "mean", "median", "constant"]
Encoding = Literal["one_hot", "embedding"]
UnknownPolicy = Literal["ignore", "refuse"]
Normalize = Literal["none", "standard", "minmax", "robust"]


class ColumnSpec(Spec):
    """What differs for one input column from the settings of `[data]`, which are the defaults."""

    kind: Literal["number", "category", "date", "image"] | None = None
    """Default: told by the values. Say category for numbers that are names, such as postcodes."""
    missing: MissingPolicy | None = None
    missing_value: Value | None = None
    missing_indicator: bool | None = None
    categories: Encoding | None = None
    unknown_category: UnknownPolicy | None = None


class DataSpec(Spec):
    """Where the rows are, which column is the target, and what is made of the others."""

    source: str | None = None
    """A Parquet file, folder or glob, a `.csv` or `.npz` file, or `package.module:function`."""
    train: str | None = None
    """In place of `source`, where the rows are split already: those to train and validate on."""
    test: str | None = None
    """With `train`: the rows that become the holdout, whatever `split.holdout` says."""
    target: str
    features: Names | None = None
    """Input columns in order; default: every column but the target and the group, or only those of pictures."""
    group: str | None = None
    """A column, such as a patient's number, whose equal values stay on one side of the split. It is no input."""
    split: SplitSpec = SplitSpec()
    k_folds: int | None = Field(default=None, ge=2)
    """Cross-validation: all rows but the holdout are cut into so many folds, and each is validated on by a model that
    the others trained."""
    missing: MissingPolicy = "stop"
    """Of empty cells and NaN. stop: refuse the data. drop: leave those rows out. mean, median (of a category the most
    frequent one), constant: fill them, in training and at the endpoint."""
    missing_value: Value | None = None
    """For constant."""
    missing_indicator: bool = False
    """Beside a filled value, tell the model by a column of 0 and 1 that it was missing."""
    categories: Encoding = "one_hot"
    """embedding: one number for each category, for a model that takes `embeddings`."""
    unknown_category: UnknownPolicy = "ignore"
    """Of a category that no training row has. ignore: it is none of the known ones. refuse: an error."""
    normalize: Normalize = "none"
    """Of numbers and dates, fitted on the training rows. robust: by median and interquartile range."""
    pca: int | None = Field(default=None, ge=1)
    """Keep this many principal components of the inputs."""
    image_size: Annotated[tuple[int, int], Field(strict=False)] | None = None
    """[height, width] to which pictures are resized; default: the commonest."""
    image_channels: Literal[1, 3] | None = None
    """1: grey, 3: colour; default: the commonest."""
    bad_images: Literal["stop", "skip"] = "stop"
    """Of pictures that cannot be read. skip: leave those rows out, up to `max_bad_share` of them."""
    max_bad_share: Fraction = 0.01
    tokens: Literal["character", "byte"] = "character"
    """Of plain text."""
    context: int = Field(default=128, ge=1)
    """Tokens of a window of text."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from the start of one training window to that of the next; default: `context`, so that none overlap."""
    columns: dict[str, ColumnSpec] = {}
    memory_gb: PositiveFloat | None = None
    """Rows of Parquet that would need more memory than this while they are prepared are streamed from disk; default:
    half of what is free."""

    @model_validator(mode="after")
    def _settings_go_together(self) -> DataSpec:
        if faults := list(self._conflicts()):
            raise ValueError("; ".join(faults))
        return self

    def _conflicts(self) -> Iterable[str]:
        if (self.source is None) == (self.train is None):
            yield "source: give either source, or train and test"
        if (self.train is None) != (self.test is None):
            yield "train, test: a given split has both"
        for place, policy, value in self._fills():
            if (policy == "constant") != (value is not None):
                yield f"{place}missing: {policy!r} with missing_value = {value!r}; constant, and it alone, needs one"
        encodings = [self.categories, *(column.categories for column in self.columns.values())]
        if self.pca is not None and "embedding" in encodings:
            yield "pca: cannot be taken of categories = 'embedding', use 'one_hot'"
        if self.image_size is not None and min(self.image_size) < 1:
            yield f"image_size: use [height, width] from 1, got {list(self.image_size)}"

    def _fills(self) -> Iterable[tuple[str, MissingPolicy, str | float | None]]:
        yield "", self.missing, self.missing_value
        for name, column in self.columns.items():
            if column.missing is not None or column.missing_value is not None:
                value = column.missing_value if column.missing_value is not None else self.missing_value
                policy = column.missing or self.missing
                yield f"columns.{name}.", policy, value if policy == "constant" else column.missing_value

    def of_column(self, name: str) -> ColumnSpec:
        """The settings of one input column, with those of `[data]` where it has none of its own."""
        own = self.columns.get(name, ColumnSpec())
        policy = own.missing or self.missing
        value = own.missing_value if own.missing_value is not None else self.missing_value
        return ColumnSpec(
            kind=own.kind,
            missing=policy,
            missing_value=value if policy == "constant" else None,
            missing_indicator=self.missing_indicator if own.missing_indicator is None else own.missing_indicator,
            categories=own.categories or self.categories,
            unknown_category=own.unknown_category or self.unknown_category,
        )


class ModelSpec(Spec):
    """A callable `(input_shape, num_outputs, **params)` that returns a `torch.nn.Module`."""

    factory: str = Field(pattern=IMPORT_PATH)
    params: dict[str, Any] = {}
    weights: Annotated[str, AfterValidator(_from_anywhere)] | None = None
    """A safetensors file to start from, such as `bundle/weights.safetensors` of another run: a path, or an s3:// or
    gs:// URI. Taken by name; what has another shape, such as a new head, starts as the factory makes it."""
    freeze: Names = ()
    """Patterns over parameter names (fnmatch), such as `stem.*`, that training leaves as they are."""
    keep_zeros: bool = False
    """What is exactly 0 in the matrices of `weights`, as in a pruned model, stays 0 through training."""

    @model_validator(mode="after")
    def _zeros_come_from_a_file(self) -> ModelSpec:
        if self.keep_zeros and self.weights is None:
            raise ValueError("keep_zeros: needs weights, the file whose zeros are to stay")
        return self


class ScheduleSpec(Spec):
    """How the learning rate moves over the optimizer steps of a trial; each kind starts after the warm-up."""

    kind: Literal["constant", "linear", "cosine", "one_cycle"] = "constant"
    """linear and cosine fall to `final_fraction`; one_cycle rises from lr/25 to lr and falls below it (Smith and Topin
    2019, arXiv 1708.07120)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of a linear rise from 0; not with one_cycle, which has its own."""
    final_fraction: Fraction = 0.0
    """The rate of the last step over `lr`; for linear and cosine."""
    rise_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of the steps in which one_cycle rises."""

    @model_validator(mode="after")
    def _has_one_rise(self) -> ScheduleSpec:
        if self.kind == "one_cycle" and self.warmup_steps:
            raise ValueError("one_cycle rises by itself: remove warmup_steps, or set rise_fraction")
        return self


class ParamGroupSpec(Spec):
    """Parameters with settings of their own, by name."""

    match: str = Field(min_length=1)
    """A pattern such as `head.*` over the module's parameter names (fnmatch); the first group that matches wins."""
    lr_scale: PositiveFloat = 1.0
    weight_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Default: the job's."""


class KeepSpec(Spec):
    """Checkpoints that stay on storage."""

    last: int = Field(default=2, ge=1)
    """The newest of each trial that may still go on; two, so that one can be damaged."""
    best: int = Field(default=1, ge=1)
    """Ended trials of a sweep, best first, whose last checkpoint stays; of the others only the record does."""


class SeedSpec(Spec):
    """Seeds of the parts of a trial; default: the job's seed."""

    weights: int | None = Field(default=None, ge=0)
    """Initial weights."""
    order: int | None = Field(default=None, ge=0)
    """Order of the samples in each epoch."""
    steps: int | None = Field(default=None, ge=0)
    """Random numbers inside a step, such as dropout."""


class NonFiniteSpec(Spec):
    """What to do when the loss or a gradient is NaN or infinite."""

    policy: Literal["stop", "rollback"] = "stop"
    """stop: the trial ends as diverged. rollback: back to the last checkpoint with a lower rate."""
    lr_factor: float = Field(default=0.5, gt=0, lt=1)
    """Multiplies the learning rate at each roll-back."""
    max_rollbacks: int = Field(default=3, ge=1)


class AugmentSpec(Spec):
    """Random changes of the training images of each batch, drawn anew for each image; in the order of the fields.

    Rotation, resize and colour are kornia's: `pip install 'bigray[vision]'`.
    """

    crop: int = Field(default=0, ge=0)
    """Pixels: the image is padded by as many on each side, with the mean, and cut back to its size at a random place
    (He et al. 2015, arXiv 1512.03385, section 4.2)."""
    flip: bool = False
    """Mirror left and right, half of the images."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """Degrees at most, to either side."""
    resize: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """[least, most] share of the image's area that is cut out and resized to the whole."""
    brightness: Fraction = 0.0
    """At most this share of the range of the training values is added or taken away."""
    contrast: Fraction = 0.0
    """Values are multiplied by something between 1 - contrast and 1 + contrast."""
    saturation: Fraction = 0.0
    """As contrast, for the distance to grey. For images of three channels only, as is hue."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """At most this share of the colour circle, to either side."""
    mixup: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Blend each image and its target with another of the batch, by a share drawn from Beta(mixup, mixup) (Zhang et al.
    2017, arXiv 1710.09412). Classification only, as is cutmix; 0.2 is usual."""
    cutmix: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Paste a box of another image of the batch, and blend the targets by its area, drawn from Beta(cutmix, cutmix)
    (Yun et al. 2019, arXiv 1905.04899); 1 is usual. With mixup too, each forward pass takes one of the two."""

    @model_validator(mode="after")
    def _resize_is_a_range(self) -> AugmentSpec:
        if self.resize is not None and not 0 < self.resize[0] <= self.resize[1] <= 1:
            raise ValueError(f"resize: use [least, most] with 0 < least <= most <= 1, got {list(self.resize)}")
        return self

    @property
    def mixes_targets(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_colour(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))


class TrainingSpec(Spec):
    """How one model is trained."""

    task: TaskName
    """classification, regression, binary, multilabel, language, or `package.module:Task` (see
    `bigray.training.tasks`)."""
    targets: BuiltInTask | None = None
    """How a task of one's own reads the target column: as the built-in task does. Needed for those only."""
    positive: Label | None = None
    """binary: the class that is looked for; default: the second of the two in sorted order."""
    threshold: ThresholdRule = "f1"
    """binary, multilabel: from which probability on a row has the label. f1: where F1 is best on the validation rows;
    a number; or `{ recall = 0.99 }`: the highest that finds this share of the validation rows that have it."""
    loop: str | None = Field(default=None, pattern=IMPORT_PATH)
    """`package.module:train`, called as train(context) in each worker instead of bigray's loop."""
    loop_params: dict[str, Any] = {}
    """Found by one's own loop in `context.params`."""
    epochs: int = Field(default=10, ge=1)
    global_batch_size: BatchSize = 64
    """Samples of one optimizer step, over all workers. auto: the largest micro-batch that fits, on each worker."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows of one forward pass of one worker at most; a larger share is accumulated over several. Default: no limit."""
    lr: PositiveFloat = 1e-3
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the rate follows the batch: lr x (global_batch_size / lr_batch_size), or its square root (Goyal et al. 2017,
    arXiv 1706.02677; Krizhevsky 2014, arXiv 1404.5997)."""
    lr_batch_size: int | None = Field(default=None, ge=1)
    """The batch that `lr` is meant for; default: the job's own global_batch_size, also where a search varies it."""
    schedule: ScheduleSpec = ScheduleSpec()
    optimizer: OptimizerName = "adamw"
    """A class of `torch.optim`, in any case: adamw, sgd, rmsprop, NAdam ..."""
    optimizer_params: dict[str, Any] = {}
    """More arguments of that class, such as betas or nesterov."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """For optimizers that have it, such as sgd."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    weight_decay_on: Literal["all", "matrices"] = "all"
    """matrices: biases and the parameters of normalisation layers (all with fewer than two axes) do not decay."""
    param_groups: Annotated[tuple[ParamGroupSpec, ...], Field(strict=False)] = ()
    clip_norm: PositiveFloat | None = None
    """Gradients are scaled down to this norm over all parameters; default: never."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights; it is what is validated and exported."""
    label_smoothing: Fraction = 0.0
    class_weights: ClassWeights = "none"
    """Weight of each class's samples in the loss, in the order of the classes; balanced: inverse to their counts."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: autocast; the weights and the optimizer stay in fp32. fp16 scales the loss too."""
    compile: bool = False
    """Pass the model through torch.compile."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them."""
    augment: AugmentSpec | None = None
    """Random changes of the training images, in the worker, before each forward pass; default: none."""
    sync_batchnorm: bool = False
    """Batch norm statistics over the micro-batches of all workers."""
    exact: bool = False
    """Bit-equal weights at any number of workers up to `logical_shards`: fixed shards, summed in a fixed order."""
    logical_shards: int = Field(default=4, ge=1, le=256)
    """Parts of each global batch that `exact` computes apart; a worker takes several."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """fsdp: parameters, gradients and optimizer state are cut over the workers (torch fully_shard)."""
    metric: str | None = None
    """Validation metric that picks the best epoch; default: the first of the task's `METRICS`."""
    metric_mode: Literal["max", "min"] | None = None
    """Which way is better, for a metric that is not one of `METRICS`."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many validated epochs without a better metric; default: train all epochs."""
    val_every: int = Field(default=1, ge=1)
    """Validate after every n-th epoch, and after the last."""
    checkpoint_every_s: PositiveFloat = 30.0
    """Seconds between checkpoints inside a run of epochs; one is always made when training pauses or ends."""
    keep: KeepSpec = KeepSpec()
    seeds: SeedSpec = SeedSpec()
    on_non_finite: NonFiniteSpec = NonFiniteSpec()
    hang_timeout_s: PositiveFloat = 600.0
    """A worker that is alive but makes no progress for this long is ended and replaced. It is named after 20 s."""

    @model_validator(mode="after")
    def _metric_is_reported(self) -> TrainingSpec:
        known = METRICS.get(self.task, {})
        is_free = self.task not in METRICS or self.loop is not None
        if is_free and self.metric not in known and (self.metric is None or self.metric_mode is None):
            raise ValueError("metric and metric_mode: a task or loop of your own needs both, such as 'val_f1', 'max'")
        if not is_free and self.metric is not None and self.metric not in known:
            raise ValueError(unknown_metric(self.metric, self.task))
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingSpec:
        if faults := list(self._conflicts()):
            raise ValueError("; ".join(faults))
        return self

    def _conflicts(self) -> Iterable[str]:
        yield from self._target_conflicts()
        if self.exact and self.strategy == "fsdp":
            yield "exact: cannot be combined with strategy = 'fsdp'"
        if self.exact and self.sync_batchnorm:
            yield "exact: normalises each logical shard by itself; remove sync_batchnorm"
        if self.exact and self.global_batch_size == "auto":
            yield "exact: needs a fixed global_batch_size, 'auto' depends on the machine"
        if self.loop is not None and (self.exact or self.strategy == "fsdp"):
            yield "exact and strategy = 'fsdp' are of bigray's own loop; remove them, or loop"
        yield from self._augment_conflicts()
        if self.lr_batch_size is not None and self.lr_scaling == "none":
            yield "lr_batch_size: is only read with lr_scaling = 'linear' or 'sqrt'"
        if self.lr_scaling != "none" and self.global_batch_size == "auto" and self.lr_batch_size is None:
            yield "lr_scaling: with global_batch_size = 'auto' it needs lr_batch_size, the batch that lr is meant for"

    def _augment_conflicts(self) -> Iterable[str]:
        if self.augment is None:
            return
        if self.loop is not None:
            yield "augment: is of bigray's own loop; remove it, or loop"
        if self.augment.mixes_targets and self.target_kind != "classification":
            yield "augment: mixup and cutmix are for classification"

    def _target_conflicts(self) -> Iterable[str]:
        if self.task not in METRICS and self.targets is None:
            yield f"targets: a task of your own needs how to read the target column: one of {', '.join(METRICS)}"
        kind = self.target_kind
        if kind not in ("classification", "binary") and (self.label_smoothing or self.class_weights != "none"):
            yield "label_smoothing and class_weights are for classification and binary"
        if self.positive is not None and kind != "binary":
            yield f"positive: is for binary, and the task is {kind}"
        if self.threshold != "f1" and kind not in ("binary", "multilabel"):
            yield f"threshold: is for binary and multilabel, and the task is {kind}"

    @property
    def batch_size(self) -> int:
        """`global_batch_size` as a number: in a worker, which has put the number it found in the place of "auto"."""
        if self.global_batch_size == "auto":
            raise ValueError("global_batch_size is 'auto' and has not been found yet")
        return self.global_batch_size

    @property
    def scaled_lr(self) -> float:
        """`lr` for this batch size, by `lr_scaling`: what the optimizer starts from (in a worker, as `batch_size`)."""
        if self.lr_scaling == "none" or self.lr_batch_size is None:
            return self.lr
        ratio = self.batch_size / self.lr_batch_size
        return self.lr * (ratio if self.lr_scaling == "linear" else math.sqrt(ratio))

    @property
    def target_kind(self) -> BuiltInTask:
        """How the target column is read: as the built-in task of this name does."""
        if self.task in METRICS:
            return cast(BuiltInTask, self.task)
        return self.targets or "regression"

    @property
    def selection_metric(self) -> str:
        return self.metric or next(iter(METRICS[self.task]))

    @property
    def selection_mode(self) -> Literal["max", "min"]:
        return self.metric_mode or METRICS[self.task][self.selection_metric]


class ScalingSpec(Spec):
    """Workers of one group, and what each holds."""

    num_workers: WorkerCount = 1
    """A number, or [least, most]: elastic, the group starts with what fits and follows the cluster."""
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Above 0 the group runs on GPUs over NCCL; ranks that share a GPU use gloo."""
    accelerator: str | None = Field(default=None, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
    """Type of GPU that each worker gets, by its node's label `ray.io/accelerator-type`, such as "A100"; none: any."""
    max_failures: int = Field(default=3, ge=0)
    """Worker deaths a trial survives; after each it goes on from the last checkpoint. A preemption is not one."""
    isolate: bool = False
    """Give each trial fresh processes, at the price of starting them (about ten seconds); default: warm ones."""
    max_rss_gb: PositiveFloat | None = None
    """A worker whose memory is above this after a trial is replaced by a fresh one; default: a quarter of the node's
    memory, shared out over its workers."""
    warm_spare: bool = True
    """Beside a run that lasts, keep an idle process with all imported, that takes a lost worker's seat (CPU only)."""

    @model_validator(mode="after")
    def _an_accelerator_can_be_placed(self) -> ScalingSpec:
        if self.accelerator is not None and not self.gpus_per_worker:
            raise ValueError(f"accelerator: '{self.accelerator}' needs GPUs; set gpus_per_worker, or remove it")
        if self.accelerator is not None and self.is_elastic:
            # Ray Train 2.60 counts places for an elastic group by resources alone, and would wait for some for ever
            raise ValueError(f"accelerator: not with an elastic group; use num_workers = {self.max_workers}")
        return self

    @property
    def may_share_gpus(self) -> bool:
        """Whether two workers of a group may be placed on one GPU."""
        return 0 < self.gpus_per_worker <= 0.5 and self.max_workers > 1

    @property
    def is_elastic(self) -> bool:
        return self.min_workers != self.max_workers

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


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

    @model_validator(mode="after")
    def _exact_has_a_shard_for_each_worker(self) -> JobSpec:
        training, most = self.training, self.scaling.max_workers
        if training.exact and most > training.logical_shards:
            raise ValueError(
                f"training.logical_shards: {training.logical_shards} shards cannot keep {most} workers busy; "
                f"use logical_shards = {most} or more"
            )
        return self

    @model_validator(mode="after")
    def _fsdp_has_whole_gpus(self) -> JobSpec:
        share = self.scaling.gpus_per_worker
        if self.training.strategy == "fsdp" and self.scaling.may_share_gpus:
            raise ValueError(f"scaling.gpus_per_worker: {share:g}: fsdp cannot have two workers on one GPU; use 1")
        return self

    def fixed_by(self) -> dict[str, Any]:
        """The part that decides the result: all but where it is stored and how many workers share the work."""
        # of a file of weights the bytes count, which `RunRequest.run_id` adds
        where: Any = {
            "storage": True,
            "scaling": True,
            "models": {"__all__": {"weights"}},
            "data": {"memory_gb"},
        }
        return self.model_dump(mode="json", exclude=where)


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
    """Asynchronous successive halving with promotion (Li et al. 2020, arXiv 1810.05934, algorithm 2)."""

    grace_epochs: int = Field(default=2, ge=1)
    """Epochs that every trial gets."""
    reduction_factor: int = Field(default=3, ge=2)
    """The best 1/reduction_factor of a rung are promoted; rungs are at grace_epochs x reduction_factor^k epochs."""


class MedianSpec(Spec):
    """The median stopping rule (Golovin et al. 2017, Google Vizier, section 3.2.2)."""

    grace_epochs: int = Field(default=2, ge=1)
    """No trial is stopped before this epoch; each `grace_epochs` epochs it is looked at again."""
    min_trials: int = Field(default=4, ge=1)
    """Other trials that must have come as far before one is stopped."""


class PbtSpec(Spec):
    """Population based training (Jaderberg et al. 2017, arXiv 1711.09846). `trials` is the size of the population."""

    interval_epochs: int = Field(default=2, ge=1)
    """Epochs between two rounds of exploit and explore."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """The worst of the population, by this share, take over weights and settings of the best."""
    resample_probability: Fraction = 0.25
    """A setting that was taken over is drawn anew with this probability, else multiplied by 0.8 or 1.2 (a choice moves
    to a neighbour)."""


Space = dict[str, RangeSpec]


class SearchSpec(Spec):
    """A search file: the space, the scheduler and the budget."""

    space: Space = {}
    """Keys are fields of `TrainingSpec`."""
    spaces: dict[str, Space] = {}
    """By model name: keys that are searched for that model only, or otherwise than in `space`."""
    search: Literal["random", "grid", "tpe"] = "random"
    """tpe: Optuna's tree-structured Parzen estimator, which learns from the trials before."""
    trials: int | None = Field(default=None, ge=1)
    """Trials in all, dealt out evenly to the models; a grid has as many as its product."""
    metric: str | None = None
    """Overrides the job's `training.metric`."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    asha: AshaSpec = AshaSpec()
    median: MedianSpec = MedianSpec()
    pbt: PbtSpec = PbtSpec()
    finalists: int = Field(default=0, ge=0)
    """This many of the best are trained again, to the end, with `seeds` seeds each; 0: the best trial wins as it is."""
    seeds: int = Field(default=5, ge=2)
    stack: Literal["auto", "off"] = "auto"
    """auto: trials of one model and batch size are trained stacked in one process where that is faster here."""

    @model_validator(mode="after")
    def _space_suits_the_search(self) -> SearchSpec:
        if faults := list(self._conflicts()):
            raise ValueError("; ".join(faults))
        return self

    def _conflicts(self) -> Iterable[str]:
        if not self.space and not all(self.spaces.values()):
            yield "space: is empty, there is nothing to search"
        if not self.space and not self.spaces:
            yield "space: is missing, there is nothing to search"
        if self.search != "grid" and self.trials is None:
            yield f'trials: search = "{self.search}" needs a number of trials'
        if self.search == "grid" and self.trials is not None:
            yield 'trials: a grid runs its whole product; remove it, or use search = "random"'
        ranges = [key for space in (self.space, *self.spaces.values()) for key in space if space[key].choice is None]
        if self.search == "grid" and ranges:
            yield f"space: a grid needs 'choice' for every key, {ranges} have a range"
        if self.scheduler == "pbt" and self.search != "random":
            yield f'search: pbt changes settings by itself: use "random" with it, not "{self.search}"'
        if self.scheduler == "pbt" and self.trials is not None and self.trials < 2:
            yield "trials: pbt needs a population of 2 or more"

    def space_of(self, model_name: str) -> Space:
        """What is searched for a model: the common space, with its own keys before the common ones."""
        return {**self.space, **self.spaces.get(model_name, {})}


class TrialSpec(Spec):
    """One model with one set of numbers: what a worker group is handed. `train` makes one for each model."""

    trial_id: str
    model_name: str
    model: ModelSpec
    training: TrainingSpec
    seed: int
    fold: int | None = None
    """The fold of `data.k_folds` that it is validated on, from 0; None: the usual split."""

    @property
    def config_hash(self) -> str:
        """Of what decides the result: not of how many rows a forward pass holds, or where a file of weights lies."""
        exclude: Any = {"trial_id": True, "training": {"micro_batch_size"}, "model": {"weights"}}
        if self.fold is None:
            exclude["fold"] = True  # a checkpoint of before there were folds is still its own
        return digest(self.model_dump(mode="json", exclude=exclude))


def digest(document: Any) -> str:
    """Hash of a JSON document, 12 hex digits; equal documents give equal digests in any process."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def unknown_metric(metric: str, task: str) -> str:
    return f"metric '{metric}' is never reported for {task}; choose one of {', '.join(METRICS[task])}"
