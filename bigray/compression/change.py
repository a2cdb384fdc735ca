"""What a method of compression makes of a bundle: all that differs in the new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigray.onnx_export import export_onnx, strip_metadata

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Changed:
    """The files of the new bundle that are not the old one's."""

    weights: bytes
    """safetensors that the bundle's factory can load."""
    onnx: bytes | None
    notes: tuple[str, ...] = ()
    """What a person should know of it, a sentence each."""


def changed_module(module: nn.Module, weights: nn.Module, rows: NDArray[np.float32], notes: tuple[str, ...]) -> Changed:
    """`module` as the graph, and the state of `weights`, which the factory can load: the same one, or its equal.

    `rows` (rows, *shape) are preprocessed: on them the graph has to agree with the module.
    """
    onnx, why_not = export_onnx(module, rows)
    if why_not is not None:
        notes = (*notes, f"it has no model.onnx: {why_not}")
    return Changed(_pack(weights), None if onnx is None else strip_metadata(onnx), notes)


def _pack(module: nn.Module) -> bytes:
    import safetensors.torch

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    return bytes(safetensors.torch.save(tensors))
