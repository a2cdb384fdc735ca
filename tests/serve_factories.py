"""Factories of models that nobody should serve; the gate's candidate processes import this module by name.

Each is an `mlp` of one hidden layer of four, so that the weights of a good bundle fit.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bigray.models import mlp

Shape = tuple[int, ...]


def good(input_shape: Shape, num_outputs: int) -> nn.Module:
    return mlp(input_shape, num_outputs, hidden=(4,))


def calls_exit(input_shape: Shape, num_outputs: int) -> nn.Module:
    sys.exit(3)


def aborts(input_shape: Shape, num_outputs: int) -> nn.Module:
    """As a broken C extension does."""
    os.abort()


def hangs(input_shape: Shape, num_outputs: int) -> nn.Module:
    while True:
        time.sleep(1)


def eats_memory(input_shape: Shape, num_outputs: int) -> nn.Module:
    """All that it is given, in pieces; none of it is touched, so that the test's machine does not feel it."""
    pieces = []
    while True:
        pieces.append(torch.empty(1 << 28, dtype=torch.uint8))


class _Changed(nn.Module):
    """A good model with something done to its answers."""

    def __init__(self, inner: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._change = change
        # its parameters keep their names: the weights of the bundle fit
        for name, child in inner.named_children():
            self.add_module(name, child)
        self._inner = [inner]

    def forward(self, x: torch.Tensor) -> Any:
        return self._change(self._inner[0](x))


def slow(input_shape: Shape, num_outputs: int, seconds: float = 0.08) -> nn.Module:
    def late(outputs: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return outputs

    return _Changed(good(input_shape, num_outputs), late)


def right_once(input_shape: Shape, num_outputs: int) -> nn.Module:
    """Gives its golden answers when it is loaded and checks itself, and others when it is asked."""
    calls = iter(range(1 << 30))

    def changed(outputs: torch.Tensor) -> torch.Tensor:
        return outputs if next(calls) == 0 else outputs.flip(1)

    return _Changed(good(input_shape, num_outputs), changed)


def dies_when_asked(input_shape: Shape, num_outputs: int) -> nn.Module:
    """Loads and checks itself well; its process ends when the golden rows come a second time, over HTTP."""
    golden = iter((False, True))

    def last(outputs: torch.Tensor) -> torch.Tensor:
        if len(outputs) == 32 and next(golden):
            os._exit(9)
        return outputs

    return _Changed(good(input_shape, num_outputs), last)
