"""What a worker process does: take a seat in a generation of its group, carry out commands, and come back for the next.

The loop of commands never leaves the process: modules stay imported, the data stays mapped, and a lost peer costs the
milliseconds of another process group.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError

from bigray.data.dataset import TrainingArrays
from bigray.errors import BigrayError, StorageError, TrainingFailed
from bigray.specs import TrialSpec
from bigray.training.allocator import keep_freed_memory
from bigray.training.batch_finder import resolve_batch_size
from bigray.training.checkpoint import Checkpoint, Progress, Snapshot, SnapshotBuffers, load_checkpoint
from bigray.training.commands import Command, Event, ExportBundle, Stop, TrainTo, Wish
from bigray.training.consensus import Consensus
from bigray.training.context import LoopTraining, make_training
from bigray.training.export import export_bundle
from bigray.training.heartbeat import Heartbeat
from bigray.training.loop import TrialTraining, Worker
from bigray.training.membership import Member, Place
from bigray.training.process_group import Address, broadcast_object, process_group
from bigray.training.reporting import Reporter
from bigray.training.saver import CheckpointSaver
from bigray.training.setup import GroupSetup
from bigray.training.switchboard import ask
from bigray.training.tensor_files import pack_tensors

REJOIN_PAUSE_S = 0.1
"""After a process group that could not be formed."""


class GenerationBroken(Exception):
    """This generation of the group cannot go on; the process is fine."""


def run_worker(config: dict[str, Any]) -> None:
    """Entry point of one worker process (`train_loop_per_worker`): serve its group until the run is over."""
    import ray.train
    import ray.train.torch

    setup: GroupSetup = config["setup"]
    context = ray.train.get_context()
    slot, num_slots = context.get_world_rank(), context.get_world_size()
    _serve(setup, setup.group, _this_process(slot, num_slots), ray.train.torch.get_device())


class SpareWorker:
    """Ray actor: an idle process with everything imported, which takes the seat of a worker that died (CPU only)."""

    def serve(self, setup: GroupSetup) -> None:
        """Wait for a seat in any group, and serve there; returns when the run is over."""
        _serve(setup, None, _this_process(None, 0), torch.device("cpu"))


def _import_what_is_imported_late() -> None:
    """Metrics, and what the first step of an optimizer imports: two seconds that a replacement must not cost."""
    import torchmetrics.classification
    import torchmetrics.regression  # noqa: F401

    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter], fused=True).step()


def _this_process(slot: int | None, num_slots: int) -> Member:
    node_id = ray.get_runtime_context().get_node_id()
    return Member(node_id, ray.util.get_node_ip_address(), os.getpid(), slot, num_slots)


def _serve(setup: GroupSetup, group: int | None, member: Member, device: torch.device) -> None:
    """Sit in one generation after another until the run is over.

    Raises:
        Preempted: this process's node is about to go away; Ray Train then starts another.
    """
    keep_freed_memory()
    torch.set_num_threads(setup.threads_per_worker)
    # DDP warns once for every process about matters of ours that are deliberate; errors still raise
    logging.getLogger("torch").setLevel(logging.ERROR)
    _import_what_is_imported_late()
    process = _Process(setup, member, device)
    try:
        while (seat := process.take_seat(group)) is not None:
            process.sit(*seat)
    except RayActorError:  # the switchboard is gone: the run is over
        return
    finally:
        process.close()


class _Process:
    """What outlives a generation: the mapped data, the live trial, and what runs beside the training thread."""

    def __init__(self, setup: GroupSetup, member: Member, device: torch.device) -> None:
        self.setup, self.member, self.device = setup, member, device
        self.board = setup.switchboard
        self.data: TrainingArrays = ray.get(setup.data)
        self.reporter = Reporter(lambda events: ray.get(self.board.push_all.remote(events)))
        self.live: LiveTrial | None = None

    def take_seat(self, group: int | None) -> tuple[int, Place] | None:
        """Wait for a seat; None where the run is over."""
        seat: tuple[int, Place] | None = ask(self.board.join.remote(group, self.member))
        return seat

    def sit(self, group: int, place: Place) -> None:
        """Form the process group of a generation and carry out commands until the generation or the run ends."""
        setup = replace(self.setup, group=group)
        worker = Worker(place.rank, place.world_size, self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            with process_group(place, backend, self._publisher(group, place), self._looker(group, place)) as hang_up:
                self._carry_out_commands(setup, worker, place, hang_up)
        except GenerationBroken:
            pass
        except (dist.DistError, RuntimeError) as error:
            if not is_about_a_peer(error):
                raise
            time.sleep(REJOIN_PAUSE_S)

    def _carry_out_commands(self, setup: GroupSetup, worker: Worker, place: Place, hang_up: Callable[[], None]) -> None:
        heartbeat = Heartbeat(self.board, setup.group, self.member, hang_up)
        try:
            _CommandLoop(self, setup, worker, place, heartbeat).run()
        finally:
            if self.live is not None:
                self.live.settle()
            heartbeat.end()  # not before the checkpoint is written: a rank that is not heard is given up

    def forget(self) -> None:
        """Let go of the trial in memory."""
        if self.live is not None:
            self.live.end()
        self.live = None

    def close(self) -> None:
        """End the threads."""
        self.forget()
        with contextlib.suppress(ray.exceptions.RayError):
            self.reporter.close()

    def _publisher(self, group: int, place: Place) -> Callable[[Address], None]:
        return lambda address: ray.get(self.board.publish.remote(group, place.generation, address))

    def _looker(self, group: int, place: Place) -> Callable[[], Address]:
        def look_up() -> Address:
            address: Address | None = ray.get(self.board.look_up.remote(group, place.generation))
            if address is None:
                raise GenerationBroken
            return address

        return look_up


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


class TrialHooks:
    """The training loop's side of one generation: heartbeat, agreement with the other ranks, checkpoints, reports."""

    def __init__(self, loop: _CommandLoop, trial: TrialSpec) -> None:
        self._loop, self._trial = loop, trial
        self.saver = CheckpointSaver(loop.setup.paths, trial, loop.setup.attempt, self._report_saved)
        self.saved: Progress | None = None
        """Progress of the newest checkpoint on storage, or on its way there."""
        self.was_stopped = False
        self._consensus = Consensus(loop.worker.world_size, loop.control, self._own_wish)
        self._saved_at = time.monotonic()

    def tick(self, phase: str) -> None:
        self._loop.heartbeat.tick(phase)

    def exchange(self, step: int) -> Wish:
        wish = self._consensus.at_step()
        self.was_stopped = self.was_stopped or wish.stop
        return wish

    def on_epoch(self, report: dict[str, Any]) -> None:
        self._loop.push("epoch", self._trial, report)

    def on_checkpoint(self, take: Callable[[SnapshotBuffers], Snapshot]) -> None:
        def take_and_note(buffers: SnapshotBuffers) -> Snapshot:
            snapshot = take(buffers)
            self.saved = snapshot.progress
            return snapshot

        self.saver.submit(take_and_note)
        self._saved_at = time.monotonic()

    def restore_last(self) -> Checkpoint | None:
        if self._loop.is_first:
            self.saver.wait()
        checkpoint: Checkpoint | None = self._loop.from_rank_0(
            lambda: load_checkpoint(self._loop.setup.paths, self._trial, warn=self.warn)
        )
        if checkpoint is not None:
            self.saved = checkpoint.progress
            self.saver.go_on_from(checkpoint.progress.step)
        return checkpoint

    def warn(self, text: str) -> None:
        self._loop.push("warning", self._trial, {"text": text})

    def _own_wish(self) -> Wish:
        """What this rank knows of: what the switchboard asks for, and on rank 0 that a checkpoint is due."""
        asked = self._loop.heartbeat.wish
        is_due = self._loop.is_first and time.monotonic() - self._saved_at >= self._trial.training.checkpoint_every_s
        return Wish(save=asked.save or (is_due and self.saver.has_room()), stop=asked.stop)

    def _report_saved(self, step: int) -> None:
        self._loop.push("checkpoint", self._trial, {"step": step})


