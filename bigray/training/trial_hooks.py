"""What surrounds a trial in a worker's memory: its place in the command, its checkpoints, its reports (worker)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from bigray.errors import BigrayError, TrainingFailed
from bigray.specs import TrialSpec
from bigray.training.checkpoint import (
    Checkpoint,
    Progress,
    Snapshot,
    SnapshotBuffers,
    load_epoch_end,
    load_to_go_on,
)
from bigray.training.commands import Event, TakeOver, Wish
from bigray.training.consensus import Consensus
from bigray.training.context import LoopTraining
from bigray.training.heartbeat import Heartbeat
from bigray.training.loop import TrialTraining, Worker
from bigray.training.saver import CheckpointSaver
from bigray.training.setup import GroupSetup
from bigray.training.stopwatch import Stopwatch


class Generation(Protocol):
    """What the hooks need of the generation that their trial is trained in (`worker._CommandLoop`)."""

    setup: GroupSetup
    worker: Worker
    control: Any
    heartbeat: Heartbeat
    stopwatch: Stopwatch

    @property
    def is_first(self) -> bool: ...

    def from_rank_0(self, make: Callable[[], Any]) -> Any: ...

    def push(self, kind: str, trial: TrialSpec, values: dict[str, Any]) -> None: ...

    def push_own(self, event: Event) -> None: ...


class TrainingHooks:
    """Of any training in this process, of one trial or of a stack: heartbeat, stopwatch, agreement with the others."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self.was_stopped = False
        self._consensus = Consensus(generation.worker.world_size, generation.control, self._own_wish)

    def tick(self, phase: str) -> None:
        self._generation.heartbeat.tick(phase)
        self._generation.stopwatch.mark(phase)

    def exchange(self, step: int) -> Wish:
        wish = self._consensus.at_step()
        self.was_stopped = self.was_stopped or wish.stop
        return wish

    def _own_wish(self) -> Wish:
        """What this rank knows of."""
        asked = self._generation.heartbeat.wish
        return Wish(save=asked.save, stop=asked.stop, rest=asked.rest)


class TrialHooks(TrainingHooks):
    """The training loop's side of one generation: also checkpoints and reports."""

    def __init__(self, generation: Generation, trial: TrialSpec) -> None:
        super().__init__(generation)
        self._trial = trial
        setup = generation.setup
        self.saver = CheckpointSaver(setup.paths, trial, setup.attempt, self._report_saved)
        self.saved: Progress | None = None
        """Progress of the newest checkpoint on storage, or on its way there."""
        self._saved_at = time.monotonic()

    def on_epoch(self, report: dict[str, Any]) -> None:
        self._generation.push("epoch", self._trial, report)

    def on_checkpoint(self, take: Callable[[SnapshotBuffers], Snapshot]) -> None:
        def take_and_note(buffers: SnapshotBuffers) -> Snapshot:
            snapshot = take(buffers)
            self.saved = snapshot.progress
            return snapshot

        self.saver.submit(take_and_note)
        self._saved_at = time.monotonic()

    def restore_last(self) -> Checkpoint | None:
        if self._generation.is_first:
            self.saver.wait()
        paths = self._generation.setup.paths
        checkpoint: Checkpoint | None = self._generation.from_rank_0(
            lambda: load_to_go_on(paths, self._trial, warn=self.warn)
        )
        if checkpoint is not None:
            self.saved = checkpoint.progress
            self.saver.go_on_from(checkpoint.progress.step)
        return checkpoint

    def warn(self, text: str) -> None:
        self._generation.push("warning", self._trial, {"text": text})

    def _own_wish(self) -> Wish:
        """Also, on rank 0, that a checkpoint is due."""
        asked = super()._own_wish()
        every_s = self._trial.training.checkpoint_every_s
        is_due = self._generation.is_first and time.monotonic() - self._saved_at >= every_s
        return replace(asked, save=asked.save or (is_due and self.saver.has_room()))

    def _report_saved(self, step: int) -> None:
        self._generation.push("checkpoint", self._trial, {"step": step})


