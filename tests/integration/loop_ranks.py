"""What each of four processes runs for `test_exact_workers.py`: the same trials in groups of 1, 2, 3 and 4 of them."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from bigray.data.dataset import TrainingArrays
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.training.checkpoint import Checkpoint, SnapshotBuffers
from bigray.training.loop import TrialTraining, Worker
from bigray.training.membership import Member, Place
from bigray.training.process_group import process_group
from bigray.training.tensor_files import pack_tensors
from tests.integration.process_group_ranks import look_up, publisher
from tests.loop_hooks import RecordingHooks

NUM_PROCESSES = 4
NUM_ROWS, BATCH, EPOCHS = 70, 22, 2
"""The last batch of each epoch holds 4 rows: not every worker, nor every logical shard, has some of them."""
STEPS = 8

_EXACT = {"exact": True, "optimizer": "adamw", "lr": 0.01}
_MLP = "bigray.models:mlp", {"hidden": [16]}
_LARGE_MLP = "bigray.models:mlp", {"hidden": [500, 500]}
"""Its gradients go by DDP; those of the small one go in one message."""
_DROPOUT_MLP = "bigray.models:mlp", {"hidden": [16], "dropout": 0.3}
_BATCH_NORM = "tests.integration.user_models:batch_norm_net", {}
_SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}

EXACT: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "mlp": (_DROPOUT_MLP, _EXACT),
    "cnn": (("bigray.models:cnn", {"channels": [4, 6], "dropout": 0.2}), _EXACT),
    "transformer": (("bigray.models:transformer", {"width": 16, "depth": 1, "dropout": 0.1}), _EXACT),
    "batch norm": (_BATCH_NORM, _EXACT),
    "micro-batches, averages, clipping": (
        _DROPOUT_MLP,
        {**_EXACT, "micro_batch_size": 2, "ema_decay": 0.8, "clip_norm": 0.3, "class_weights": "balanced"},
    ),
    "five shards": (_BATCH_NORM, {**_EXACT, "logical_shards": 5, "gradient_checkpointing": True}),
}
CLOSE: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "sgd": (_MLP, _SGD),
    "adamw": (_MLP, {"optimizer": "adamw", "lr": 0.01}),
    "large": (_LARGE_MLP, {**_SGD, "micro_batch_size": 4}),
    "class weights and micro-batches": (_MLP, {**_SGD, "class_weights": [0.3, 1.0, 2.5], "micro_batch_size": 3}),
    "synchronised batch norm": (_BATCH_NORM, {**_SGD, "lr": 0.01, "sync_batchnorm": True}),
    "fsdp": (_MLP, {"optimizer": "adamw", "lr": 0.01, "strategy": "fsdp", "ema_decay": 0.8, "clip_norm": 0.3}),
}
TRIALS = {**EXACT, **CLOSE}
DIVERGING = {
    "nan": (_MLP, _SGD),
    "nan, exact": (_MLP, {**_EXACT, **_SGD}),
    "nan, large": (_LARGE_MLP, _SGD),
    "nan, fsdp": (_MLP, {**_SGD, "strategy": "fsdp"}),
    "nan, rollback": (_MLP, {**_SGD, "on_non_finite": {"policy": "rollback", "max_rollbacks": 1}}),
}
HANGS_AFTER_S = 160.0
RESIZED = ("mlp", "batch norm", "sgd", "fsdp")


def run(rank: int, folder: Path) -> None:
    """One of the four processes. Rank 0 of each group writes `<case>-<world size>.safetensors` and `.json`."""
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)  # says where, and ends the others
    torch.set_num_threads(1)
    for world_size in range(1, NUM_PROCESSES + 1):
        with _group(rank, world_size, folder, f"{world_size}") as worker:
            if worker is not None:
                for name in TRIALS:
                    training, hooks = _begin(name, worker)
                    training.train_to(EPOCHS)
                    _write(training, hooks.reports, folder / f"{name}-{world_size}")
                for name in DIVERGING:
                    training, hooks = _begin(name, worker)
                    training.train_to(EPOCHS)
                    _write(training, hooks.reports, folder / f"{name}-{world_size}-{rank}")
    for name in RESIZED:
        _resize(rank, name, folder)
    _lose_workers(rank, folder)
    faulthandler.cancel_dump_traceback_later()


def _resize(rank: int, name: str, folder: Path) -> None:
    """Four workers stop inside the first epoch, two go on into the second, three to its end; by checkpoints."""
    reports: list[dict[str, Any]] = []
    checkpoint: Checkpoint | None = None
    for world_size, stop_at in ((4, 2), (2, 6), (3, 0)):
        with _group(rank, world_size, folder, f"{name}-resized-{world_size}") as worker:
            if worker is None:
                continue
            training, hooks = _begin(name, worker, stop_at)
            box = [checkpoint]
            dist.broadcast_object_list(box, src=0)
            if box[0] is not None:
                training.restore(box[0])
            training.train_to(EPOCHS)
            checkpoint = _joined_checkpoint(training)
            reports += hooks.reports
            if not stop_at:
                _write(training, reports, folder / f"{name}-resized")


def _lose_workers(rank: int, folder: Path) -> None:
    """Four workers, of which two are gone after a step; the others go on from what they have in memory."""
    training: TrialTraining | None = None
    for name in ("mlp", "sgd", "large"):
        with _group(rank, 4, folder, f"{name}-whole") as worker:
            assert worker is not None
            training, hooks = _begin(name, worker, stop_at=6)
            training.train_to(EPOCHS)
        with _group(rank, 2, folder, f"{name}-survivors") as worker:
            if worker is not None:
                training.rebuild(worker)
                training.train_to(EPOCHS)
                _write(training, hooks.reports, folder / f"{name}-survivors")


@contextlib.contextmanager
def _group(rank: int, world_size: int, folder: Path, name: str) -> Iterator[Worker | None]:
    """The default process group of the first `world_size` processes; None in the others."""
    if rank >= world_size:
        yield None
        return
    members = tuple(Member("here", "127.0.0.1", number, number, world_size) for number in range(world_size))
    place = Place(zlib.crc32(name.encode()), rank, members)
    with process_group(place, "gloo", publisher(place, str(folder)), lambda: look_up(place, str(folder))):
        yield Worker(rank, world_size, torch.device("cpu"))
        dist.barrier()  # the first to leave hangs up


def _begin(name: str, worker: Worker, stop_at: int = 0) -> tuple[TrialTraining, RecordingHooks]:
    (factory, params), settings = {**TRIALS, **DIVERGING}[name]
    spec = {"task": "classification", "epochs": EPOCHS, "global_batch_size": BATCH, **settings}
    trial = TrialSpec(
        trial_id="0-net",
        model_name="net",
        model=ModelSpec(factory=factory, params=params),
        training=TrainingSpec.model_validate(spec),
        seed=0,
    )
    hooks = RecordingHooks(stop_at={stop_at})
    return TrialTraining(trial, _data(with_nan=name in DIVERGING), 3, worker, hooks), hooks


def _data(*, with_nan: bool) -> TrainingArrays:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 8, 8))

    def draw(rows: int) -> tuple[Any, Any]:
        y = np.arange(rows, dtype=np.int64) % 3
        return (centres[y] + generator.normal(size=(rows, 8, 8))).astype(np.float32), y

    data = TrainingArrays(*draw(NUM_ROWS), *draw(29))
    if with_nan:
        data = replace(data, x_train=data.x_train.copy())
        data.x_train[7, 0, 0] = np.nan
    return data


def _joined_checkpoint(training: TrialTraining) -> Checkpoint:
    """The parts of all ranks, as one reads them from storage."""
    snapshot = training.snapshot(SnapshotBuffers())
    name_of = snapshot.shard.file_name if snapshot.shard else "{}.safetensors".format
    own = {name_of(stem): pack_tensors(state) for stem, state in snapshot.tensors.items()}
    if snapshot.shard is None:
        return Checkpoint(snapshot.progress, own)
    parts: list[dict[str, bytes]] = [{}] * training.worker.world_size
    dist.all_gather_object(parts, own)
    return Checkpoint(snapshot.progress, {name: data for part in reversed(parts) for name, data in part.items()})


def _write(training: TrialTraining, reports: list[dict[str, Any]], path: Path) -> None:
    """Weights, the best weights, and what was reported but for times."""
    checkpoint = _joined_checkpoint(training)
    tensors = {f"model.{name}": t for name, t in (checkpoint.tensors("model") or {}).items()}
    if checkpoint.progress.best_metrics and training.worker.rank == 0:
        best = checkpoint.tensors(checkpoint.best_file()) or {}
        tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    if training.worker.rank == 0 or training.progress.ended == "diverged":
        save_file(tensors, path.with_suffix(".safetensors"))
        told = [{k: v for k, v in report.items() if k not in ("samples_per_s", "epoch_s")} for report in reports]
        document = {"reports": told, "step": training.progress.step, "rollbacks": training.progress.rollbacks}
        path.with_suffix(".json").write_text(json.dumps(document))
