"""Linear and logistic regression."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def linear(input_shape: tuple[int, ...], num_outputs: int, bias: bool = True) -> nn.Module:
    """One affine map of the flattened input: (rows, *input_shape) -> (rows, num_outputs). Starts at zero."""
    from torch import nn

    layer = nn.Linear(math.prod(input_shape), num_outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)  # the problem is convex, so zero is as good a start as any and needs no seed
    return nn.Sequential(nn.Flatten(), layer)
