"""What all lanes of a stack minimise: summed losses of each lane and their gradients (worker)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import vmap

from bigray.specs import TrainingSpec
from bigray.training.tasks import Task, balanced_weights

_BROADCAST = ("regression", "binary", "multilabel")
"""Tasks whose losses take the lanes as one more axis before the rows: that is faster than `vmap`."""


class StackedLoss(Protocol):
    """Of outputs (lanes, rows, outputs) against the targets of the rows, which all lanes share."""

    def gradient(self, outputs: torch.Tensor, y: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Each lane's summed losses (lanes,), and the gradient of `scale` times their sum, shaped as `outputs`."""


def make_loss(spec: TrainingSpec, task: Task, num_outputs: int, y_train: NDArray[Any]) -> StackedLoss:
    """The training loss of a job over lanes; `y_train` gives the counts for `class_weights = "balanced"`."""
    if spec.task == "classification":
        return _CrossEntropy(_soft_targets(spec, num_outputs, y_train))
    return _TaskLoss(spec, task)


def validation_losses(spec: TrainingSpec, task: Task, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(lanes, rows) plain losses, as `tasks.validation_losses` of each lane."""
    loss = getattr(task, "validation_loss", task.loss)
    if spec.task == "classification":
        # cross_entropy takes the classes before the rows too: over a last axis of few classes torch's softmax is slow
        losses: torch.Tensor = loss(outputs.transpose(1, 2), y.expand(len(outputs), -1))
    elif spec.task in _BROADCAST:
        losses = loss(outputs, y.expand(len(outputs), *y.shape))
    else:
        losses = vmap(loss, in_dims=(0, None))(outputs, y)
    return losses


class _TaskLoss:
    """A task's own losses, differentiated by torch."""

    def __init__(self, spec: TrainingSpec, task: Task) -> None:
        self._loss, self._is_mapped = task.loss, spec.task not in _BROADCAST

    def gradient(self, outputs: torch.Tensor, y: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = outputs.detach().float().requires_grad_()
        if self._is_mapped:
            losses = vmap(self._loss, in_dims=(0, None))(leaf, y)
        else:
            losses = self._loss(leaf, y.expand(len(leaf), *y.shape))
        (found,) = torch.autograd.grad(losses, leaf, losses.new_full((), scale).expand_as(losses))
        return losses.detach().sum(dim=1), found.to(outputs.dtype)


class _CrossEntropy:
    """The loss of `built_in_tasks.Classification` in closed form.

    With the weights t of a row's classes it is -sum(t log p), and its gradient p sum(t) - t. Classes come before rows,
    so that everything is vectorised over the rows; torch's own loss and its backward pass take three times as long.
    """

    def __init__(self, soft_targets: torch.Tensor) -> None:
        """`soft_targets`: in row i the weights t of a row of class i."""
        self._columns = soft_targets.t().contiguous()
        totals = soft_targets.sum(dim=1)
        self._totals = None if torch.allclose(totals, torch.ones(())) else totals
        """sum(t) by class, where it is not 1 for all."""

    def gradient(self, outputs: torch.Tensor, y: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        if self._columns.device != outputs.device:
            self._columns = self._columns.to(outputs.device)
            self._totals = None if self._totals is None else self._totals.to(outputs.device)
        targets = self._columns.index_select(1, y)
        logarithms = torch.log_softmax(outputs.detach().float().transpose(1, 2), dim=1)
        sums = torch.mv(logarithms.flatten(1), targets.flatten()).neg_()
        found = logarithms.exp_()
        if self._totals is not None:
            found.mul_(self._totals[y])
        return sums, found.sub_(targets).mul_(scale).transpose(1, 2).to(outputs.dtype)


def _soft_targets(spec: TrainingSpec, num_classes: int, y_train: NDArray[Any]) -> torch.Tensor:
    weights: Any = np.ones(num_classes)
    if spec.class_weights == "balanced":
        weights = balanced_weights(y_train, num_classes)
    elif spec.class_weights != "none":
        weights = np.asarray(spec.class_weights)
    smoothing = spec.label_smoothing
    table = ((1 - smoothing) * np.eye(num_classes) + smoothing / num_classes) * weights
    return torch.from_numpy(table.astype(np.float32))
