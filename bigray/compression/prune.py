"""Weights near zero set to zero, the least of all layers first: global magnitude pruning.

Unstructured, after Han et al. 2015 (arXiv 1506.02626), by `torch.nn.utils.prune`. The graph keeps its shapes: a bundle
becomes smaller where it is packed or sent compressed, not in memory, and takes the same time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import ModelBundle
from bigray.compression.change import Changed, changed_module
from bigray.compression.layers import weighted_layers
from bigray.errors import SpecError
from bigray.rebuilding import rebuild_module

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn


def prune(bundle: ModelBundle, share: float, rows: NDArray[np.float32], allow_factories: Sequence[str]) -> Changed:
    """The bundle with this share of its layers' weights at zero. `rows` (rows, *shape) are preprocessed.

    Raises:
        SpecError: the module has no layer with weights that can be pruned.
        DeployError: its factory is not allowed.
    """
    module = rebuild_module(bundle, allow_factories)
    masks = prune_weights(module, share)
    zeros, total = (sum(int(count) for count in counts) for counts in zip(*map(_count, masks.values()), strict=True))
    note = f"{zeros:,} of {total:,} weights in {len(masks)} layers are zero, which saves bytes only where it is packed"
    return changed_module(module, module, rows, (note,))


def prune_weights(module: nn.Module, share: float) -> dict[str, torch.Tensor]:
    """Set the smallest `share` of all linear and convolutional weights to zero, in place.

    Returns the mask of each weight by its parameter's name, True where it was kept. Training with `keep_zeros` keeps
    them (`bigray.models.transfer`).

    Raises:
        SpecError: there is no such layer.
    """
    from torch import nn
    from torch.nn.utils import prune as torch_prune

    layers = weighted_layers(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if not layers:
        raise SpecError("--prune: the model has no linear or convolutional layer with weights of its own")
    for _, layer in layers:  # torch makes a vector of them, which it cannot of weights laid out channels-last
        weight = layer.get_parameter("weight")
        weight.data = weight.data.contiguous()
    weights = [(layer, "weight") for _, layer in layers]
    torch_prune.global_unstructured(weights, pruning_method=torch_prune.L1Unstructured, amount=share)
    masks = {f"{name}.weight" if name else "weight": layer.get_buffer("weight_mask").bool() for name, layer in layers}
    for layer, name in weights:
        torch_prune.remove(layer, name)  # type: ignore[no-untyped-call]
    return masks


def _count(mask: torch.Tensor) -> tuple[int, int]:
    return mask.numel() - int(mask.sum()), mask.numel()
