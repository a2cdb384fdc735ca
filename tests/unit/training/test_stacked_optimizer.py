"""Stacked optimizers beside those of torch, on the same gradients: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bigray.errors import StorageError
from bigray.specs import TrainingSpec
from bigray.training.checkpoint import pack_optimizer, unpack_optimizer
from bigray.training.optimization import make_optimizer, set_lr
from bigray.training.stacked_optimizer import StackedOptimizer

NUMBERS = [(0.1, 0.0, 0.9), (0.01, 0.1, 0.5), (0.003, 0.01, 0.99)]
"""(lr, weight_decay, momentum) of each lane."""
KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "nesterov": {"optimizer": "sgd", "optimizer_params": {"nesterov": True}},
    "dampening": {"optimizer": "sgd", "optimizer_params": {"dampening": 0.2}},
    "adam": {"optimizer": "adam"},
    "amsgrad": {"optimizer": "adam", "optimizer_params": {"amsgrad": True}},
    "adamw": {"optimizer": "adamw", "optimizer_params": {"betas": [0.8, 0.95], "eps": 1e-7}},
    "decay of matrices": {"optimizer": "adamw", "weight_decay_on": "matrices"},
}


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 3))


def _specs(kind: dict[str, Any]) -> list[TrainingSpec]:
    has_momentum = kind["optimizer"] == "sgd"
    return [
        TrainingSpec.model_validate(
            {
                "task": "classification",
                "lr": lr,
                "weight_decay": decay,
                **({"momentum": momentum} if has_momentum else {}),
                **kind,
            }
        )
        for lr, decay, momentum in NUMBERS
    ]


def _stacked(specs: list[TrainingSpec]) -> tuple[dict[str, torch.Tensor], StackedOptimizer]:
    parameters = {name: torch.stack([p.detach()] * len(specs)) for name, p in _module().named_parameters()}
    return parameters, StackedOptimizer(specs, parameters)


def _draw_gradients(step: int, parameters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(tensor.shape, generator=generator) for tensor in parameters.values()]


def _step(optimizer: StackedOptimizer, gradients: list[torch.Tensor], factor: float) -> None:
    for place, gradient in zip(optimizer.gradients, gradients, strict=True):
        place.copy_(gradient)
    optimizer.step([factor] * len(gradients[0]))


def _step_alone(module: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], lane: int) -> None:
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient[lane].clone()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_lane_takes_the_steps_of_torchs_optimizer_bit_for_bit(kind: dict[str, Any]) -> None:
    specs = _specs(kind)
    parameters, stacked = _stacked(specs)
    modules = [_module() for _ in specs]
    alone = [make_optimizer(spec, module) for spec, module in zip(specs, modules, strict=True)]
    for step, factor in enumerate((1.0, 0.5, 0.25, 0.1)):
        gradients = _draw_gradients(step, parameters)
        _step(stacked, gradients, factor)
        for lane, (module, optimizer) in enumerate(zip(modules, alone, strict=True)):
            set_lr(optimizer, factor)
            _step_alone(module, optimizer, gradients, lane)
    for lane, (module, optimizer) in enumerate(zip(modules, alone, strict=True)):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameters[name][lane], parameter)
        expected, found = pack_optimizer(optimizer), stacked.state(lane)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_state_goes_from_a_lane_to_torchs_optimizer_and_back(kind: dict[str, Any]) -> None:
    specs = _specs(kind)
    parameters, stacked = _stacked(specs)
    _step(stacked, _draw_gradients(0, parameters), 1.0)
    resumed_parameters = {name: tensor.clone() for name, tensor in parameters.items()}
    resumed = StackedOptimizer(specs, resumed_parameters)
    for lane, spec in enumerate(specs):
        module = _module()
        optimizer = make_optimizer(spec, module)
        unpack_optimizer(optimizer, {name: tensor.clone() for name, tensor in stacked.state(lane).items()})
        resumed.load(lane, pack_optimizer(optimizer))
    for optimizer, _ in ((stacked, 0), (resumed, 1)):
        _step(optimizer, _draw_gradients(1, parameters), 1.0)
    assert all(torch.equal(resumed_parameters[name], tensor) for name, tensor in parameters.items())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_lanes_that_stay_go_on_as_if_none_had_left(kind: dict[str, Any]) -> None:
    specs = _specs(kind)
    parameters, stacked = _stacked(specs)
    reduced_parameters, reduced = _stacked(specs)
    for optimizer in (stacked, reduced):
        _step(optimizer, _draw_gradients(0, parameters), 1.0)
    rows = torch.tensor([0, 2])
    reduced_parameters = {name: tensor.index_select(0, rows) for name, tensor in reduced_parameters.items()}
    reduced.keep(rows, reduced_parameters)
    gradients = _draw_gradients(1, parameters)
    _step(stacked, gradients, 1.0)
    _step(reduced, [gradient.index_select(0, rows) for gradient in gradients], 1.0)
    for name, tensor in parameters.items():
        assert torch.equal(reduced_parameters[name], tensor.index_select(0, rows))


def test_a_lane_without_momentum_has_no_state() -> None:
    specs = [TrainingSpec(task="classification", optimizer="sgd", momentum=momentum) for momentum in (0.0, 0.9)]
    parameters, stacked = _stacked(specs)
    assert stacked.state(1) == {}
    _step(stacked, _draw_gradients(0, parameters), 1.0)
    assert stacked.state(0) == {}
    assert set(stacked.state(1)) == {f"{number}.momentum_buffer" for number in range(6)}


def test_the_state_of_another_optimizer_is_refused() -> None:
    parameters, stacked = _stacked(_specs({"optimizer": "adam"}))
    _, sgd = _stacked(_specs({"optimizer": "sgd"}))
    _step(sgd, _draw_gradients(0, parameters), 1.0)
    with pytest.raises(StorageError, match=r"optimizer state '0.exp_avg' does not go with adam of 6 parameters"):
        stacked.load(0, sgd.state(0))
