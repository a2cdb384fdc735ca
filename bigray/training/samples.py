"""Which training rows took part in an epoch: counted where they are loaded, so that "lost 0, repeated 0" is measured.

Each rank counts the rows it loads itself. Summed over the ranks, every row of a complete epoch must have the count 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bigray.data.batches import IndexArray

if TYPE_CHECKING:
    from bigray.training.loop import Worker

Counts = NDArray[np.uint8]
_LOADS_AT_ONCE = 256
"""Counted together: a tenth of the time."""


class SampleLedger:
    """How often this rank has loaded each training row in this epoch, for steps that were taken: a byte a row."""

    def __init__(self, num_rows: int) -> None:
        self._counts: Counts = np.zeros(num_rows, dtype=np.uint8)
        self._loaded: list[IndexArray] = []
        self._taken: list[IndexArray] = []

    def load(self, rows: IndexArray) -> None:
        """Rows were loaded for the step that is being computed."""
        self._loaded.append(rows)

    def commit(self) -> None:
        """The step was taken, or a scaler has skipped it: its rows count."""
        self._taken += self._loaded
        self._loaded.clear()
        if len(self._taken) >= _LOADS_AT_ONCE:
            self._count()

    def discard(self) -> None:
        """The step will be computed again, or never: its rows do not count."""
        self._loaded.clear()

    def reset(self, counts: Counts | None = None) -> None:
        """Begin an epoch, or go on from the counts of its first steps."""
        self._loaded.clear()
        self._taken.clear()
        self._counts[:] = 0 if counts is None else counts

    def total(self, worker: Worker) -> Counts:
        """The counts of all ranks together, on each of them; one collective, this rank's own counts stay."""
        self._count()
        total = torch.from_numpy(self._counts.copy())
        if worker.world_size > 1:
            total = total.to(worker.device)
            dist.all_reduce(total)
        counts: Counts = total.cpu().numpy()
        return counts

    def _count(self) -> None:
        if self._taken:
            np.add.at(self._counts, np.concatenate(self._taken), 1)  # a row that is there twice counts twice
            self._taken.clear()


def lost_and_repeated(total: Counts) -> tuple[int, int]:
    """Rows of a complete epoch that took part in no step, and times that rows took part again."""
    lost = int(np.count_nonzero(total == 0))
    return lost, int(total.sum(dtype=np.int64)) - (len(total) - lost)
