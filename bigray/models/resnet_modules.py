"""The modules that `resnet` is made of; apart from it, since they need torch to be defined."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn
from torch.nn import functional

_CHANNELS_A_GROUP = 8


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (rows, fan_in, H, W) -> (rows, fan_out, H / stride, W / stride)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: str) -> None:
        super().__init__()
        self._stride, self._added = stride, fan_out - fan_in
        self.convolution1, self.norm1 = _convolution(fan_in, fan_out, stride), make_norm(norm, fan_out)
        self.convolution2, self.norm2 = _convolution(fan_out, fan_out, 1), make_norm(norm, fan_out)
        nn.init.zeros_(self.norm2.weight)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        if self._stride > 1:
            shortcut = shortcut[:, :, :: self._stride, :: self._stride]
        if self._added:  # option A of the paper: channels of zeros more; fewer where a later stage is narrower
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, 0, self._added))
        x = functional.relu(self.norm1(self.convolution1(x)))
        return functional.relu(self.norm2(self.convolution2(x)) + shortcut)


class ResNet(nn.Module):
    """Images of (rows, H, W) or (rows, C, H, W) -> (rows, num_outputs)."""

    def __init__(
        self,
        channels: int,
        num_outputs: int,
        blocks_a_stage: int,
        widths: tuple[int, ...],
        norm: str,
        stem_stride: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(channels, widths[0], stem_stride), make_norm(norm, widths[0]), nn.ReLU())
        blocks = []
        for number, (fan_in, fan_out) in enumerate(itertools.pairwise((widths[0], *widths))):
            blocks.append(Block(fan_in, fan_out, 1 if number == 0 else 2, norm))
            blocks += [Block(fan_out, fan_out, 1, norm) for _ in range(blocks_a_stage - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 3:
            x = x.unsqueeze(1)
        features = self.blocks(self.stem(x)).mean(dim=(2, 3))
        outputs: torch.Tensor = self.head(self.dropout(features))
        return outputs


def make_norm(kind: str, channels: int) -> nn.Module:
    """Normalisation of (rows, channels, H, W)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels // math.gcd(channels, _CHANNELS_A_GROUP), channels)


def _convolution(fan_in: int, fan_out: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(fan_in, fan_out, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
