"""SGD, Adam and AdamW over stacked parameters, with a rate, a decay and a momentum of its own for each lane (worker).

Each lane's step is one call of the kernel that `torch.optim` calls with `fused=True`: from the same gradients a lane
gets the same bits as the trial alone. One kernel for a lane reads its tensors once; the same maths over whole stacks,
operation by operation, reads them six times and is slower for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bigray.errors import StorageError
from bigray.specs import TrainingSpec

StateDict = dict[str, torch.Tensor]

STACKED = {
    "sgd": frozenset({"nesterov", "dampening"}),
    "adam": frozenset({"betas", "eps", "amsgrad"}),
    "adamw": frozenset({"betas", "eps", "amsgrad"}),
}
"""Optimizers that can be stacked -> the arguments they may have besides those that are each lane's own."""
_NO_TENSORS: list[torch.Tensor] = []


@dataclass(frozen=True)
class _Group:
    """One lane's parameters that share a weight decay, as views of the stacked tensors."""

    weight_decay: float
    parameters: list[torch.Tensor]
    gradients: list[torch.Tensor]
    slots: dict[str, list[torch.Tensor]]
    steps: list[torch.Tensor]


@dataclass
class _Lane:
    lr: float
    momentum: float
    groups: list[_Group] = field(default_factory=list)


