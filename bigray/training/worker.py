"""The command loop that every worker of a group runs inside Ray Train.

Rank 0 takes a command from the switchboard and broadcasts it; all ranks carry it out; rank 0 pushes what happened. The
process group and the imports stay; the trial's module, optimizer and random state are made anew for each trial.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError

from bigray.data.dataset import TrainingArrays
from bigray.errors import BigrayError
from bigray.training.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from bigray.training.commands import Command, Event, ExportBundle, Stop, TrainTo
from bigray.training.export import export_bundle
from bigray.training.loop import TrialTraining, Worker
from bigray.training.setup import GroupSetup


def run_worker(config: dict[str, Any]) -> None:
    """Entry point of one worker process (`train_loop_per_worker`): carry out commands until `Stop`."""
    setup: GroupSetup = config["setup"]
    torch.set_num_threads(setup.threads_per_worker)
    # DDP warns once for every process about matters of ours that are deliberate; errors still raise
    logging.getLogger("torch").setLevel(logging.ERROR)
    commands = _CommandLoop(setup, _this_worker())
    commands.run()


class _CommandLoop:
    def __init__(self, setup: GroupSetup, worker: Worker) -> None:
        self._setup, self._worker = setup, worker
        self._is_first = worker.rank == 0
        self._data: TrainingArrays = ray.get(setup.data)
        self._training: TrialTraining | None = None
        self._saved: Progress | None = None
        """Progress of the newest checkpoint on storage."""
        # control messages are Python objects: they go over gloo even where the gradients go over NCCL
        self._control = dist.new_group(backend="gloo") if worker.device.type == "cuda" else None

    def run(self) -> None:
        board = self._setup.switchboard
        while True:
            assigned = self._from_rank_0(self._next_command)
            if assigned is None:
                continue
            serial, command = assigned
            if isinstance(command, Stop):
                return
            try:
                result = self._train(command) if isinstance(command, TrainTo) else self._export(command)
            except Exception as error:
                # told before it is raised: the restarted workers then do not try the same command again
                if not _is_about_a_peer(error):
                    ray.get(board.fail.remote(self._setup.group, serial, _describe(error)))
                raise
            if self._is_first:
                ray.get(board.complete.remote(self._setup.group, serial, result))

    def _next_command(self) -> tuple[int, Command] | None:
        """Wait for the next command (rank 0). Without a switchboard the run is over, and nobody will send one."""
        try:
            command: tuple[int, Command] | None = ray.get(
                self._setup.switchboard.next_command.remote(self._setup.group)
            )
        except RayActorError:
            return (0, Stop())
        return command

    def _train(self, command: TrainTo) -> Any:
        training = self._training_of(command)
        self._saved = training.progress
        training.train_to(
            command.epoch,
            on_epoch=lambda report: self._push("epoch", command, report),
            on_checkpoint=lambda checkpoint: self._save(command, checkpoint),
        )
        if self._is_first and training.progress != self._saved:
            self._save(command, training.to_checkpoint())
        return training.progress.to_state()

    def _training_of(self, command: TrainTo) -> TrialTraining:
        """The live training of this trial, or a new one brought to its last checkpoint."""
        if self._training is not None and self._training.trial == command.trial:
            return self._training
        self._training = None  # let the previous trial's memory go before the next one takes its own
        training = TrialTraining(command.trial, self._data, self._setup.num_outputs, self._worker)
        checkpoint = self._from_rank_0(
            lambda: load_checkpoint(
                self._setup.paths, command.trial, warn=lambda text: self._push("warning", command, {"text": text})
            )
        )
        if checkpoint is not None:
            training.restore(checkpoint)
            progress = training.progress
            self._push("resumed", command, {"epoch": progress.epoch, "step": progress.step, "ended": progress.ended})
        self._training = training
        return training

    def _export(self, command: ExportBundle) -> Any:
        if not self._is_first:
            return None
        exported = export_bundle(self._setup.paths, command.trial, command.manifest, self._data.x_val)
        if exported.why_no_onnx:
            text = f"no model.onnx, the endpoint will load the factory: {exported.why_no_onnx}"
            self._push("warning", command, {"text": text})
        return exported

    def _save(self, command: TrainTo, checkpoint: Checkpoint) -> None:
        save_checkpoint(self._setup.paths, command.trial, self._setup.attempt, checkpoint)
        self._saved = checkpoint.progress
        self._push("checkpoint", command, {"step": checkpoint.progress.step})

    def _push(self, kind: str, command: TrainTo | ExportBundle, values: dict[str, Any]) -> None:
        if self._is_first:
            self._setup.switchboard.push.remote(Event(kind, command.trial.trial_id, values))

    def _from_rank_0(self, make: Any) -> Any:
        """Call `make` on rank 0 and give its result to every rank."""
        box = [make() if self._is_first else None]
        if self._worker.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]


def _this_worker() -> Worker:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    return Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def _is_about_a_peer(error: Exception) -> bool:
    """Whether a collective broke because another rank went away: that rank's own story is the one to tell, if any.

    Gloo raises a plain RuntimeError for it, which only its text gives away.
    """
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo/transport", "NCCL"))


def _describe(error: Exception) -> str:
    """The error in one line, with the place in the user's code where there is one."""
    if isinstance(error, BigrayError):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}{place}"