class _CommandLoop:
    """The commands of one generation, on one rank."""

    def __init__(
        self, process: _Process, setup: GroupSetup, worker: Worker, place: Place, heartbeat: Heartbeat
    ) -> None:
        self.setup, self.worker = setup, worker
        self.is_first = worker.rank == 0
        # control messages are Python objects: they go over gloo even where the gradients go over NCCL
        self.control = dist.new_group(backend="gloo") if worker.device.type == "cuda" else None
        self.heartbeat = heartbeat
        self._process, self._place, self._board = process, place, setup.switchboard
        self._is_new = True
        """No trial was trained in this generation yet: what is in memory is of the one before."""

    def run(self) -> None:
        """Carry out commands until the run is over.

        Raises:
            GenerationBroken: a command failed on this rank or a peer, or the group was asked to leave its seats.
        """
        while True:
            assigned = self.from_rank_0(self._next_command)
            if assigned is None:
                continue
            serial, command = assigned
            if isinstance(command, Stop):
                return
            self._carry_out(serial, command)

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 and give its result to every rank."""
        return broadcast_object(make() if self.is_first else None, 0, self.worker.world_size, self.control)

    def push(self, kind: str, trial: TrialSpec, values: dict[str, Any]) -> None:
        """Report from rank 0; never waits."""
        if self.is_first:
            self._process.reporter.push(Event(kind, trial.trial_id, values))

    def _next_command(self) -> tuple[int, Command] | None:
        """Wait for the next command (rank 0). Without a switchboard the run is over, and nobody will send one."""
        try:
            generation = self._place.generation
            command: tuple[int, Command] | None = ray.get(self._board.next_command.remote(self.setup.group, generation))
        except RayActorError:
            return (0, Stop())
        return command

    def _carry_out(self, serial: int, command: TrainTo | ExportBundle) -> None:
        try:
            result = self._train(command) if isinstance(command, TrainTo) else self._export(command)
            self.heartbeat.tick("idle")
            self._process.reporter.flush()
        except GenerationBroken:
            raise
        except Exception as error:
            if not is_about_a_peer(error):  # a peer's own story is the one to tell
                self._process.forget()
                ray.get(self._board.fail.remote(self.setup.group, serial, _as_failure(error)))
            raise GenerationBroken from None
        if self.is_first:
            ray.get(self._board.complete.remote(self.setup.group, serial, result))

    def _train(self, command: TrainTo) -> Any:
        live = self._live_trial(command.trial)
        training, hooks = live.training, live.hooks
        training.train_to(command.epoch)
        if training.progress != hooks.saved and (self.is_first or command.trial.training.strategy == "fsdp"):
            hooks.on_checkpoint(training.snapshot)
        hooks.saver.wait()
        if hooks.was_stopped:
            if self.is_first:
                self._process.reporter.flush()
                ray.get(self._board.yielded.remote(self.setup.group))
            raise GenerationBroken
        return training.progress.to_state()

    def _live_trial(self, trial: TrialSpec) -> LiveTrial:
        """This trial in memory: still there from the command before, gone on with after a loss, or loaded."""
        is_new, self._is_new = self._is_new, False
        live = self._process.live
        if live is not None and live.asked == trial and not is_new:
            return live
        self.heartbeat.tick("loading")
        survivor = live.training if live is not None and live.asked == trial else None
        self._process.forget()  # let the previous trial's memory go before the next one takes its own
        hooks = TrialHooks(self, trial)
        live = LiveTrial(trial, self._recovered(trial, survivor, hooks), hooks)
        self._process.live = live
        return live

    def _recovered(
        self, trial: TrialSpec, survivor: TrialTraining | LoopTraining | None, hooks: TrialHooks
    ) -> TrialTraining | LoopTraining:
        """The trial brought to where it was: from a survivor's memory where that is sound, else from storage."""
        source = self._source(survivor)
        resolved = self._with_batch_size(trial)  # every rank takes part
        if source is None or survivor is None:
            training = make_training(resolved, self._process.data, self.setup.num_outputs, self.worker, hooks)
        else:
            training = survivor
            training.hooks = hooks
            training.rebuild(self.worker)
        checkpoint = hooks.restore_last() if source is None else self._state_of(source, training)
        if checkpoint is not None:
            training.restore(checkpoint)
            progress = training.progress
            values = {"epoch": progress.epoch, "step": progress.step, "ended": progress.ended}
            self.push("resumed", trial, {**values, "from": "storage" if source is None else "memory"})
        return training

    def _with_batch_size(self, trial: TrialSpec) -> TrialSpec:
        return resolve_batch_size(
            trial, self._process.data, self.setup.num_outputs, self.worker, self.setup.paths, self.from_rank_0
        )

    def _source(self, survivor: TrialTraining | LoopTraining | None) -> int | None:
        """The rank whose memory the others copy: the furthest; None where nobody's is both sound and complete."""
        mine = None if survivor is None else recoverable_step(survivor)
        if self.worker.world_size == 1:
            return None if mine is None else 0
        steps: list[int | None] = [None] * self.worker.world_size
        dist.all_gather_object(steps, mine, group=self.control)
        known = [step for step in steps if step is not None]
        return steps.index(max(known)) if known else None

    def _state_of(self, source: int, training: TrialTraining | LoopTraining) -> Checkpoint:
        mine = to_checkpoint(training.snapshot(SnapshotBuffers())) if self.worker.rank == source else None
        state: Checkpoint = broadcast_object(mine, source, self.worker.world_size, self.control)
        return state

    def _export(self, command: ExportBundle) -> Any:
        if not self.is_first:
            return None
        self.heartbeat.tick("export")
        exported = export_bundle(self.setup.paths, command.trial, command.manifest, self._process.data.x_val)
        if exported.why_no_onnx:
            text = f"no model.onnx, the endpoint will load the factory: {exported.why_no_onnx}"
            self.push("warning", command.trial, {"text": text})
        return exported


