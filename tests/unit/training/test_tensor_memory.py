from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bigray.training.tensor_memory import TensorMemory

KB = 1000


def test_tensors_count_while_they_live() -> None:
    with TensorMemory() as tensors:
        for _ in range(3):
            torch.ones(100 * KB, dtype=torch.uint8)
        kept = torch.ones(10 * KB, dtype=torch.uint8)
        torch.ones(95 * KB, dtype=torch.uint8)

    assert tensors.peak_bytes == 105 * KB
    assert kept.numel() == 10 * KB


def test_what_was_there_before_and_views_of_it_do_not_count() -> None:
    before = torch.ones(100 * KB)
    with TensorMemory() as tensors:
        before.view(10, -1)[2:].add_(1)

    assert tensors.peak_bytes == 0


def test_a_copy_of_an_array_counts() -> None:
    array = np.ones(100 * KB, np.uint8)
    with TensorMemory() as tensors:
        copy = torch.tensor(array)

    assert tensors.peak_bytes == copy.nbytes


def test_activations_and_gradients_count_until_the_backward_pass_needs_them_no_more() -> None:
    layers = nn.Sequential(nn.Linear(10, 1000), nn.Sigmoid(), nn.Linear(1000, 1))
    weights = sum(parameter.nbytes for parameter in layers.parameters())
    rows = torch.ones(500, 10)
    with TensorMemory() as tensors:
        layers(rows).sum().backward()

    activation = 500 * 1000 * 4
    assert 3 * activation < tensors.peak_bytes < 4 * activation + weights
    assert tensors._bytes == sum(p.grad.nbytes for p in layers.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrapper_counts_as_the_tensors_it_is_made_of(dtype: torch.dtype) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    first, second = torch.ones(50 * KB, dtype=dtype), torch.ones(50 * KB, dtype=dtype)
    with TensorMemory() as tensors:
        doubled = TwoTensor(first, second) * 2  # type: ignore[no-untyped-call]

    assert doubled.shape == (50 * KB,)
    assert tensors.peak_bytes == 2 * first.nbytes


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_model_that_compiles_a_part_of_itself_or_branches_on_its_data_is_measured(is_compiled: bool) -> None:
    def double(rows: torch.Tensor) -> torch.Tensor:
        return rows * 2

    def branch(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.cond(rows.sum() > 0, double, double, (rows,))
        return result

    part = torch.compile(double, fullgraph=True, backend="eager") if is_compiled else branch
    rows = torch.ones(1000)
    with TensorMemory() as tensors:
        made = part(rows) + 1

    assert made[0] == 3
    assert tensors.peak_bytes >= rows.nbytes
