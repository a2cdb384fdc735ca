"""What each of two processes runs for `test_own_loops.py`: the example loops, as a worker of a group calls them."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from bigray.data.dataset import Dataset, prepare_dataset
from bigray.errors import TrainingFailed
from bigray.loading import load_job
from bigray.specs import JobSpec, TrialSpec
from bigray.training.checkpoint import Checkpoint, Snapshot, SnapshotBuffers
from bigray.training.context import LoopContext, LoopTraining, make_training
from bigray.training.loop import Wish, Worker
from bigray.training.tensor_files import pack_tensors

NUM_PROCESSES = 2
EPOCHS = 4
EXAMPLES = ("own_loop", "accelerate")


class Hooks:
    """A worker's side of the loop, with checkpoints in rank 0's memory."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._newest: Checkpoint | None = None
        self.reports: list[dict[str, Any]] = []
        self.wish = Wish()

    def tick(self, phase: str) -> None:
        pass

    def exchange(self, step: int) -> Wish:
        return self.wish

    def on_epoch(self, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def on_checkpoint(self, take: Callable[[SnapshotBuffers], Snapshot]) -> None:
        snapshot = take(SnapshotBuffers())
        files = {f"{stem}.safetensors": pack_tensors(tensors) for stem, tensors in snapshot.tensors.items()}
        self._newest = Checkpoint(snapshot.progress, files)

    def restore_last(self) -> Checkpoint | None:
        box = [self._newest]
        if self._worker.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def warn(self, text: str) -> None:
        raise AssertionError(text)


def run(rank: int, folder: Path) -> None:
    """One of the processes; writes what its trials came to."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"WORLD_SIZE": str(NUM_PROCESSES), "LOCAL_WORLD_SIZE": str(NUM_PROCESSES)}
    store = dist.FileStore(str(folder / "store"), NUM_PROCESSES)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_PROCESSES, timeout=timeout)
    worker = Worker(rank, NUM_PROCESSES, torch.device("cpu"))
    for example in EXAMPLES:
        write(folder / f"{example}-whole-{rank}", *train(example, worker))
        write(folder / f"{example}-broken-{rank}", *train(example, worker, broken_off=True))
    (folder / f"fault-{rank}").write_text(fault_of_a_loop_without_reports(worker))
    assert dist.get_world_size() == NUM_PROCESSES, "the loops left the process group as it was"
    dist.destroy_process_group()


def train(example: str, worker: Worker, broken_off: bool = False) -> tuple[LoopTraining, Hooks]:
    """A whole trial; or one that is asked to stop after its first epoch, and goes on in another object."""
    hooks = Hooks(worker)
    training = begin(example, worker, hooks)
    if broken_off:
        hooks.wish = Wish(save=True, stop=True)
        training.train_to(EPOCHS)
        assert training.progress.epoch == 1
        assert training.progress.ended is None
        hooks.wish = Wish()
        training = begin(example, worker, hooks)
        newest = hooks.restore_last()
        assert newest is not None
        training.restore(newest)
    training.train_to(EPOCHS)
    return training, hooks


def begin(example: str, worker: Worker, hooks: Hooks, **settings: Any) -> LoopTraining:
    job, dataset = load(example)
    spec = job.training.model_copy(update=settings)
    trial = TrialSpec(trial_id="0", model_name="mlp", model=job.models["mlp"], training=spec, seed=job.seed)
    training = make_training(trial, dataset.arrays, 3, worker, hooks)
    assert isinstance(training, LoopTraining)
    return training


@cache
def load(example: str) -> tuple[JobSpec, Dataset]:
    job = load_job(f"examples/{example}/job.toml", [f"training.epochs={EPOCHS}"])
    return job, prepare_dataset(job.data, "classification")


def say_nothing(context: LoopContext) -> None:
    """A loop that never reports."""


def fault_of_a_loop_without_reports(worker: Worker) -> str:
    training = begin("own_loop", worker, Hooks(worker), loop=f"{__name__}:say_nothing")
    try:
        training.train_to(EPOCHS)
    except TrainingFailed as error:
        return str(error)
    return "nothing was raised"


def write(path: Path, training: LoopTraining, hooks: Hooks) -> None:
    document = {"progress": asdict(training.progress), "epochs": [report["epoch"] for report in hooks.reports]}
    path.with_suffix(".json").write_text(json.dumps(document))
    if training.best_weights is not None:
        save_file(training.best_weights, path.with_suffix(".safetensors"))
