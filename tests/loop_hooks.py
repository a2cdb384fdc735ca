"""What the training loop asks of its process, for tests: remembers all it is told and saves or stops where asked to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from bigray.training.checkpoint import Checkpoint, Snapshot, SnapshotBuffers
from bigray.training.commands import Wish
from bigray.training.tensor_files import pack_tensors


class RecordingHooks:
    def __init__(
        self, save_at: Collection[int] = (), stop_at: Collection[int] = (), rest_at: Collection[int] = ()
    ) -> None:
        self.save_at, self.stop_at, self.rest_at = save_at, stop_at, rest_at
        self.reports: list[dict[str, Any]] = []
        self.checkpoints: list[Checkpoint] = []
        self.warnings: list[str] = []
        self.phases: list[str] = []

    def tick(self, phase: str) -> None:
        self.phases.append(phase)

    def exchange(self, step: int) -> Wish:
        return Wish(save=step in self.save_at, stop=step in self.stop_at, rest=step in self.rest_at)

    def on_epoch(self, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def on_checkpoint(self, take: Callable[[SnapshotBuffers], Snapshot]) -> None:
        self.checkpoints.append(to_checkpoint(take(SnapshotBuffers())))

    def restore_last(self) -> Checkpoint | None:
        return self.checkpoints[-1] if self.checkpoints else None

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def to_checkpoint(snapshot: Snapshot) -> Checkpoint:
    """A snapshot as it is read back from storage."""
    return Checkpoint(
        snapshot.progress, {f"{stem}.safetensors": pack_tensors(state) for stem, state in snapshot.tensors.items()}
    )
