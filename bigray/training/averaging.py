"""The mean of all ranks' gradients in one message, for models so small that DDP could not send a part of them early."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

ONE_MESSAGE_BYTES = 2**20
"""DDP's first bucket. What fits in it is sent when the whole backward pass is done, by DDP too."""


class AveragedGradients:
    """Gradients as views of one vector, which one all_reduce averages; the loss of the batch goes along in it.

    Does what DDP does for such a model, without its hooks on every parameter and its work around the forward pass.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], world_size: int) -> None:
        """The parameters are of one type and device, and have gradients of zero from now on."""
        self._world_size = world_size
        sizes = [parameter.numel() for parameter in parameters]
        self._vector = parameters[0].new_zeros(sum(sizes) + 1)
        self._loss = self._vector[-1]
        for parameter, part in zip(parameters, torch.split(self._vector[:-1], sizes), strict=True):
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())

    def average(self, own_loss: torch.Tensor) -> torch.Tensor:
        """Every rank, after its last backward pass; returns the sum of the losses of all ranks (float64 scalar)."""
        self._loss.copy_(own_loss)
        dist.all_reduce(self._vector)
        loss = self._loss.double()
        self._vector /= self._world_size
        return loss

    def are_finite(self) -> bool:
        """Of gradients and loss; a NaN or an infinity anywhere is in their sum."""
        return bool(self._vector.sum().isfinite())

    def clear(self) -> None:
        """Back to zero, before the next step."""
        self._vector.zero_()


def fit_in_one_message(module: torch.nn.Module) -> bool:
    """Whether this module's gradients can go by `AveragedGradients`: few, of one type, laid out without gaps.

    Not with buffers: those are DDP's to keep equal.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    is_dense = all(torch.empty_like(parameter).stride() == parameter.stride() for parameter in parameters)
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    num_bytes = sum(parameter.nbytes for parameter in parameters)
    return is_dense and len(kinds) == 1 and num_bytes <= ONE_MESSAGE_BYTES and not any(True for _ in module.buffers())
