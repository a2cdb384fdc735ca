"""The training loop as one writes it with PyTorch alone: DDP, a fused optimizer, the whole set as tensors in memory.

It takes the same steps as bigray's: the same model, loss and optimizer, and the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from bigray.models import build_model

NUM_CLASSES = 10


@dataclass(frozen=True)
class PlainJob:
    """One epoch over random rows."""

    factory: str
    params: dict[str, Any]
    rows: int
    batch: int
    """Over all ranks."""
    shape: list[int] = field(default_factory=lambda: [784])
    lr: float = 1e-3
    save_every: int = 0
    """Steps between checkpoints; 0: none."""


@dataclass
class Saved:
    """What a checkpoint holds."""

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]


def make_rows(rows: int, shape: list[int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Inputs (rows, *shape) and class numbers; the same in every process."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal(size=(rows, *shape), dtype=np.float32)
    return x, generator.integers(0, NUM_CLASSES, rows)


def train(
    job: PlainJob,
    rank: int,
    world_size: int,
    saved: Saved | None = None,
    save: Callable[[Saved], None] | None = None,
) -> None:
    """Train for an epoch, on every rank of a process group that is there."""
    torch.set_num_threads(1)
    x, y = (torch.from_numpy(array) for array in make_rows(job.rows, job.shape))
    torch.manual_seed(0)
    module = build_model(job.factory, job.params, tuple(job.shape), NUM_CLASSES)
    optimizer = torch.optim.AdamW(module.parameters(), lr=job.lr, weight_decay=0.0, fused=True)
    if saved is not None:
        module.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
    network = DistributedDataParallel(module, gradient_as_bucket_view=True)
    order = torch.from_numpy(np.random.default_rng([0, 0]).permutation(job.rows))
    network.train()
    for step in range(saved.step if saved else 0, job.rows // job.batch):
        rows = order[step * job.batch : (step + 1) * job.batch][rank::world_size]
        optimizer.zero_grad()
        functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        if save is not None and job.save_every and (step + 1) % job.save_every == 0:
            save(Saved(step + 1, module.state_dict(), optimizer.state_dict()))
