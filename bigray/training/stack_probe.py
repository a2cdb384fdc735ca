"""How long a step of a trial takes alone and in a stack: real steps, of a training that nobody keeps (worker)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bigray.data.dataset import TrainingArrays
from bigray.specs import TrialSpec
from bigray.training.checkpoint import Checkpoint, Snapshot, SnapshotBuffers
from bigray.training.commands import Wish
from bigray.training.loop import TrialTraining, Worker
from bigray.training.stack import StackedTraining

_BLOCK_S = 0.03
"""Of a block of steps that is timed; the fastest of `_BLOCKS` counts, for other processes only ever add to it."""
_BLOCKS = 4
_LONG_S = 0.1
"""A step that takes this long is timed twice, no more."""
MOST_ALONE_S, MOST_STACKED_S = 0.2, 0.5
"""A step that takes longer than this is taken once: the model is too large for a stack to be worth a longer look."""
_MOST_STEPS = 500
_NO_END = 2**31


def time_steps_alone(trial: TrialSpec, data: TrainingArrays, num_outputs: int, worker: Worker) -> float:
    """Seconds of one optimizer step by all ranks together. Collective."""
    hooks = _ProbeHooks()
    training = TrialTraining(_endless(trial), data, num_outputs, worker, hooks)
    return _fastest(lambda: training.train_to(_NO_END), hooks, worker, MOST_ALONE_S)


def time_steps_stacked(
    trial: TrialSpec, data: TrainingArrays, num_outputs: int, worker: Worker, num_lanes: int
) -> float:
    """Seconds of one step of `num_lanes` lanes dealt out to the ranks, over their number: beside that of one alone.

    Every rank calls it at the same time, as they would train; rank 0, which has no fewer lanes than any, tells.
    """
    hooks = _ProbeHooks()
    own_lanes = max(1, len(range(worker.rank, num_lanes, worker.world_size)))
    lanes = [_endless(trial)] * own_lanes
    training = StackedTraining(lanes, data, num_outputs, worker, hooks)
    return _fastest(lambda: training.train_to(_NO_END), hooks, worker, MOST_STACKED_S) / num_lanes


class _ProbeHooks:
    """Stops after as many steps as it is told; of both kinds of training."""

    def __init__(self) -> None:
        self.left = 0

    def tick(self, phase: str) -> None: ...

    def exchange(self, step: int) -> Wish:
        self.left -= 1
        return Wish(stop=self.left <= 0)

    def on_epoch(self, *_: Any) -> None: ...

    def on_checkpoint(self, take: Callable[[SnapshotBuffers], Snapshot]) -> None: ...

    def restore_last(self) -> Checkpoint | None:
        return None

    def warn(self, text: str) -> None: ...


def _endless(trial: TrialSpec) -> TrialSpec:
    """The same steps, at a rate at which none diverges, without validation between them."""
    rest = {"epochs": _NO_END, "val_every": _NO_END, "patience": None, "lr": 1e-9, "lr_scaling": "none"}
    return trial.model_copy(update={"training": trial.training.model_copy(update={**rest, "lr_batch_size": None})})


def _fastest(train: Callable[[], object], hooks: _ProbeHooks, worker: Worker, most_s: float) -> float:
    """Seconds of one step. How many are taken is rank 0's to say: the ranks stop at the same one."""
    first_s = _time(train, hooks, 1)
    if _of_rank_0([first_s > most_s], worker)[0]:
        return first_s
    first_s = _time(train, hooks, 1)  # the one before allocated
    steps = max(1, min(_MOST_STEPS, int(_BLOCK_S / first_s)))
    blocks = 0 if first_s > _LONG_S else _BLOCKS
    steps, blocks = _of_rank_0([steps, blocks], worker)
    if not blocks:
        return first_s
    return min(_time(train, hooks, steps) / steps for _ in range(blocks))


def _time(train: Callable[[], object], hooks: _ProbeHooks, steps: int) -> float:
    hooks.left = steps
    started = time.perf_counter()
    train()
    return time.perf_counter() - started


def _of_rank_0(numbers: list[int], worker: Worker) -> list[int]:
    if worker.world_size == 1:
        return numbers
    agreed = torch.tensor(numbers, device=worker.device)
    dist.broadcast(agreed, src=0)
    found: list[int] = agreed.tolist()
    return found
