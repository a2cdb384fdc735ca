"""The layers whose weights may be changed one by one."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def weighted_layers(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
    """Name and layer of these kinds, of their subclasses too, but for weights that several layers share."""
    owners = Counter(id(own) for part in module.modules() for own in part.parameters(recurse=False))
    # the same layer at two places counts once, as `named_modules` gives it
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, kinds)]
    return [(name, layer) for name, layer in found if owners[id(layer.weight)] == 1]
