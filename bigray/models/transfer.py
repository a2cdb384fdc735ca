"""Weights to start from and what of them stays as it is: a model's `weights`, `freeze`, `keep_zeros` (driver, worker).

A file is read by the safetensors library, which runs nothing that is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from bigray.errors import SpecError, StorageError, did_you_mean
from bigray.specs import ModelSpec, TrainingSpec
from bigray.storage import open_storage, sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

_NAMED = 4
"""Tensors that a message names, before it counts the others."""


def weights_sha256(model: ModelSpec) -> str | None:
    """Of the file the model starts from: other bytes are another run. None where there is no such file."""
    return None if model.weights is None else sha256(_read(model.weights))


def keep_zeros_fault(model: ModelSpec, training: TrainingSpec) -> str | None:
    """Why the zeros of a model would not stay, where these settings move them; None where they do."""
    if model.keep_zeros and training.strategy == "fsdp":
        return "keep_zeros: is not for strategy = 'fsdp', which makes other parameters of the model's; use 'ddp'"
    return None


def start_from(module: nn.Module, model: ModelSpec) -> str | None:
    """Load the file's tensors into a module as its factory made it, and hold what is to stay as it is; in place.

    Returns one line about what does not fit, which stays as it was; None where all does, or there is no file.

    Raises:
        SpecError: the file cannot be read, no parameter in it fits, a pattern of `freeze` matches none, or there is no
            zero to keep.
    """
    taken, told = ((), None) if model.weights is None else _load(module, model.weights)
    _freeze(module, model.freeze)
    if model.keep_zeros:
        _keep_zeros(module, taken)
    return told


def _load(module: nn.Module, path: str) -> tuple[Collection[str], str | None]:
    """The names of the tensors that were taken, and a line about the others."""
    import torch

    given, own = _tensors(path), module.state_dict()
    fitting = [name for name, tensor in own.items() if name in given and given[name].shape == tensor.shape]
    if not set(fitting) & {name for name, _ in module.named_parameters()}:
        raise SpecError(f"weights: '{path}': {_no_match(given, own)}")
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(given[name])
    return fitting, _misfits(path, given, own, len(fitting))


def _keep_zeros(module: nn.Module, taken: Collection[str]) -> None:
    """Let no gradient reach what is 0 in the matrices that were taken.

    The hooks run before a gradient is added to `.grad`, so what averages, clips or sums gradients sees zeros. All of
    bigray's optimizers leave a number alone that is 0 and has never had a gradient: momenta and averages of zeros are
    zeros, and decay takes a share of nothing.
    """
    matrices = [parameter for name, parameter in module.named_parameters() if name in taken and parameter.ndim >= 2]
    zeros = [(parameter, parameter.detach() == 0) for parameter in matrices]
    if not any(bool(is_zero.any()) for _, is_zero in zeros):
        raise SpecError("keep_zeros: no matrix that was taken from weights has a zero; leave it out, or prune them")
    for parameter, is_zero in zeros:
        if parameter.requires_grad and bool(is_zero.any()):
            parameter.register_hook(_without(is_zero))  # type: ignore[no-untyped-call]


def _without(is_zero: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient without what it has for these numbers, also where that is not finite."""

    def mask(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal is_zero
        is_zero = is_zero.to(gradient.device)  # the module moves to its device after this was made
        return gradient.masked_fill(is_zero, 0.0)

    return mask


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