class StackHooks(TrainingHooks):
    """Of a stack: each rank reports the lanes it has, and commits them at the end of an epoch where there is a wish.

    The ranks of a stack have nothing to do together, and may differ in steps: each follows what it is asked itself.
    """

    def __init__(self, generation: Generation, lanes: Sequence[TrialSpec]) -> None:
        super().__init__(generation)
        self.lanes = tuple(lanes)
        """In the order in which the training numbers them."""
        self.is_resting = False
        self._every_s = min(trial.training.checkpoint_every_s for trial in lanes)
        self._saved_at = time.monotonic()

    @property
    def must_end(self) -> bool:
        """Whether this rank was asked to end before the command is done."""
        return self.was_stopped or self.is_resting

    def exchange(self, step: int) -> Wish:
        """A stack stops and is committed at the end of an epoch alone: its epochs are short."""
        asked = self._own_wish()
        self.was_stopped = self.was_stopped or asked.stop
        self.is_resting = self.is_resting or asked.rest
        return Wish(rest=self.must_end or time.monotonic() - self._saved_at >= self._every_s)

    def note_saved(self) -> None:
        """The lanes were committed."""
        self._saved_at = time.monotonic()

    def on_epoch(self, lane: int, report: dict[str, Any]) -> None:
        self._generation.push_own(Event("epoch", self.lanes[lane].trial_id, report))

    def warn(self, trial: TrialSpec, text: str) -> None:
        self._generation.push_own(Event("warning", trial.trial_id, {"text": text}))


class LiveTrial:
    """A trial in this process's memory, with the thread that writes its checkpoints."""

    def __init__(self, asked: TrialSpec, training: TrialTraining | LoopTraining, hooks: TrialHooks) -> None:
        self.asked, self.training, self.hooks = asked, training, hooks
        """`asked`: the trial as it was commanded; in `training.trial` an "auto" batch size is a number."""

    def settle(self) -> None:
        """Let the checkpoint under way be committed: who goes on looks for the newest."""
        with contextlib.suppress(BigrayError):  # told already, or the next save tells
            self.hooks.saver.wait()

    def end(self) -> None:
        """End the thread."""
        self.hooks.saver.close()


def source_of(generation: Generation, take_over: TakeOver) -> Checkpoint:
    """The checkpoint that a trial begins from in the place of its own, on every rank; collective.

    It is there as long as its trial has trained no more than one command further: `CheckpointSaver` keeps the
    checkpoint that a command began from until that command's end.

    Raises:
        TrainingFailed: on every rank: it is not there.
    """
    paths = generation.setup.paths

    def load() -> Checkpoint | TrainingFailed:
        try:
            return load_epoch_end(paths, take_over.source, take_over.epoch)
        except TrainingFailed as error:
            return error

    found = generation.from_rank_0(load)
    if isinstance(found, TrainingFailed):
        raise found
    checkpoint: Checkpoint = found
    return checkpoint


def taken_over(progress: Progress, trial: TrialSpec, steps_per_epoch: int | None) -> Progress:
    """Where a trial stands that takes over another's state at the end of an epoch. Pure.

    Its past is the other's: epochs, metrics, best. Its steps are counted as with its own batch size all along, so that
    its schedule goes on at the same epoch; and what roll-backs left of the other's rate is not its own.
    `steps_per_epoch`: of this trial; None leaves the steps as they are.
    """
    ended = "finished" if progress.epoch >= trial.training.epochs else None
    progress = replace(progress, ended=ended, rollbacks=0, lr_scale=1.0)
    if steps_per_epoch is None or progress.step == progress.epoch * steps_per_epoch:
        return progress
    step, best_step = progress.epoch * steps_per_epoch, progress.best_epoch * steps_per_epoch
    moved: Progress = replace(progress, step=step, best_step=best_step)
    return moved
