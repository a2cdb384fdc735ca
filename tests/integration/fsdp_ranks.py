"""What the processes of `test_fsdp` do; a module of its own, so that they can import it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from bigray.data.dataset import TrainingArrays
from bigray.errors import StorageError, TrainingFailed
from bigray.paths import RunPaths
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.storage import open_storage, read_folder
from bigray.training.checkpoint import Checkpoint, load_checkpoint
from bigray.training.commands import Wish
from bigray.training.fsdp import full_tensors, load_tensors, local_tensors, new_shard, shard_module, whole
from bigray.training.loop import TrialTraining, Worker
from bigray.training.saver import CheckpointSaver
from bigray.training.sharded import commit_shard

ROWS, BATCH, CLIP_NORM = 24, 8, 0.5
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
}


class Net(nn.Module):
    """A convolution laid out channels-last, odd widths that no two ranks share evenly, a tied pair, one row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
        self.blocks = nn.ModuleList([nn.Linear(20, 7), nn.Linear(7, 7), nn.Linear(7, 7)])
        self.blocks[2].weight = self.blocks[1].weight
        self.head, self.scale = nn.Linear(7, 3), nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x) * self.scale


def make_net() -> Net:
    torch.manual_seed(7)
    return Net().to(memory_format=torch.channels_last)


