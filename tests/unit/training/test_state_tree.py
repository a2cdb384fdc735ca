from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bigray.training.state_tree import pack_tree, unpack_tree
from bigray.training.tensor_files import pack_tensors, unpack_tensors


def _through_a_file(values: dict[str, Any]) -> dict[str, Any]:
    return unpack_tree(unpack_tensors(pack_tensors(pack_tree(values))))


def _trained(optimizer_class: type[torch.optim.Optimizer], steps: int) -> tuple[torch.nn.Module, Any, Any]:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizer = optimizer_class(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=20)
    _go_on(module, optimizer, schedule, steps)
    return module, optimizer, schedule


def _go_on(module: torch.nn.Module, optimizer: Any, schedule: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimizer_and_a_schedule_go_on_as_if_they_had_never_been_saved(
    optimizer_class: type[torch.optim.Optimizer],
) -> None:
    module, optimizer, schedule = _trained(optimizer_class, steps=5)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    saved = _through_a_file(state)
    _go_on(module, optimizer, schedule, 5)

    other, other_optimizer, other_schedule = _trained(optimizer_class, steps=1)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(saved["optimizer"])
    other_schedule.load_state_dict(saved["schedule"])
    _go_on(other, other_optimizer, other_schedule, 5)

    assert torch.equal(module.weight, other.weight)
    assert other_schedule.get_last_lr() == schedule.get_last_lr()


def test_containers_keys_and_numbers_come_back_as_they_were() -> None:
    values = {
        "a": {1: (1, 2.5), "1": [None, True], 2.0: {}},
        "b": ["text", (), [], -math.inf],
        "c": np.float64(0.5),
        "tensor": "not one",
    }

    assert _through_a_file(values) == {**values, "c": 0.5}
    assert type(_through_a_file(values)["a"][1]) is tuple


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_keep_their_type_and_shape(dtype: torch.dtype) -> None:
    tensors = [torch.ones(shape).to(dtype) for shape in [(), (0,), (2, 3)]]
    found = _through_a_file({"some": tensors})["some"]

    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"schedule": {"fns": [len]}},
            r"schedule\['fns'\]\[0\] is a builtin_function_or_method; only tensors, numbers",
        ),
        ({"rng": {"state": np.zeros(3)}}, r"rng\['state'\] is a ndarray; only"),
        ({"cache": {(1, 2): 3}}, r"cache has a tuple for a key; only strings and numbers"),
    ],
)
def test_what_only_pickle_could_keep_is_refused_by_its_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pack_tree(values)
