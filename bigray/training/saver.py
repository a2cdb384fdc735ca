"""Asynchronous checkpoints: the training loop is held up by a copy in memory, a thread writes (worker).

At most two snapshots are in memory: one being written and one waiting. Their memory is used again and again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection

from bigray.errors import DiskFull
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.training.checkpoint import Snapshot, SnapshotBuffers, committed_steps
from bigray.training.checkpoint_writer import free_oldest, save_snapshot

MAX_SNAPSHOTS = 2


class CheckpointSaver:
    """Writes the checkpoints of one trial in one thread, in the order they are submitted.

    Runs in the process that writes: rank 0, with fsdp every rank. All methods but the callback belong to one thread,
    the training loop's. `on_saved` gets the step of each checkpoint once it is committed, in the saver's thread.
    A write that fails is raised by the next `submit` or `wait`, once; what was still waiting behind it is given up.
    """

    def __init__(self, paths: RunPaths, trial: TrialSpec, attempt: int, on_saved: Callable[[int], None]) -> None:
        self._paths, self._trial, self._attempt, self._on_saved = paths, trial, attempt, on_saved
        self._resumed_from: int | None = None
        self._kept: int | None = None
        self._since_kept: list[int] = []
        """Steps saved since, oldest first (the saver's thread)."""
        self._free: queue.SimpleQueue[SnapshotBuffers] = queue.SimpleQueue()
        for _ in range(MAX_SNAPSHOTS):
            self._free.put(SnapshotBuffers())
        self._waiting: queue.Queue[tuple[Snapshot, SnapshotBuffers] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def go_on_from(self, step: int) -> None:
        """Tell which checkpoint was loaded: newer ones are damaged, and not counted among those to keep (no write is
        under way)."""
        self._resumed_from = step

    def keep(self, step: int | None) -> None:
        """Keep the checkpoint of this step as one of `keep.last` until the next such call.

        What is saved in between makes room for itself (`TrainTo.keep_begin`).
        """
        self._kept, self._since_kept = step, []

    def has_room(self) -> bool:
        """False while two snapshots are in memory: a timed checkpoint is then left out rather than waited for."""
        return not self._free.empty()

    def submit(self, take: Callable[[SnapshotBuffers], Snapshot]) -> None:
        """Wait for room, take the snapshot, and return: the copy is all that holds up the caller, given room.

        Raises:
            DiskFull: an earlier one could not be written, even after the oldest checkpoint had been given up.
            StorageError: an earlier one could not be written.
        """
        buffers = self._free.get()
        try:
            self._raise_error()
            snapshot = take(buffers)
        except BaseException:
            self._free.put(buffers)
            raise
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="checkpoint-saver", daemon=True)
            self._thread.start()
        self._waiting.put((snapshot, buffers))

    def wait(self) -> None:
        """Until everything submitted is committed.

        Raises:
            StorageError: as for `submit`.
        """
        self._waiting.join()
        self._raise_error()

    def close(self) -> None:
        """End the thread once what was submitted is written. Raises nothing: call `wait` before to learn of errors."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            snapshot, buffers = item
            try:
                if self._error is None:
                    self._write(snapshot)
            except BaseException as error:  # whatever it is, the loop has to hear of it
                self._error = error
            finally:
                self._free.put(buffers)
                self._waiting.task_done()
        self._waiting.task_done()

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.progress.step
        stale = [*self._steps_gone_back_behind(), *self._to_make_room(step)]
        try:
            save_snapshot(self._paths, self._trial, self._attempt, snapshot, stale)
        except DiskFull:
            if snapshot.shard is not None or not free_oldest(self._paths, self._trial):
                raise
            save_snapshot(self._paths, self._trial, self._attempt, snapshot, stale)
        self._resumed_from = None
        self._since_kept.append(step)
        if snapshot.shard is None or snapshot.shard.rank == 0:
            self._on_saved(snapshot.progress.step)

    def _steps_gone_back_behind(self) -> Collection[int]:
        """At the first save since `go_on_from`: all that is committed and newer."""
        if self._resumed_from is None:
            return ()
        return [step for step in committed_steps(self._paths, self._trial.trial_id) if step > self._resumed_from]

    def _to_make_room(self, step: int) -> list[int]:
        """Saved since the checkpoint that is kept, and not among the newest any more once `step` is."""
        if self._kept is None or self._kept == step:
            return []
        num_newer = max(1, self._trial.training.keep.last - 1)
        return [earlier for earlier in self._since_kept if earlier not in (self._kept, step)][: 1 - num_newer or None]