def rows_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, 2, 4, 4, generator=generator), torch.randint(3, (ROWS,), generator=generator)


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world_size: int = 1
) -> None:
    """Steps on the same global batches at any world size. Batch norm is fixed: its statistics are of a rank's rows."""
    x, y = rows_and_targets()
    module.eval()
    for step in steps:
        rows = torch.arange(BATCH)[rank::world_size] + step * BATCH % ROWS
        loss = functional.cross_entropy(module(x[rows]), y[rows], reduction="sum")
        (loss * (world_size / BATCH)).backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        assert float(whole(norm)) > 0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run(rank: int, folder: Path) -> None:
    """Two processes: train as two, go on as one, go on as two; then the cases that need processes of their own."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in OPTIMIZERS:
        _train_across_world_sizes(rank, folder, name)
    _train_trial_across_world_sizes(rank, folder)
    worker = _join(folder, "last", rank, 2)
    results["refusals"] = _refusals(worker, folder)
    results["bf16"] = _bf16_outputs(worker)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def make_trial(strategy: str) -> TrialSpec:
    settings = {"task": "classification", "strategy": strategy, "optimizer": "sgd", "lr": 0.1, "ema_decay": 0.5}
    return TrialSpec(
        trial_id="0-net",
        model_name="net",
        model=ModelSpec(factory="bigray.models:mlp", params={"hidden": [7]}),
        training=TrainingSpec.model_validate({**settings, "epochs": 3, "global_batch_size": BATCH}),
        seed=0,
    )


def make_data() -> TrainingArrays:
    x, y = (tensor.numpy() for tensor in rows_and_targets())
    return TrainingArrays(x, y, x[:5], y[:5])


class Hooks:
    """Saves when told to and loads what was saved, as a worker does."""

    def __init__(self, paths: RunPaths, trial: TrialSpec, worker: Worker) -> None:
        self.paths, self.trial, self.worker = paths, trial, worker
        self.saver = CheckpointSaver(paths, trial, 1, on_saved=lambda step: None)

    def tick(self, phase: str) -> None: ...

    def exchange(self, step: int) -> Wish:
        return Wish(save=step % 2 == 0)  # in the middle of epochs of three steps

    def on_epoch(self, report: dict[str, Any]) -> None: ...

    def on_checkpoint(self, take: Any) -> None:
        self.saver.submit(take)

    def restore_last(self) -> Checkpoint | None:
        box = [load_checkpoint(self.paths, self.trial, self.warn) if self.worker.rank == 0 else None]
        if self.worker.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def warn(self, text: str) -> None:
        raise AssertionError(text)


def _train_trial_across_world_sizes(rank: int, folder: Path) -> None:
    """The whole way of a trial: an epoch as two workers, one as one, one as two, each from what the last one saved."""
    trial, paths = make_trial("fsdp"), RunPaths(open_storage(folder / "run"), "run")
    for epoch, world_size in enumerate((2, 1, 2), start=1):
        if rank >= world_size:
            continue
        worker = _join(folder, f"trial-{epoch}", rank, world_size)
        hooks = Hooks(paths, trial, worker)
        training = TrialTraining(trial, make_data(), 3, worker, hooks)
        if (checkpoint := hooks.restore_last()) is not None:
            training.restore(checkpoint)
        assert training.progress.epoch == epoch - 1
        training.train_to(epoch)
        hooks.on_checkpoint(training.snapshot)
        hooks.saver.wait()
        hooks.saver.close()
        dist.barrier()
        dist.destroy_process_group()


def _train_across_world_sizes(rank: int, folder: Path, optimizer: str) -> None:
    before = None
    for stage, (world_size, steps) in enumerate(((2, range(4)), (1, range(4, 8)), (2, range(8, 12)))):
        if rank < world_size:
            worker = _join(folder, f"{optimizer}-{stage}", rank, world_size)
            before = _train_one_stage(worker, folder, optimizer, steps, before)
            dist.destroy_process_group()
        before = f"{optimizer}-{steps.stop}"


def _train_one_stage(worker: Worker, folder: Path, optimizer: str, steps: range, before: str | None) -> None:
    storage = open_storage(folder / "store")
    module = shard_module(make_net(), worker)
    sharded = OPTIMIZERS[optimizer](module.parameters())
    if before is not None:
        load_tensors(module, sharded, read_folder(storage, before).files if worker.rank == 0 else {})
    train(module, sharded, steps, worker.rank, worker.world_size)
    shard = new_shard(worker)
    stems = dict(zip(("model", "optimizer"), local_tensors(module, sharded), strict=True))
    files = {shard.file_name(stem): safetensors.torch.save(_unshared(tensors)) for stem, tensors in stems.items()}
    commit_shard(storage, f"{optimizer}-{steps.stop}", shard, files, {"step": steps.stop}, attempt=1)
    dist.barrier()
    weights = full_tensors(module.state_dict())
    assert bool(weights) == (worker.rank == 0)
    if worker.rank == 0:
        safetensors.torch.save_file(_unshared(weights), folder / f"{optimizer}-{steps.stop}.safetensors")


def _refusals(worker: Worker, folder: Path) -> dict[str, str]:
    """What every rank is told of checkpoints that do not fit."""
    files = read_folder(open_storage(folder / "store"), "adamw-12").files
    module = shard_module(make_net(), worker)
    other = shard_module(nn.Sequential(nn.Linear(4, 3)), worker)
    without = {name: data for name, data in files.items() if name != "model-00002-of-00002.safetensors"}
    told = {
        "missing shard": _told(lambda: load_tensors(module, OPTIMIZERS["adamw"](module.parameters()), without)),
        "other model": _told(lambda: load_tensors(other, OPTIMIZERS["sgd"](other.parameters()), files)),
    }
    scalar = nn.Linear(2, 2)
    scalar.gain = nn.Parameter(torch.ones(()))
    return told | {"scalar": _told(lambda: shard_module(scalar, worker))}


def _told(call: Any) -> str:
    """The message of rank 1, who holds nothing of the checkpoint itself."""
    try:
        call()
        message = "nothing was raised"
    except (StorageError, TrainingFailed) as error:
        message = str(error)
    box = [message]
    dist.broadcast_object_list(box, src=1)
    return box[0]


def _bf16_outputs(worker: Worker) -> dict[str, Any]:
    """One training step in bf16, with batch norm in training mode, then validation, then another step."""
    module = shard_module(make_net(), worker, "bf16")
    x, _ = rows_and_targets()
    types = set()
    for _step in range(2):
        module.train()
        module(x).square().sum().backward()
        types |= {str(parameter.grad.dtype) for parameter in module.parameters()}
        with torch.no_grad():
            outputs = module.eval()(x)
    expected = make_net().eval()(x)
    return {
        "output": str(outputs.dtype),
        "gradients": sorted(types),
        "weights": sorted({str(parameter.dtype) for parameter in module.parameters()}),
        "rows": np.isfinite(outputs.numpy()).all().item() and outputs.shape == expected.shape,
    }


def _join(folder: Path, name: str, rank: int, world_size: int) -> Worker:
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world_size)
    return Worker(rank, world_size, torch.device("cpu"))


def _unshared(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
