from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bigray.errors import SpecError
from bigray.models import mlp
from bigray.models.mlp import usual_dim

ROWS = torch.tensor([[0.5, 2.0, -1.5, 0.0], [0.1, 0.0, 3.0, 1.0]])


def test_codes_go_through_tables_behind_the_other_columns() -> None:
    module = mlp((4,), 3, hidden=(), embeddings=[(1, 3), (3, 2)], embedding_dim=2)
    seen: list[torch.Tensor] = []
    module[-1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))  # type: ignore[index]

    module(ROWS)

    first, second = (parameter for name, parameter in module.named_parameters() if "tables" in name)
    assert (first.shape, second.shape) == ((4, 2), (3, 2))
    expected = [torch.cat([ROWS[0, [0, 2]], first[3], second[1]]), torch.cat([ROWS[1, [0, 2]], first[1], second[2]])]
    assert torch.equal(seen[0], torch.stack(expected))


@pytest.mark.parametrize("code", [-1.0, 3.0, 1e9, math.nan, math.inf])
def test_a_code_that_is_no_category_is_a_row_of_zeros_that_training_leaves(code: float) -> None:
    module = mlp((1,), 1, hidden=(), embeddings=[(0, 3)])
    weight = module.get_parameter("1.tables.0.weight")
    outputs = module(torch.full((2, 1), code))
    outputs.sum().backward()

    assert torch.equal(outputs, module.get_parameter("2.bias").expand(2, 1))
    assert weight.grad is not None
    assert not weight.grad.any()


def test_columns_may_all_be_codes() -> None:
    assert mlp((2,), 3, embeddings=[(1, 4), (0, 9)])(torch.zeros(5, 2)).shape == (5, 3)


def test_without_embeddings_the_layers_are_named_as_ever() -> None:
    assert list(mlp((5,), 2, hidden=(7,)).state_dict()) == ["1.weight", "1.bias", "3.weight", "3.bias"]


def test_the_usual_width_grows_slower_than_the_number_of_categories() -> None:
    assert [usual_dim(size) for size in (1, 2, 10, 100, 100_000)] == [2, 2, 6, 21, 50]


@pytest.mark.parametrize(
    ("input_shape", "params", "expected"),
    [
        ((2, 3), {"embeddings": [(0, 3)]}, r"the rows have shape \(2, 3\); remove them"),
        ((4,), {"embeddings": [(0, 3, 5)]}, "must be pairs of column and number of categories"),
        ((4,), {"embeddings": [(4, 3)]}, r"name columns \[4\]; use different ones from 0 to 3"),
        ((4,), {"embeddings": [(1, 3), (1, 3)]}, r"name columns \[1, 1\]"),
        ((4,), {"embeddings": [(1, 0)]}, "need 1 category or more"),
        ((4,), {"embeddings": [(1, 3)], "embedding_dim": 0}, "embedding_dim must be 1 or more, got 0"),
    ],
)
def test_embeddings_that_do_not_suit_the_columns_are_refused(
    input_shape: tuple[int, ...], params: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SpecError, match=f"^mlp: .*{expected}"):
        mlp(input_shape, 2, **params)
