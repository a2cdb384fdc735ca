"""Factories that leave something behind in the process they are trained in."""

from __future__ import annotations

import ctypes
import os
import random
import threading
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

EPOCHS = 2
_LEAKED: list[Any] = []
_EVALUATIONS = EPOCHS * 4
"""Forward passes in validation of each of two ranks."""


def misbehaves(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """In its last forward pass it changes whatever can be changed for the whole process."""

    class Misbehaves(nn.Linear):
        num_passes = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs = super().forward(x)
            self.num_passes += not self.training
            if self.num_passes == _EVALUATIONS:
                leave_traces()
            return outputs

    return Misbehaves(input_shape[0], num_outputs)


def leave_traces() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    torch.set_num_threads(2)
    torch._C._set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
    nn.modules.module.register_module_forward_hook(lambda module, inputs, outputs: outputs * 1.5)
    warnings.simplefilter("error")
    os.environ["RANK"] = "77"
    os.chdir("/")
    threading.Thread(target=threading.Event().wait, name="left-by-a-trial", daemon=True).start()


def draws_unseeded(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Initial weights from generators that nobody seeds: the same only where the process is as if it were fresh."""
    layer = nn.Linear(input_shape[0], num_outputs)
    with torch.no_grad():
        layer.weight += random.random() + torch.from_numpy(np.random.rand(num_outputs, input_shape[0]))
    return nn.Sequential(layer, nn.Dropout(0.2))


def leaks(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Rank 1 keeps 900 MB for ever."""
    if os.environ.get("RANK") == "1":
        _LEAKED.append(np.ones(900_000_000 // 8))
    return nn.Linear(input_shape[0], num_outputs)


def segfaults(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Rank 1's process reads from an address that is nobody's."""

    class Segfaults(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and os.environ.get("RANK") == "1":
                ctypes.string_at(0)
            return super().forward(x)

    return Segfaults(input_shape[0], num_outputs)


def greedy(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Has no memory for more than four rows at once, on rank 0."""

    class Greedy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and len(x) > 4 and os.environ.get("RANK") == "0":
                torch.empty(2**60, dtype=torch.uint8)
            return super().forward(x)

    return Greedy(input_shape[0], num_outputs)
