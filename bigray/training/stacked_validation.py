"""Validation metrics of all lanes of a stack in a few passes, equal to those of `validation.py` (worker)."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from bigray.data.dataset import TrainingArrays
from bigray.specs import TrainingSpec
from bigray.training.built_in_tasks import BINS
from bigray.training.stacked_loss import validation_losses
from bigray.training.stacked_network import StackedNetwork
from bigray.training.tasks import Task, metric_collection, metrics_of_loss
from bigray.training.validation import EVALUATION_ROWS

_MOST_OUTPUTS = 2**22
"""Of one forward pass over all lanes; bounds memory."""


class StackedValidation:
    """Measures all lanes on the validation rows."""

    def __init__(
        self, spec: TrainingSpec, task: Task, num_outputs: int, data: TrainingArrays, device: torch.device
    ) -> None:
        self._spec, self._task, self._num_outputs = spec, task, num_outputs
        self._x = torch.from_numpy(data.x_val[:].copy()).to(device)
        self._y = torch.from_numpy(data.y_val.copy()).to(device)

    def measure(self, network: StackedNetwork, num_lanes: int) -> list[dict[str, float]]:
        """val_loss and the task's metrics of each lane."""
        num_rows = len(self._y)
        losses = torch.zeros(num_lanes, dtype=torch.float64, device=self._y.device)
        counted = self._counter(num_lanes)
        most = max(1, min(EVALUATION_ROWS, _MOST_OUTPUTS // (num_lanes * self._num_outputs)))
        for start in range(0, num_rows, most):
            place = slice(start, start + most)
            outputs, y = network.outputs(self._x[place]).float(), self._y[place]
            with torch.no_grad():
                losses += validation_losses(self._spec, self._task, outputs, y).double().sum(dim=1)
                counted.add(outputs, y)
        columns = {"val_loss": losses / num_rows, **counted.result()}
        values = {name: column.tolist() for name, column in columns.items()}
        lanes = [{name: column[lane] for name, column in values.items()} for lane in range(num_lanes)]
        return [{**metrics, **metrics_of_loss(self._task, metrics["val_loss"])} for metrics in lanes]

    def _counter(self, num_lanes: int) -> _Counter:
        device = self._y.device
        if self._spec.task == "classification":
            return _ClassCounts(num_lanes, self._num_outputs, device)
        if self._spec.task == "regression":
            return _Errors(num_lanes, device)
        if self._spec.task == "binary":
            return _BinaryCounts(num_lanes, device)
        if self._spec.task == "multilabel":
            return _LabelCounts(num_lanes, self._num_outputs, device)
        return _OwnMetrics(self._task, self._num_outputs, num_lanes, device)


class _Counter(Protocol):
    """Counts all lanes' metrics over the validation rows."""

    def add(self, outputs: torch.Tensor, y: torch.Tensor) -> None:
        """More rows: outputs (lanes, rows, outputs) and their targets."""

    def result(self) -> dict[str, torch.Tensor]:
        """(lanes,) for each metric."""


class _ClassCounts:
    """Accuracy, macro recall, precision and F1 from the counts of each class, as torchmetrics defines them.

    A class that is neither among the targets nor among the predictions is left out of a macro average.
    """

    def __init__(self, num_lanes: int, num_classes: int, device: torch.device) -> None:
        shape = (num_lanes, num_classes)
        self._hits, self._predicted, self._targets = (
            torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(3)
        )

    def add(self, outputs: torch.Tensor, y: torch.Tensor) -> None:
        lanes, num_classes = self._hits.shape
        # the first of equals, as argmax; torch is five times as fast at this than at argmax over such an axis
        predicted = outputs.transpose(1, 2).max(dim=1).indices
        first = torch.arange(lanes, device=y.device).unsqueeze(1) * num_classes
        places = predicted + first
        self._predicted += self._count(places.flatten())
        self._hits += self._count(places[predicted == y])
        self._targets += torch.bincount(y, minlength=num_classes)

    def _count(self, places: torch.Tensor) -> torch.Tensor:
        return torch.bincount(places, minlength=self._hits.numel()).view_as(self._hits)

    def result(self) -> dict[str, torch.Tensor]:
        hits, predicted, targets = self._hits.float(), self._predicted.float(), self._targets.float()
        is_seen = (predicted + targets > 0).float()
        num_seen = is_seen.sum(dim=1)
        recall = torch.where(targets > 0, hits / targets, 0.0)
        precision = torch.where(predicted > 0, hits / predicted, 0.0)
        f1 = torch.where(predicted + targets > 0, 2 * hits / (predicted + targets), 0.0)
        return {
            "val_accuracy": hits.sum(dim=1) / targets.sum(dim=1),
            "val_macro_recall": (recall * is_seen).sum(dim=1) / num_seen,
            "val_macro_precision": (precision * is_seen).sum(dim=1) / num_seen,
            "val_macro_f1": (f1 * is_seen).sum(dim=1) / num_seen,
        }


class _Errors:
    """Mean squared and absolute error and R2: torchmetrics' own, each lane an output of one metric."""

    def __init__(self, num_lanes: int, device: torch.device) -> None:
        from torchmetrics import regression

        from bigray.training.r2 import R2

        self._metrics = {
            "val_mse": regression.MeanSquaredError(num_outputs=num_lanes, sync_on_compute=False).to(device),
            "val_mae": regression.MeanAbsoluteError(num_outputs=num_lanes, sync_on_compute=False).to(device),
            "val_r2": R2(multioutput="raw_values", sync_on_compute=False).to(device),
        }

    def add(self, outputs: torch.Tensor, y: torch.Tensor) -> None:
        predicted = outputs.squeeze(2).t().contiguous()
        targets = y.unsqueeze(1).expand_as(predicted).contiguous()
        for metric in self._metrics.values():
            metric.update(predicted, targets)

    def result(self) -> dict[str, torch.Tensor]:
        return {name: metric.compute().reshape(-1) for name, metric in self._metrics.items()}


class _BinaryCounts:
    """The metrics of `built_in_tasks.Binary` from how many rows of each class lie between two of its thresholds."""

    def __init__(self, num_lanes: int, device: torch.device) -> None:
        self._thresholds = torch.linspace(0, 1, BINS, device=device)
        self._rows = torch.zeros((num_lanes, 2, BINS + 1), dtype=torch.int64, device=device)
        """By lane, class, and the number of thresholds that a row's probability reaches."""
        self._decided = torch.zeros((num_lanes, 2, 2), dtype=torch.int64, device=device)
        """By lane, class, and the class that it is given."""

    def add(self, outputs: torch.Tensor, y: torch.Tensor) -> None:
        probabilities = outputs.squeeze(2).sigmoid()
        lanes = torch.arange(len(probabilities), device=y.device).unsqueeze(1)
        groups = lanes * 2 + y
        reached = torch.searchsorted(self._thresholds, probabilities.contiguous(), right=True)
        for counts, place in ((self._rows, reached), (self._decided, (probabilities > 0.5).long())):
            flat = (groups * counts.shape[2] + place).flatten()
            counts += torch.bincount(flat, minlength=counts.numel()).view_as(counts)

    def result(self) -> dict[str, torch.Tensor]:
        _, wrong, missed, hits = self._decided.float().flatten(1).unbind(dim=1)
        return {
            "val_f1": _share(2 * hits, 2 * hits + wrong + missed),
            "val_accuracy": self._decided.diagonal(dim1=1, dim2=2).sum(dim=1) / self._decided.sum(dim=(1, 2)),
            "val_precision": _share(hits, hits + wrong),
            "val_recall": _share(hits, hits + missed),
            **self._areas(),
        }

    def _areas(self) -> dict[str, torch.Tensor]:
        # column i: the rows whose probability reaches threshold i
        reaching = self._rows.flip(2).cumsum(dim=2).flip(2)[:, :, 1:].float()
        totals = self._rows.sum(dim=2, keepdim=True).float()
        false_rate, recall = _share(reaching, totals).unbind(dim=1)
        precision = _share(reaching[:, 1], reaching.sum(dim=1))
        steps = recall - torch.cat([recall[:, 1:], torch.zeros_like(recall[:, :1])], dim=1)
        return {
            "val_roc_auc": torch.trapezoid(recall.flip(1), false_rate.flip(1), dim=1),
            "val_pr_auc": (steps * precision).sum(dim=1),
        }


class _LabelCounts:
    """The metrics of `built_in_tasks.Multilabel`."""

    def __init__(self, num_lanes: int, num_labels: int, device: torch.device) -> None:
        self._hits, self._both = torch.zeros((2, num_lanes, num_labels), dtype=torch.int64, device=device)
        """Rows that have the label and are given it; and how many have it plus how many are given it."""
        self._exact, self._num_rows = torch.zeros(num_lanes, dtype=torch.int64, device=device), 0

    def add(self, outputs: torch.Tensor, y: torch.Tensor) -> None:
        given, true = outputs.sigmoid() > 0.5, y > 0
        self._hits += (given & true).sum(dim=1)
        self._both += given.sum(dim=1) + true.sum(dim=0)
        self._exact += (given == true).all(dim=2).sum(dim=1)
        self._num_rows += len(y)

    def result(self) -> dict[str, torch.Tensor]:
        return {
            "val_macro_f1": _share(2 * self._hits, self._both).mean(dim=1),
            "val_micro_f1": _share(2 * self._hits.sum(dim=1), self._both.sum(dim=1)),
            "val_exact_match": self._exact / self._num_rows,
        }


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """0 of nothing, as torchmetrics has it."""
    return torch.where(whole > 0, part / whole, 0.0)


class _OwnMetrics:
    """The metrics of any other task: one lane after another, by the same objects."""

    def __init__(self, task: Task, num_outputs: int, num_lanes: int, device: torch.device) -> None:
        self._task, self._lanes = task, num_lanes
        self._metrics = metric_collection(task, num_outputs).to(device)
        self._predicted: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []

    def add(self, outputs: torch.Tensor, y: torch.Tensor) -> None:
        self._predicted.append(torch.stack([self._task.predict(lane) for lane in outputs]))
        self._targets.append(y)

    def result(self) -> dict[str, torch.Tensor]:
        predicted, targets = torch.cat(self._predicted, dim=1), torch.cat(self._targets)
        found = [self._of_lane(lane, targets) for lane in predicted]
        return {name: torch.stack([metrics[name] for metrics in found]) for name in found[0]}

    def _of_lane(self, predicted: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        self._metrics.reset()
        self._metrics.update(predicted, targets)
        return {name: torch.as_tensor(float(value)) for name, value in self._metrics.compute().items()}
