"""Weights to start from and parameters that stay as they are: `weights` and `freeze` of a model (driver and worker).

A file is read by the safetensors library, which runs nothing that is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from bigray.errors import SpecError, StorageError, did_you_mean
from bigray.specs import ModelSpec
from bigray.storage import open_storage, sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

_NAMED = 4
"""Tensors that a message names, before it counts the others."""


def weights_sha256(model: ModelSpec) -> str | None:
    """Of the file the model starts from: other bytes are another run. None where there is no such file."""
    return None if model.weights is None else sha256(_read(model.weights))


def start_from(module: nn.Module, model: ModelSpec) -> str | None:
    """Load the file's tensors into a module as its factory made it, and freeze what is to be frozen; in place.

    Returns one line about what does not fit, which stays as it was; None where all does, or there is no file.

    Raises:
        SpecError: the file cannot be read, no parameter in it fits, or a pattern of `freeze` matches none.
    """
    told = None if model.weights is None else _load(module, model.weights)
    _freeze(module, model.freeze)
    return told


def _load(module: nn.Module, path: str) -> str | None:
    import torch

    given, own = _tensors(path), module.state_dict()
    fitting = [name for name, tensor in own.items() if name in given and given[name].shape == tensor.shape]
    if not set(fitting) & {name for name, _ in module.named_parameters()}:
        raise SpecError(f"weights: '{path}': {_no_match(given, own)}")
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(given[name])
    return _misfits(path, given, own, len(fitting))


def _freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    names = dict(module.named_parameters())
    for pattern in patterns:
        matched = [parameter for name, parameter in names.items() if fnmatchcase(name, pattern)]
        if not matched:
            raise SpecError(f"freeze: '{pattern}' matches no parameter{did_you_mean(pattern, names)}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in names.values()):
        raise SpecError(f"freeze: {list(patterns)} leave nothing to train")


def _tensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, torch.Tensor] = load(_read(path))
    except SafetensorError as error:
        raise SpecError(f"weights: '{path}': not a safetensors file: {error}") from None
    return tensors


def _read(path: str) -> bytes:
    folder, _, name = path.rpartition("/")
    try:
        storage = open_storage(folder or "/")
        if storage.file_size(name) is None:
            raise SpecError(f"weights: '{path}': no such file")
        return storage.read_bytes(name)
    except StorageError as error:
        raise SpecError(f"weights: '{path}': {error}") from error


def _no_match(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    if not given:
        return "holds no tensors"
    return (
        f"none of its {len(given)} tensors is a parameter of the model: it has {_listed(sorted(given))}, "
        f"the model {_listed(list(own))}"
    )


def _misfits(
    path: str, given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], num_taken: int
) -> str | None:
    other_shape = [
        f"{name} {tuple(tensor.shape)} (there {tuple(given[name].shape)})"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    absent = [name for name in own if name not in given]
    unknown = sorted(name for name in given if name not in own)
    parts = [
        f"{text} {_listed(names)}"
        for text, names in (
            ("not taken for its shape:", other_shape),
            ("not in the file:", absent),
            ("not in the model:", unknown),
        )
        if names
    ]
    if not parts:
        return None
    return f"weights '{path}': {num_taken} of {len(own)} tensors taken; {'; '.join(parts)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
