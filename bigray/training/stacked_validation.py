"""Validation metrics of all lanes of a stack in a few passes, equal to those of `validation.py` (worker)."""

from __future__ import annotations

from typing import Any

import torch

from bigray.data.dataset import TrainingArrays
from bigray.specs import TrainingSpec
from bigray.training.stacked_loss import validation_losses
from bigray.training.stacked_network import StackedNetwork
from bigray.training.tasks import Task, metric_collection
from bigray.training.validation import EVALUATION_ROWS

_MOST_OUTPUTS = 2**22
"""Of one forward pass over all lanes; bounds memory."""


class StackedValidation:
    """Measures all lanes on the validation rows."""

    def __init__(
        self, spec: TrainingSpec, task: Task, num_outputs: int, data: TrainingArrays, device: torch.device
    ) -> None:
        self._spec, self._task, self._num_outputs = spec, task, num_outputs
        self._x = torch.from_numpy(data.x_val.copy()).to(device)
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
        return [{name: column[lane] for name, column in values.items()} for lane in range(num_lanes)]

    def _counter(self, num_lanes: int) -> _ClassCounts | _Errors | _OwnMetrics:
        device = self._y.device
        if self._spec.task == "classification":
            return _ClassCounts(num_lanes, self._num_outputs, device)
        if self._spec.task == "regression":
            return _Errors(num_lanes, device)
        return _OwnMetrics(self._task, self._num_outputs, num_lanes, device)


class _ClassCounts:
    """Accuracy, macro recall and macro F1 from the counts of each class, as torchmetrics defines them.

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
        f1 = torch.where(predicted + targets > 0, 2 * hits / (predicted + targets), 0.0)
        return {
            "val_accuracy": hits.sum(dim=1) / targets.sum(dim=1),
            "val_macro_recall": (recall * is_seen).sum(dim=1) / num_seen,
            "val_macro_f1": (f1 * is_seen).sum(dim=1) / num_seen,
        }


class _Errors:
    """Mean squared and absolute error and R2: torchmetrics' own, each lane an output of one metric."""

    def __init__(self, num_lanes: int, device: torch.device) -> None:
        from torchmetrics import regression

        self._metrics = {
            "val_mse": regression.MeanSquaredError(num_outputs=num_lanes, sync_on_compute=False).to(device),
            "val_mae": regression.MeanAbsoluteError(num_outputs=num_lanes, sync_on_compute=False).to(device),
            "val_r2": regression.R2Score(multioutput="raw_values", sync_on_compute=False).to(device),
        }

    def add(self, outputs: torch.Tensor, y: torch.Tensor) -> None:
        predicted = outputs.squeeze(2).t().contiguous()
        targets = y.unsqueeze(1).expand_as(predicted).contiguous()
        for metric in self._metrics.values():
            metric.update(predicted, targets)

    def result(self) -> dict[str, torch.Tensor]:
        return {name: metric.compute().reshape(-1) for name, metric in self._metrics.items()}


class _OwnMetrics:
    """The metrics of a task of the user's own: one lane after another, by the same objects."""

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
