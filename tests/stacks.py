"""Stacks on storage, as a rank of a group commits them."""

from __future__ import annotations

from bigray.paths import RunPaths
from bigray.training.stack import StackedTraining
from bigray.training.stack_checkpoint import lanes_of, save_lanes


def save_stack(paths: RunPaths, name: str, rank: int, attempt: int, training: StackedTraining) -> None:
    """Commit all lanes of a training."""
    save_lanes(paths, name, (rank, training.worker.world_size), attempt, lanes_of(training))
