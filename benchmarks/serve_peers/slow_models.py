"""Models of some milliseconds a row that gain little from batches, so that one replica is soon busy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bigray.models import mlp


class _Waiting(nn.Module):
    def __init__(self, inner: nn.Module, seconds_per_row: float) -> None:
        super().__init__()
        self.inner, self._seconds_per_row = inner, seconds_per_row

    def forward(self, x: torch.Tensor) -> Any:
        time.sleep(self._seconds_per_row * len(x))
        return self.inner(x)


def waiting(
    input_shape: tuple[int, ...], num_outputs: int, hidden: Sequence[int] = (64,), seconds_per_row: float = 0.005
) -> nn.Module:
    """An MLP whose forward pass sleeps for each row, as if an accelerator did the work: the cores are free for the
    server and the client."""
    return _Waiting(mlp(input_shape, num_outputs, hidden), seconds_per_row)


def computing(input_shape: tuple[int, ...], num_outputs: int, channels: Sequence[int] = (128, 256)) -> nn.Module:
    """Two convolutions over an image: it is arithmetic, on one core."""
    depth, height, width = input_shape
    first, second = channels
    layers = [nn.Conv2d(depth, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(second * (height // 4) * (width // 4), num_outputs))