def recoverable_step(training: TrialTraining | LoopTraining) -> int | None:
    """The step up to which this process's memory of a trial is whole after a loss; None where it may not be.

    A step cut short leaves parameters and optimizer as they were, but not buffers such as batch norm's. The weights of
    the best epoch are with rank 0 alone.
    """
    if isinstance(training, LoopTraining) or training.has_buffers:
        return None
    if training.progress.best_metrics and training.best_weights is None:
        return None
    return training.progress.step


def to_checkpoint(snapshot: Snapshot) -> Checkpoint:
    """A snapshot as it would be read back from storage, for a peer."""
    files = {f"{stem}.safetensors": pack_tensors(tensors) for stem, tensors in snapshot.tensors.items()}
    return Checkpoint(snapshot.progress, files)


def is_about_a_peer(error: Exception) -> bool:
    """Whether a collective broke because another rank went away: that rank's own story is the one to tell, if any.

    Gloo raises a plain RuntimeError for it, which only its text gives away.
    """
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo/transport", "NCCL"))


def _as_failure(error: Exception) -> BigrayError:
    """The error as the driver is to raise it: bigray's own as they are, others in one line with the user's place."""
    if isinstance(error, StorageError):
        return error
    return TrainingFailed(_describe(error))


def _describe(error: Exception) -> str:
    """The error in one line, with the place in the user's code where there is one."""
    if isinstance(error, BigrayError):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}{place}"
