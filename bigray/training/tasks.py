"""What a task minimises and reports: one of `built_in_tasks`, or `task = "package.module:Task"` (worker).

A task of one's own is called with the number of outputs of the model and has three methods, those of `Task`:

    class Ordinal:
        def __init__(self, num_outputs: int) -> None: ...
        def loss(self, outputs, targets): ...    # (rows,), one for each sample: bigray averages over the global batch
        def metrics(self, num_outputs): ...      # {"val_f1": torchmetrics metric, ...}
        def predict(self, outputs): ...          # what the metrics compare with the targets

It may have more. `validation_loss(outputs, targets)`, (rows,), is reported as val_loss in the place of `loss`.
`total_weight(targets)` takes an array and returns the number by which the summed losses of those samples are divided,
in the place of their count: for a loss that weights them. `output_shape(num_outputs, target_shape)` is what the model
returns for one row, where that is not (num_outputs,). `metrics_of_loss(val_loss)` gives more metrics, by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bigray.errors import SpecError, TrainingFailed
from bigray.models.resolve import load_factory
from bigray.specs import METRICS, TrainingSpec
from bigray.training.built_in_tasks import Binary, Classification, Language, Multilabel, Regression

if TYPE_CHECKING:
    import torch
    import torchmetrics

METHODS = ("loss", "metrics", "predict")
_WITHOUT_SETTINGS: dict[str, Callable[[], Task]] = {
    "regression": Regression,
    "multilabel": Multilabel,
    "language": Language,
}


class Task(Protocol):
    """What the training loop asks of a task.

    `outputs` is (rows, *output_shape) in float32, as a rule (rows, num_outputs); `targets` is as `encode_targets` made
    them, as a rule (rows,).
    """

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(rows,) losses to minimise, one for each sample."""
        ...

    def metrics(self, num_outputs: int) -> Mapping[str, torchmetrics.Metric]:
        """Validation metrics by a name that starts with `val_`; val_loss is reported besides.

        Every state of each must be a sum over samples, which the loop adds up over the ranks.
        """
        ...

    def predict(self, outputs: torch.Tensor) -> torch.Tensor:
        """What the metrics compare with the targets, with one entry for each row."""
        ...


def load_task(spec: TrainingSpec, num_outputs: int, y_train: NDArray[Any]) -> Task:
    """The job's task; `y_train` gives the counts for `class_weights = "balanced"`.

    Raises:
        SpecError: the task cannot be imported or made, lacks a method, or the class weights are not one a class.
    """
    if faults := class_weight_faults(spec, num_outputs):
        raise SpecError(faults)
    if spec.task not in METRICS:
        return load_own_task(spec.task, num_outputs)
    if spec.task in _WITHOUT_SETTINGS:
        return _WITHOUT_SETTINGS[spec.task]()
    weights, make = spec.class_weights, Binary if spec.task == "binary" else Classification
    if weights == "balanced":
        return make(spec.label_smoothing, balanced_weights(y_train, _num_classes(spec, num_outputs)).tolist())
    return make(spec.label_smoothing, None if weights == "none" else weights)


def load_own_task(path: str, num_outputs: int) -> Task:
    """Import `package.module:Task`, call it with the number of outputs and check that it has what a task needs."""
    try:
        make = load_factory(path)
        if inspect.isclass(make):
            _check_methods(path, make)
        task: Task = _call(path, make, num_outputs)
        _check_methods(path, task)
    except SpecError as error:
        raise SpecError([f"training.task: {fault}" for fault in error.faults]) from error.__cause__
    return task


def class_weight_faults(spec: TrainingSpec, num_outputs: int) -> list[str]:
    """What is wrong with the settings of the built-in loss, given the data's number of classes."""
    own_loss = spec.task not in METRICS
    given = [name for name, off in (("label_smoothing", 0.0), ("class_weights", "none")) if getattr(spec, name) != off]
    if own_loss and given:
        return [f"training.{name}: '{spec.task}' has a loss of its own; remove it" for name in given]
    num_classes = _num_classes(spec, num_outputs)
    if isinstance(spec.class_weights, tuple) and len(spec.class_weights) != num_classes:
        return [f"training.class_weights: {len(spec.class_weights)} weights for {num_classes} classes"]
    return []


def _num_classes(spec: TrainingSpec, num_outputs: int) -> int:
    return 2 if spec.target_kind == "binary" else num_outputs