class StackedOptimizer:
    """The optimizers of all lanes. `gradients` is where a backward pass leaves its result, in the given order."""

    def __init__(self, specs: Sequence[TrainingSpec], parameters: Mapping[str, torch.Tensor]) -> None:
        """`parameters` have the lanes as their first axis, one for each of `specs`, which differ in numbers only."""
        self._specs = list(specs)
        spec = specs[0]
        self._kind, params = spec.optimizer, spec.optimizer_params
        self._sgd = {"dampening": params.get("dampening", 0.0), "nesterov": params.get("nesterov", False)}
        beta1, beta2 = params.get("betas", (0.9, 0.999))
        self._adam = {
            "beta1": beta1,
            "beta2": beta2,
            "eps": params.get("eps", 1e-8),
            "amsgrad": params.get("amsgrad", False),
        }
        self._parameters = dict(parameters)
        self.gradients = [torch.zeros_like(tensor) for tensor in parameters.values()]
        self._slots = {
            slot: [torch.zeros_like(tensor) for tensor in parameters.values()] for slot in _slot_names(spec, specs)
        }
        device = self.gradients[0].device
        self._steps = torch.zeros(len(specs), device=device)
        self._is_first = [True] * len(specs)
        """By lane: SGD's first step makes the momentum."""
        self._order = _order(spec, parameters)
        self._cut()

    def step(self, factors: Sequence[float]) -> None:
        """Change the parameters by `gradients`, each lane with `factors` times its own rate."""
        if self._kind == "sgd":
            self._step_sgd(factors)
        else:
            self._step_adam(factors)

    def keep(self, rows: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> None:
        """Go on with these lanes alone; `parameters` are the caller's, already reduced to them."""
        kept = rows.tolist()
        self._parameters = dict(parameters)
        self.gradients = [gradient.index_select(0, rows) for gradient in self.gradients]
        self._slots = {slot: [t.index_select(0, rows) for t in tensors] for slot, tensors in self._slots.items()}
        self._steps = self._steps.index_select(0, rows)
        self._is_first = [self._is_first[row] for row in kept]
        self._specs = [self._specs[row] for row in kept]
        self._cut()

    def state(self, row: int) -> StateDict:
        """A lane's state as `checkpoint.pack_optimizer` names it; the tensors are live."""
        state: StateDict = {}
        spec = self._specs[row]
        if self._is_first[row] or (self._kind == "sgd" and not spec.momentum):
            return state
        for number, place in enumerate(self._order):
            if self._kind != "sgd":
                state[f"{number}.step"] = self._steps[row]
            for slot, tensors in self._slots.items():
                state[f"{number}.{slot}"] = tensors[place][row]
        return state

    def load(self, row: int, state: StateDict) -> None:
        """Take back what `state`, or `pack_optimizer` of the trial alone, gave.

        Raises:
            StorageError: it is the state of other parameters, or of another optimizer.
        """
        expected = {f"{number}.{slot}" for number in range(len(self._order)) for slot in self._slots}
        has_state = self._kind != "sgd" or bool(self._specs[row].momentum)
        found = {name for name in state if not name.endswith(".step")}
        self._is_first[row] = not state
        if not state or not has_state:
            return
        if found != expected:
            odd = min(found ^ expected)
            raise StorageError(
                f"optimizer state '{odd}' does not go with {self._kind} of {len(self._order)} parameters"
            )
        for number, place in enumerate(self._order):
            for slot, tensors in self._slots.items():
                tensors[place][row].copy_(state[f"{number}.{slot}"])
        if self._kind != "sgd":
            self._steps[row].copy_(state["0.step"])

    def _step_adam(self, factors: Sequence[float]) -> None:
        step = torch._fused_adamw_ if self._kind == "adamw" else torch._fused_adam_
        settings: dict[str, Any] = {**self._adam, "maximize": False, "grad_scale": None, "found_inf": None}
        self._steps += 1
        for lane, factor in zip(self._lanes, factors, strict=True):
            lr = lane.lr * factor
            for group in lane.groups:
                slots = group.slots
                step(
                    group.parameters,
                    group.gradients,
                    slots["exp_avg"],
                    slots["exp_avg_sq"],
                    slots.get("max_exp_avg_sq", _NO_TENSORS),
                    group.steps,
                    lr=lr,
                    weight_decay=group.weight_decay,
                    **settings,
                )
        self._is_first = [False] * len(self._lanes)

    def _step_sgd(self, factors: Sequence[float]) -> None:
        settings: dict[str, Any] = {**self._sgd, "maximize": False, "grad_scale": None, "found_inf": None}
        for lane, factor, is_first in zip(self._lanes, factors, self._is_first, strict=True):
            lr = lane.lr * factor
            for group in lane.groups:
                torch._fused_sgd_(
                    group.parameters,
                    group.gradients,
                    group.slots["momentum_buffer"] if lane.momentum else _NO_TENSORS,
                    lr=lr,
                    weight_decay=group.weight_decay,
                    momentum=lane.momentum,
                    is_first_step=is_first and lane.momentum != 0,
                    **settings,
                )
        self._is_first = [False] * len(self._lanes)

    def _cut(self) -> None:
        """Make the views that the kernels are called with."""
        tensors = list(self._parameters.values())
        groups = _groups(self._specs[0], self._order, tensors) if self._specs else []
        cut = [tensor.unbind(0) for tensor in tensors]
        gradients = [gradient.unbind(0) for gradient in self.gradients]
        slots = {slot: [tensor.unbind(0) for tensor in stacked] for slot, stacked in self._slots.items()}
        steps = self._steps.unbind(0)
        self._lanes = [_Lane(spec.scaled_lr, spec.momentum) for spec in self._specs]
        for row, (lane, spec) in enumerate(zip(self._lanes, self._specs, strict=True)):
            for decays, places in groups:
                lane.groups.append(
                    _Group(
                        spec.weight_decay if decays else 0.0,
                        [cut[place][row] for place in places],
                        [gradients[place][row] for place in places],
                        {slot: [views[place][row] for place in places] for slot, views in slots.items()},
                        [steps[row]] * len(places),
                    )
                )


def _slot_names(spec: TrainingSpec, specs: Sequence[TrainingSpec]) -> list[str]:
    if spec.optimizer == "sgd":
        return ["momentum_buffer"] if any(lane.momentum for lane in specs) else []
    return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if spec.optimizer_params.get("amsgrad") else [])]


def _decays(spec: TrainingSpec, stacked: torch.Tensor) -> bool:
    return spec.weight_decay_on == "all" or stacked.dim() - 1 >= 2


def _order(spec: TrainingSpec, parameters: Mapping[str, torch.Tensor]) -> list[int]:
    """Places of the parameters in the order in which `optimization.make_optimizer` numbers them."""
    return sorted(range(len(parameters)), key=[not _decays(spec, t) for t in parameters.values()].__getitem__)


def _groups(spec: TrainingSpec, order: list[int], tensors: list[torch.Tensor]) -> list[tuple[bool, list[int]]]:
    """(whether they decay, places of the parameters); parameters of one lane in one call of the kernel."""
    by_decay: dict[bool, list[int]] = {}
    for place in order:
        by_decay.setdefault(_decays(spec, tensors[place]), []).append(place)
    return list(by_decay.items())
