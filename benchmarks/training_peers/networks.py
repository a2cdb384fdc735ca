"""Models that tell when they train, the same for every peer: `[pid, rank, step, at_s]` as JSON lines in a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bigray.models import build_model


def stamped(
    input_shape: tuple[int, ...],
    num_outputs: int,
    factory: str = "bigray.models:mlp",
    params: Mapping[str, Any] | None = None,
    path: str = os.devnull,
    at: Sequence[int] = (),
) -> nn.Module:
    """The model of another factory, which tells of the training passes numbered `at` (from 1)."""
    return nn.Sequential(_Stamps(path, at), build_model(factory, params or {}, input_shape, num_outputs))


def counted(input_shape: tuple[int, ...], num_outputs: int, path: str = os.devnull, delay_s: float = 0.01) -> nn.Module:
    """A small network whose training steps take `delay_s` and more, and which tells of each.

    The count is part of its state: it goes on where a checkpoint was made.
    """
    layers = (nn.Linear(input_shape[0], 16), nn.ReLU(), nn.Linear(16, num_outputs))
    return nn.Sequential(_Counter(path, delay_s), *layers)


class _Stamps(nn.Module):
    def __init__(self, path: str, at: Sequence[int]) -> None:
        super().__init__()
        self._path, self._at, self._count = path, frozenset(at), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._count += 1
            if self._count in self._at:
                _tell(self._path, self._count)
        return x


class _Counter(nn.Module):
    steps: torch.Tensor

    def __init__(self, path: str, delay_s: float) -> None:
        super().__init__()
        self._path, self._delay_s = path, delay_s
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            _tell(self._path, int(self.steps))
            time.sleep(self._delay_s)
        return x


def _tell(path: str, step: int) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    line = json.dumps([os.getpid(), rank, step, time.monotonic()]) + "\n"
    with open(path, "a") as file:  # appends of a line are atomic: both ranks write here
        file.write(line)
