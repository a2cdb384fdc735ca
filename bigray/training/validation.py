"""Validation metrics over all ranks, with the same bits at any number of workers.

The validation rows are cut into chunks that depend on their number alone. Each chunk is computed by one rank; losses
and predictions meet in one vector in one all_reduce, where every place has a single value that is not zero, so that
the sum rounds nothing. Each rank then gives all predictions to the metrics at once, in the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from bigray.data.batches import IndexArray
from bigray.data.dataset import TrainingArrays
from bigray.training.tasks import Task, metric_collection, metrics_of_loss, output_shape, validation_losses

if TYPE_CHECKING:
    from bigray.training.loop import Worker

EVALUATION_ROWS = 4096
"""Most rows of one forward pass in validation; bounds memory."""
EVALUATION_OUTPUTS = 2**23
"""Most outputs of one, where a row has many: those of a language model."""
LEAST_CHUNKS = 8
"""So that several workers share the work on a small validation set."""


def chunks_of(num_rows: int, most_rows: int = EVALUATION_ROWS) -> list[IndexArray]:
    """The validation rows in order, cut as evenly as possible."""
    num_chunks = min(num_rows, max(LEAST_CHUNKS, math.ceil(num_rows / most_rows)))
    return np.array_split(np.arange(num_rows, dtype=np.int64), num_chunks)


class Validation:
    """Measures a model on the validation rows (every rank, the same calls)."""

    def __init__(self, task: Task, num_outputs: int, data: TrainingArrays, device: torch.device) -> None:
        self._task, self._device = task, device
        self._metrics = metric_collection(task, num_outputs).to(device)
        self._targets = torch.from_numpy(data.y_val.copy()).to(device)
        shape = output_shape(task, num_outputs, data.y_val)
        # (num_outputs,) keeps the chunks it has always had: their sums are the val_loss to the last bit
        most_rows = EVALUATION_ROWS if len(shape) == 1 else max(1, EVALUATION_OUTPUTS // math.prod(shape))
        self._chunks = chunks_of(len(data.y_val), min(EVALUATION_ROWS, most_rows))
        self._prediction = task.predict(torch.zeros((1, *shape), device=device))
        """What one row gives; also on a rank that computes none."""

    def measure(
        self, forward: Callable[[IndexArray, int], torch.Tensor], worker: Worker, *, same_passes: bool
    ) -> dict[str, float]:
        """val_loss and the task's metrics. `forward(rows, chunk)` gives float32 (rows, *output_shape).

        `same_passes`: all ranks make the same number of forward passes, as sharded parameters need it.
        """
        num_rows, num_chunks = len(self._targets), len(self._chunks)
        width = self._prediction[0].numel()
        found = torch.zeros(num_chunks + num_rows * width, dtype=torch.float64, device=self._device)
        losses, predictions = found[:num_chunks], found[num_chunks:].view(num_rows, width)
        for chunk in range(worker.rank, num_chunks, worker.world_size):
            rows = self._chunks[chunk]
            place = slice(int(rows[0]), int(rows[-1]) + 1)
            outputs = forward(rows, chunk)
            losses[chunk] = validation_losses(self._task, outputs, self._targets[place]).double().sum()
            predictions[place] = self._task.predict(outputs).reshape(len(rows), width).double()
        if same_passes and worker.rank >= num_chunks % worker.world_size > 0:
            forward(self._chunks[0][:1], 0)
        if worker.world_size > 1:
            dist.all_reduce(found)
        val_loss = float(losses.sum()) / num_rows
        return {"val_loss": val_loss, **metrics_of_loss(self._task, val_loss), **self._compute(predictions)}

    def _compute(self, predictions: torch.Tensor) -> dict[str, float]:
        shaped = predictions.to(self._prediction.dtype).reshape(-1, *self._prediction.shape[1:])
        self._metrics.reset()
        self._metrics.update(shaped, self._targets)
        return {name: float(value) for name, value in self._metrics.compute().items()}
