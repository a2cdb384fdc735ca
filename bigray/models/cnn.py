"""A small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bigray.errors import SpecError
from bigray.models.sizes import is_widths

if TYPE_CHECKING:
    from torch import nn


def cnn(
    input_shape: tuple[int, ...], num_outputs: int, channels: Sequence[int] = (16, 32), dropout: float = 0.0
) -> nn.Module:
    """3x3 convolutions with ReLU, halving the image after each but the first: images -> (rows, num_outputs).

    Takes (rows, H, W) or (rows, C, H, W). The last feature map is flattened, not pooled to one value, so that small
    images keep their layout. Weights are laid out channels-last, which halves a step on the CPU (docs/how_it_works.md).
    """
    check_images(input_shape, channels, dropout)
    import torch
    from torch import nn

    depth, height, width = (1, *input_shape) if len(input_shape) == 2 else input_shape
    layers: list[nn.Module] = [nn.Unflatten(1, (1, height))] if len(input_shape) == 2 else []
    for index, fan_out in enumerate(channels):
        layers += [nn.Conv2d(depth, fan_out, kernel_size=3, padding=1), nn.ReLU()]
        depth = fan_out
        if index > 0:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
    if dropout > 0:
        layers.append(nn.Dropout(dropout))
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(depth * height * width, num_outputs))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def check_images(input_shape: tuple[int, ...], channels: Sequence[int], dropout: float = 0.0) -> None:
    """Raise `SpecError` unless `cnn` takes this input. Without torch, so that it can be asked before a start."""
    if len(input_shape) not in (2, 3):
        raise SpecError(f"cnn: expected images of shape (H, W) or (C, H, W), got {input_shape}")
    if not is_widths(channels):
        raise SpecError(f"cnn: channels must be a list of whole numbers from 1, got {channels}")
    if not 0 <= dropout < 1:
        raise SpecError(f"cnn: dropout must be at least 0 and less than 1, got {dropout}")
    if min(input_shape[-2:]) >> max(0, len(channels) - 1) == 0:
        raise SpecError(f"cnn: {len(channels)} layers halve an image of {input_shape} to nothing; use fewer channels")