def balanced_weights(y_train: NDArray[Any], num_classes: int) -> NDArray[np.float64]:
    """rows / (classes x rows of the class), as scikit-learn has it: every class then counts the same in the loss.

    A class without rows has 0: no training sample has that weight, and smoothing does not push towards it.
    """
    counts = np.bincount(y_train, minlength=num_classes)
    weights = np.zeros(num_classes)
    np.divide(len(y_train), num_classes * counts, out=weights, where=counts > 0)
    return weights


def output_shape(task: Task, num_outputs: int, targets: NDArray[Any]) -> tuple[int, ...]:
    """What the model returns for one row of a job with these targets (rows, ...)."""
    shape: Callable[[int, tuple[int, ...]], tuple[int, ...]] | None = getattr(task, "output_shape", None)
    return (num_outputs,) if shape is None else tuple(shape(num_outputs, targets.shape[1:]))


def metrics_of_loss(task: Task, val_loss: float) -> dict[str, float]:
    """Metrics that follow from the loss alone."""
    compute: Callable[[float], Mapping[str, float]] | None = getattr(task, "metrics_of_loss", None)
    return {} if compute is None else dict(compute(val_loss))


def sample_losses(task: Task, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(rows,) losses of a training batch in float32, whatever autocast left; backward goes through their sum."""
    return _one_each(task, "loss", task.loss(outputs.float(), targets), len(targets))


def validation_losses(task: Task, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(rows,) losses of validation rows: the plain ones, where the task tells them apart."""
    plain = getattr(task, "validation_loss", task.loss)
    return _one_each(task, "validation_loss", plain(outputs.float(), targets), len(targets))


def total_weight(task: Task, targets: NDArray[Any]) -> float:
    """What the summed losses of these samples are divided by: their number, or their weights where the task has some.

    A step divides by that of the whole global batch, which every worker can tell from the rows alone.
    """
    weigh: Callable[[NDArray[Any]], float] | None = getattr(task, "total_weight", None)
    return float(len(targets)) if weigh is None else float(weigh(targets))


def metric_collection(task: Task, num_outputs: int) -> torchmetrics.MetricCollection:
    """The task's validation metrics, none of which syncs by itself.

    Raises:
        SpecError: a name that cannot be reported, or a metric that cannot be added up over the ranks.
    """
    from torchmetrics import MetricCollection

    metrics = dict(task.metrics(num_outputs))
    if faults := list(_metric_faults(metrics)):
        raise SpecError([f"training.task: {type(task).__name__}.metrics: {fault}" for fault in faults])
    for metric in metrics.values():
        metric.sync_on_compute = False
    return MetricCollection(metrics)


def _call(path: str, make: Callable[..., Any], num_outputs: int) -> Any:
    try:
        return make(num_outputs)
    except Exception as error:  # user code: whatever it raises is the fault to report
        raise SpecError(f"'{path}': failed for num_outputs={num_outputs}: {type(error).__name__}: {error}") from error


def _check_methods(path: str, task: object) -> None:
    if missing := [method for method in METHODS if not callable(getattr(task, method, None))]:
        names = " and no ".join(f"method '{name}'" for name in missing)
        raise SpecError(f"'{path}' has no {names} (needs {', '.join(METHODS)})")


def _one_each(task: Task, method: str, losses: torch.Tensor, rows: int) -> torch.Tensor:
    if losses.shape != (rows,):
        raise TrainingFailed(
            f"task {type(task).__name__}: {method} returned shape {tuple(losses.shape)} for {rows} rows, "
            f"expected {(rows,)}: one for each sample, neither summed nor averaged"
        )
    return losses


def _metric_faults(metrics: Mapping[str, torchmetrics.Metric]) -> Iterator[str]:
    from torchmetrics.utilities.data import dim_zero_sum

    for name, metric in metrics.items():
        kind = type(metric).__name__
        if not name.startswith("val_") or name == "val_loss":
            yield f"'{name}': a name must start with 'val_', and val_loss is reported anyway"
        # there is no public way to ask a metric how its states are put together
        not_sums = [state for state, reduce in metric._reductions.items() if reduce is not dim_zero_sum]
        if not_sums:
            yield f"'{name}': state '{not_sums[0]}' of {kind} is not a sum over samples, so workers cannot add it up"
        elif not metric.metric_state:
            yield f"'{name}': {kind} has no states of its own; give the metrics that it wraps"
