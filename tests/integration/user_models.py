"""Factories as a user would bring them; the workers import this module by name."""

from typing import Any

import torch
from torch import nn


class RaisesInForward(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no forward today")


def raises_in_forward(input_shape: tuple[int, ...], num_outputs: int, **_: Any) -> nn.Module:
    return RaisesInForward(num_outputs)


def slow_mlp(input_shape: tuple[int, ...], num_outputs: int, delay_s: float = 0.02) -> nn.Module:
    """A small network whose steps take long enough to be killed in."""
    import time

    class Delay(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                time.sleep(delay_s)
            return x

    return nn.Sequential(Delay(), nn.Linear(input_shape[0], 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_outputs))


def not_a_module(input_shape: tuple[int, ...], num_outputs: int) -> dict[str, int]:
    return {"outputs": num_outputs}


def batch_norm_net(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Convolution and batch norm on images (rows, H, W)."""
    height, width = input_shape
    return nn.Sequential(
        nn.Unflatten(1, (1, height)),
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * (height - 2) * (width - 2), num_outputs),
    )


def paced_mlp(input_shape: tuple[int, ...], num_outputs: int, pace_file: str, seen: str = "") -> nn.Module:
    """As `slow_mlp`; the seconds of a step are read from a file each time, so that a test can let it run.

    Each process that trains touches a file named after its pid in the folder `seen`, where one is given.
    """
    import os
    import time
    from pathlib import Path

    class Pace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                if seen:
                    Path(seen, str(os.getpid())).touch()
                time.sleep(float(Path(pace_file).read_text() or 0))  # empty while it is being written
            return x

    return nn.Sequential(Pace(), nn.Linear(input_shape[0], 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_outputs))


def loops_for_ever(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Rank 1 never comes back from its first step."""
    import os

    class LoopsForEver(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                wait_for_godot(on_rank="1", rank=os.environ["RANK"])
            return super().forward(x)

    return LoopsForEver(input_shape[0], num_outputs)


def wait_for_godot(on_rank: str, rank: str) -> None:
    while rank == on_rank:
        pass


def exits(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Rank 1's process ends in its first step, without a word."""
    import os

    class Exits(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and os.environ["RANK"] == "1":
                os._exit(7)
            return super().forward(x)

    return Exits(input_shape[0], num_outputs)
