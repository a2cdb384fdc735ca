"""A multi-layer perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def mlp(
    input_shape: tuple[int, ...], num_outputs: int, hidden: Sequence[int] = (128,), dropout: float = 0.0
) -> nn.Module:
    """Flattened input through ReLU layers of `hidden` widths: (rows, *input_shape) -> (rows, num_outputs)."""
    from torch import nn

    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))
