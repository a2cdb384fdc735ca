"""What each of four processes runs for `test_exact_gradients.py`: the same steps in groups of 1, 2, 3 and 4 of them."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bigray.models import transformer
from bigray.training.batchnorm import SyncBatchNorm, convert_sync_batchnorm, uncounted_rows
from bigray.training.exact import ExactGradients

NUM_PROCESSES = 4
SHARD_COUNTS = (4, 7)
BATCH_SIZES = (22, 22, 3)
"""The last one leaves shards without rows."""
MODULES: dict[str, Callable[[], nn.Module]] = {
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).to(memory_format=torch.channels_last),
    "transformer": lambda: nn.Sequential(nn.Flatten(1, 2), transformer((8, 8), 5, width=16, depth=1, dropout=0.1)),
}

StateDict = dict[str, torch.Tensor]


def run(rank: int, folder: Path) -> None:
    """One of the four processes; writes `<case>-<world size>-<rank>.safetensors` for each group that it is in."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=NUM_PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    for world_size in range(1, NUM_PROCESSES + 1):
        group = dist.new_group(range(world_size))
        if rank >= world_size:
            continue
        for name in MODULES:
            for num_shards in SHARD_COUNTS:
                state = train_exactly(name, num_shards, rank, world_size, group)
                save_file(state, folder / f"{name}-{num_shards}-{world_size}-{rank}.safetensors")
        if world_size == 2:
            for name, (module, rows) in sync_batchnorm_cases().items():
                save_file(step_with_ddp(module, rows, rank, group), folder / f"{name}-2-{rank}.safetensors")
    dist.destroy_process_group()


def train_exactly(name: str, num_shards: int, rank: int, world_size: int, group: dist.ProcessGroup | None) -> StateDict:
    """A few optimizer steps; returns weights, buffers, the last gradients and the losses."""
    torch.manual_seed(0)
    module = MODULES[name]().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    exact = ExactGradients(module, num_shards, rank, world_size, torch.device("cpu"), group=group)
    images, classes = torch.randn(22, 1, 8, 8), torch.randint(0, 5, (22,))
    losses = []
    for step, num_rows in enumerate(BATCH_SIZES):
        shards = [torch.arange(num_rows)[shard::num_shards] for shard in range(num_shards)]

        def compute(shard: int, step: int = step, shards: list[torch.Tensor] = shards) -> torch.Tensor:
            torch.manual_seed(100 * step + shard)
            rows = shards[shard]
            loss = nn.functional.cross_entropy(module(images[rows]), classes[rows], reduction="sum")
            (loss / sum(map(len, shards))).backward()
            return loss.detach().double().reshape(1)

        losses.append(exact.step(compute, [len(rows) for rows in shards]))
        optimizer.step()
    return {**state_after(module), "losses": torch.cat(losses)}


def sync_batchnorm_cases() -> dict[str, tuple[nn.Module, list[torch.Tensor]]]:
    """A module in float64, and the rows of each of two workers."""
    torch.manual_seed(0)
    images = torch.randn(7, 2, 4, 4, dtype=torch.float64) + 3.0
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, momentum=None),
    ).double()
    without_affine = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(32, 2)).double()
    return {
        "uneven": (network, [images[:5], images[5:]]),
        "no rows": (copy.deepcopy(network), [images, images[:0]]),
        "not affine": (without_affine, [images[:1], images[1:]]),
    }


def step_with_ddp(module: nn.Module, rows: list[torch.Tensor], rank: int, group: dist.ProcessGroup) -> StateDict:
    """Gradients and buffers of one step of DDP with synchronised batch norm."""
    module = convert_sync_batchnorm(module, group)
    assert any(isinstance(layer, SyncBatchNorm) for layer in module.modules())
    replica = DistributedDataParallel(module, process_group=group)
    scale = len(rows) / sum(map(len, rows))  # DDP divides by the number of workers
    if len(rows[rank]):
        (squared_loss(replica, rows[rank]) * scale).backward()
    else:
        with uncounted_rows(module):
            (squared_loss(replica, rows[0][:1]) * 0.0).backward()
    return state_after(module)


def squared_loss(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Not the same for each feature, as the gradient of the sum of squares of normalised numbers is zero."""
    outputs = module(rows)
    return (outputs * torch.arange(1, outputs.shape[1] + 1) - 1).abs().pow(3).sum()


def state_after(module: nn.Module) -> StateDict:
    """Weights, buffers and gradients."""
    gradients = {f"grad.{key}": value.grad for key, value in module.named_parameters() if value.grad is not None}
    return {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in (gradients | module.state_dict()).items()
    }
