"""Forward and backward passes of all lanes of a stack at once, over the same rows (worker).

Two ways with the same result: `VmappedNetwork` for any module that `torch.func` can take, and `AffineNetwork` for
chains of linear layers, by hand. By hand the first layer, whose input the lanes share, is one matrix product over all
lanes, and nothing is computed or copied that the gradients do not need: half the time of a step of a small perceptron.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigray.training.stacked_loss import StackedLoss


class StackedNetwork(Protocol):
    """K lanes of one module."""

    def gradients(self, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        """Leave the gradient of `scale` times each lane's summed losses in its place; returns the (lanes,) sums."""

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """(lanes, rows, outputs) in evaluation, without gradients."""


def make_network(
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    gradients: Sequence[torch.Tensor],
    loss: StackedLoss,
    input_shape: tuple[int, ...],
) -> StackedNetwork:
    """The fastest network that can take this module; `parameters` have the lanes as their first axis."""
    if AffineNetwork.can_take(module, input_shape):
        return AffineNetwork(module, parameters, gradients, loss)
    return VmappedNetwork(module, parameters, gradients, loss)


class VmappedNetwork:
    """Any module without state that changes and without random numbers."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        gradients: Sequence[torch.Tensor],
        loss: StackedLoss,
    ) -> None:
        self._module, self._loss = module, loss
        self._leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        self._gradients = gradients

    def gradients(self, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        self._module.train()
        leaves = list(self._leaves.values())
        outputs = self._forward(x)
        sums, gradient = self._loss.gradient(outputs, y, scale)
        found = torch.autograd.grad(outputs, leaves, gradient)
        for place, parameter_gradient in zip(self._gradients, found, strict=True):
            place.copy_(parameter_gradient)
        return sums

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        self._module.eval()
        with torch.no_grad():
            return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        def one_lane(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            found: torch.Tensor = functional_call(self._module, parameters, (x,))
            return found

        # attention as products and a softmax: torch has no fused kernel over lanes, and would take one after another
        with sdpa_kernel(SDPBackend.MATH):
            outputs: torch.Tensor = vmap(one_lane, randomness="error")(self._leaves)
        return outputs


class AffineNetwork:
    """A chain of linear layers with ReLU between them, as `bigray.models.mlp` and `linear` are.

    Activations are (lanes, features, rows): then no matrix has to be transposed, and the first layer, whose input is
    that of all lanes, is one product for all of them.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        gradients: Sequence[torch.Tensor],
        loss: StackedLoss,
    ) -> None:
        self._loss = loss
        tensors = {name: tensor.detach() for name, tensor in parameters.items()}
        places = dict(zip(parameters, gradients, strict=True))
        self._layers = [
            _Affine(
                tensors[f"{number}.weight"],
                tensors.get(f"{number}.bias"),
                places[f"{number}.weight"],
                places.get(f"{number}.bias"),
                is_rectified,
            )
            for number, is_rectified in _affine_layers(module)
        ]

    @staticmethod
    def can_take(module: nn.Module, input_shape: tuple[int, ...]) -> bool:
        """Whether the module is such a chain, with nothing hooked into it, and all of it is trained in float32."""
        if type(module) is not nn.Sequential:
            return False
        layers = list(module)
        flattens = bool(layers) and _is_plain_flatten(layers[0])
        chain = layers[1:] if flattens else layers
        is_chain = (
            all(type(layer) in (nn.Linear, nn.ReLU) for layer in chain)
            and bool(chain)
            and type(chain[0]) is nn.Linear
            and type(chain[-1]) is nn.Linear
            and not any(type(a) is type(b) is nn.ReLU for a, b in itertools.pairwise(chain))
        )
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        parameters = list(module.parameters())
        return (
            is_chain
            and (flattens or len(input_shape) == 1)
            and len(names) == len(parameters)
            and all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters)
            and not any(_has_hooks(layer) for layer in module.modules())
        )

    def gradients(self, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        rows = x.flatten(1)
        inputs, outputs = self._forward(rows)
        sums, found = self._loss.gradient(outputs.transpose(1, 2), y, scale)
        gradient = found.transpose(1, 2).contiguous()
        for layer, before in zip(self._layers[:0:-1], inputs[:0:-1], strict=True):
            gradient = layer.backward(before, gradient)
        self._layers[0].backward_shared(rows, gradient)
        return sums

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._forward(x.flatten(1))[1].transpose(1, 2)

    def _forward(self, rows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(what goes into each layer, what comes out of the last); the first entry stands for the rows."""
        first, *others = self._layers
        inputs, activation = [rows], first.forward_shared(rows)
        for layer in others:
            inputs.append(activation)
            activation = layer.forward(activation)
        return inputs, activation


class _Affine:
    """One layer of all lanes: `weight` is (lanes, outputs, inputs)."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_gradient: torch.Tensor,
        bias_gradient: torch.Tensor | None,
        is_rectified: bool,
    ) -> None:
        self._weight, self._weight_gradient, self._bias_gradient = weight, weight_gradient, bias_gradient
        self._bias = None if bias is None else bias.unsqueeze(2)
        # all lanes as one matrix, for the layer whose input they share
        self._joined_weight, self._joined_gradient = weight.flatten(0, 1), weight_gradient.flatten(0, 1)
        self._joined_bias = None if bias is None else bias.flatten().unsqueeze(1)
        self._is_rectified = is_rectified
        """Whether what goes in has passed through a ReLU; the first layer gets what goes in from outside."""

    def forward_shared(self, rows: torch.Tensor) -> torch.Tensor:
        """From (rows, inputs), the same for all lanes."""
        lanes, num_outputs, _ = self._weight.shape
        weight, columns = self._joined_weight, rows.t()
        bias = self._joined_bias
        outputs = weight @ columns if bias is None else torch.addmm(bias, weight, columns)
        return outputs.view(lanes, num_outputs, len(rows))

    def forward(self, before: torch.Tensor) -> torch.Tensor:
        if self._is_rectified:
            before.relu_()
        if self._bias is None:
            return torch.bmm(self._weight, before)
        return torch.baddbmm(self._bias, self._weight, before)

    def backward_shared(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        torch.mm(gradient.flatten(0, 1), rows, out=self._joined_gradient)
        self._sum_bias(gradient)

    def backward(self, before: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of what went in."""
        torch.bmm(gradient, before.transpose(1, 2), out=self._weight_gradient)
        self._sum_bias(gradient)
        found = torch.bmm(self._weight.transpose(1, 2), gradient)
        if self._is_rectified:
            torch.ops.aten.threshold_backward.grad_input(found, before, 0, grad_input=found)
        return found

    def _sum_bias(self, gradient: torch.Tensor) -> None:
        if self._bias_gradient is not None:
            torch.sum(gradient, 2, out=self._bias_gradient)


def _affine_layers(module: nn.Module) -> list[tuple[str, bool]]:
    """(name, whether a ReLU comes before it) of each linear layer."""
    layers, is_rectified = [], False
    for name, layer in module.named_children():
        if isinstance(layer, nn.Linear):
            layers.append((name, is_rectified))
        is_rectified = isinstance(layer, nn.ReLU)
    return layers


def _is_plain_flatten(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Flatten) and type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def _has_hooks(layer: nn.Module) -> bool:
    return any(
        getattr(layer, name)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
