"""Training an MLP on the digits as one writes it for a sweep with PyTorch alone: one process, or DDP by `wrap`.

The model, the optimizer, the loss and the rows of each step are those of bigray's own loop. Of the validation metrics
only loss and accuracy are computed; bigray reports macro recall and F1 too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bigray.data.dataset import TrainingArrays
from bigray.models import build_model

HIDDEN = 128
NUM_CLASSES = 10


def load_tensors(arrays: TrainingArrays) -> tuple[torch.Tensor, ...]:
    """Training inputs and targets, then those of validation; copies, since what comes out of Ray is read-only."""
    return tuple(torch.tensor(array) for array in (arrays.x_train, arrays.y_train, arrays.x_val, arrays.y_val))


class DigitsTraining:
    """One trial, epoch by epoch."""

    def __init__(
        self,
        tensors: tuple[torch.Tensor, ...],
        lr: float,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        self._x, self._y, self._x_val, self._y_val = tensors
        self._batch, self._rank, self._world_size = batch, rank, world_size
        self.epoch, self._best = 0, 0.0
        torch.manual_seed(0)
        shape = tuple(self._x.shape[1:])
        self._network = wrap(build_model("bigray.models:mlp", {"hidden": [HIDDEN]}, shape, NUM_CLASSES))
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=lr, weight_decay=0.0, fused=True)

    def train_epoch(self) -> None:
        """`batch` is that of a step, over all ranks."""
        self._network.train()
        order = torch.from_numpy(np.random.default_rng([0, self.epoch]).permutation(len(self._x)))
        for start in range(0, len(self._x), self._batch):
            rows = order[start : start + self._batch][self._rank :: self._world_size]
            self._optimizer.zero_grad()
            functional.cross_entropy(self._network(self._x[rows]), self._y[rows]).backward()
            self._optimizer.step()
        self.epoch += 1

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Validation metrics, the best accuracy of all calls, and the number of epochs trained."""
        self._network.eval()
        outputs = self._network(self._x_val)
        accuracy = float((outputs.argmax(dim=1) == self._y_val).float().mean())
        self._best = max(self._best, accuracy)
        return {
            "epoch": self.epoch,
            "val_loss": float(functional.cross_entropy(outputs, self._y_val)),
            "val_accuracy": accuracy,
            "best_accuracy": self._best,
        }
