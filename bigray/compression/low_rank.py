"""Large matrices as the product of two thin ones.

Each linear or convolutional weight, a matrix of (outputs, everything else), is cut to its largest singular values
(Denton et al. 2014, arXiv 1404.0736, in its simplest form). How many of which layer is decided over all of them: what
keeps the most of a layer's energy for a number stays. The ONNX graph has two layers for one, and the weights file the
product of both, which the bundle's own factory can load.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import ONNX, ModelBundle
from bigray.compression.change import Changed, changed_module
from bigray.compression.layers import weighted_layers
from bigray.errors import SpecError
from bigray.rebuilding import rebuild_module

if TYPE_CHECKING:
    import torch
    from torch import nn

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """A weight as it is to be factored."""

    rows: int
    columns: int
    singular_values: tuple[float, ...]
    """Largest first."""

    @property
    def most_rank(self) -> int:
        """Up to which two factors are smaller than the matrix; 0 where they never are."""
        return (self.rows * self.columns - 1) // (self.rows + self.columns)


def factor(bundle: ModelBundle, share: float, rows: FloatArray, allow_factories: Sequence[str]) -> Changed:
    """The bundle with about `share` of the numbers in its layers' weights. `rows` (rows, *shape) are preprocessed.

    Raises:
        SpecError: no layer gets smaller by it, or the bundle has no graph, which is where it would be smaller.
        DeployError: the factory is not allowed.
    """
    if bundle.onnx is None:
        raise SpecError(f"--low-rank: the bundle has no {ONNX}, and only there would it be smaller")
    whole = rebuild_module(bundle, allow_factories)
    layers = called_layers(whole, rows)
    ranks = choose_ranks([_measure(layer) for _, layer in layers], share)
    chosen = [(name, rank) for (name, _), rank in zip(layers, ranks, strict=True) if rank is not None]
    if not chosen:
        raise SpecError(f"--low-rank {share:g}: no layer of the model gets smaller by it; use a smaller share")
    factored = copy.deepcopy(whole)
    for name, rank in chosen:
        first, second = _split(factored.get_submodule(name), rank)
        _set_product(whole.get_submodule(name), first, second)
        _replace(factored, name, first, second)
    shown = ", ".join(f"{name or 'the layer'} to rank {rank}" for name, rank in chosen)
    made = changed_module(factored, whole, rows, (f"{len(chosen)} of {len(layers)} layers factored: {shown}",))
    if made.onnx is None:
        raise SpecError(f"--low-rank: cannot be served: {made.notes[-1]}")
    return made


def choose_ranks(matrices: Sequence[Matrix], share: float) -> list[int | None]:
    """A rank for each matrix, None where it stays whole, so that about `share` of all numbers is left. Pure.

    The singular directions of all matrices are taken by how much of their matrix's energy they keep for a number.
    """
    steps = sorted(
        ((value, index) for index, matrix in enumerate(matrices) for value in _worth(matrix)), key=lambda step: -step[0]
    )
    ranks = [1] * len(matrices)  # a layer without rank would let nothing through
    left = share * sum(matrix.rows * matrix.columns for matrix in matrices) - sum(map(_size, matrices, ranks))
    for _, index in steps:
        more = _size(matrices[index], ranks[index] + 1) - _size(matrices[index], ranks[index])
        if more <= left:
            ranks[index], left = ranks[index] + 1, left - more
    return [rank if rank <= matrix.most_rank else None for rank, matrix in zip(ranks, matrices, strict=True)]


def _worth(matrix: Matrix) -> list[float]:
    """Share of the energy for a number, of each direction but the first, as long as it takes more numbers."""
    energy = sum(value**2 for value in matrix.singular_values) or 1.0
    length = matrix.rows + matrix.columns
    return [value**2 / energy / length for value in matrix.singular_values[1 : matrix.most_rank + 1]]


def _size(matrix: Matrix, rank: int) -> int:
    """Numbers it takes: two factors, or the matrix where those are no smaller."""
    return min(rank * (matrix.rows + matrix.columns), matrix.rows * matrix.columns)


def called_layers(module: nn.Module, rows: FloatArray) -> list[tuple[str, nn.Module]]:
    """Name and layer of those that two in a row can stand in for: called by the module, as a layer.

    Not what derives from these classes, which may read its weight in a way of its own (attention does), nor a layer
    whose weight the module reads without calling it (a head that is applied by `functional.linear`).
    """
    import torch
    from torch import nn

    layers = weighted_layers(module, (nn.Linear, nn.Conv2d))
    plain = [(name, layer) for name, layer in layers if type(layer) in (nn.Linear, nn.Conv2d)]
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for _, layer in plain]
    try:
        with torch.inference_mode():
            module(torch.tensor(rows[:2]))
    finally:
        for hook in hooks:
            hook.remove()
    return [(name, layer) for name, layer in plain if layer in called and name and getattr(layer, "groups", 1) == 1]


def _measure(layer: nn.Module) -> Matrix:
    import torch

    matrix = _matrix(layer)
    rows, columns = matrix.shape
    return Matrix(rows, columns, tuple(torch.linalg.svdvals(matrix).tolist()))


def _matrix(layer: nn.Module) -> torch.Tensor:
    return layer.get_parameter("weight").detach().flatten(1).double()


def _split(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """Two layers, of `rank` values between them, for one."""
    import torch
    from torch import nn

    left, values, right = torch.linalg.svd(_matrix(layer), full_matrices=False)
    roots = values[:rank].sqrt()
    first_weight, second_weight = roots[:, None] * right[:rank], left[:, :rank] * roots
    has_bias = layer.bias is not None
    first: nn.Module
    second: nn.Module
    if isinstance(layer, nn.Conv2d):
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        mode = layer.padding_mode
        first = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **geometry, bias=False, padding_mode=mode)  # type: ignore[arg-type]
        second = nn.Conv2d(rank, layer.out_channels, 1, bias=has_bias)
    else:
        assert isinstance(layer, nn.Linear), "`_layers` gives these two classes"
        first = nn.Linear(layer.in_features, rank, bias=False)
        second = nn.Linear(rank, layer.out_features, bias=has_bias)
    with torch.no_grad():
        for made, weight in ((first, first_weight), (second, second_weight)):
            made.get_parameter("weight").copy_(weight.reshape(made.get_parameter("weight").shape))
        if has_bias:
            second.get_parameter("bias").copy_(layer.get_parameter("bias"))
    return first.eval(), second.eval()


def _set_product(layer: nn.Module, first: nn.Module, second: nn.Module) -> None:
    """Give the whole layer the weight that the two have together."""
    import torch

    with torch.no_grad():
        product = _matrix(second) @ _matrix(first)
        weight = layer.get_parameter("weight")
        weight.copy_(product.reshape(weight.shape))


def _replace(module: nn.Module, name: str, first: nn.Module, second: nn.Module) -> None:
    from torch import nn

    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, nn.Sequential(first, second))
