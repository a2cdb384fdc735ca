from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bigray.errors import SpecError
from bigray.models import build_model, cnn, linear, load_factory, mlp

UserModule = Callable[[str], str]


@pytest.mark.parametrize("factory", [linear, mlp, cnn])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_factory_takes_grey_images(factory: Callable[..., torch.nn.Module], rows: int) -> None:
    assert factory((8, 6), 3)(torch.zeros(rows, 8, 6)).shape == (rows, 3)


@pytest.mark.parametrize("factory", [linear, mlp, cnn])
def test_every_factory_takes_images_with_channels(factory: Callable[..., torch.nn.Module]) -> None:
    assert factory((3, 8, 6), 4)(torch.zeros(2, 3, 8, 6)).shape == (2, 4)


@pytest.mark.parametrize("factory", [linear, mlp])
def test_tabular_factories_take_vectors(factory: Callable[..., torch.nn.Module]) -> None:
    assert factory((7,), 1)(torch.zeros(2, 7)).shape == (2, 1)


def test_an_mlp_has_the_layers_it_was_asked_for() -> None:
    shapes = [tuple(weights.shape) for weights in mlp((5,), 2, hidden=(7, 3)).parameters()]

    assert shapes == [(7, 5), (7,), (3, 7), (3,), (2, 3), (2,)]


def test_an_mlp_without_hidden_layers_is_affine() -> None:
    assert [tuple(weights.shape) for weights in mlp((5,), 2, hidden=()).parameters()] == [(2, 5), (2,)]


@pytest.mark.parametrize("factory", [mlp, cnn])
def test_dropout_is_there_only_when_asked_for(factory: Callable[..., torch.nn.Module]) -> None:
    def has_dropout(module: torch.nn.Module) -> bool:
        return any(isinstance(layer, torch.nn.Dropout) for layer in module.modules())

    assert has_dropout(factory((8, 8), 2, dropout=0.5))
    assert not has_dropout(factory((8, 8), 2))


def test_a_linear_model_starts_at_zero() -> None:
    assert all((weights == 0).all() for weights in linear((4, 2), 3).parameters())


def test_a_linear_model_has_no_bias_when_told_so() -> None:
    assert [tuple(weights.shape) for weights in linear((4,), 3, bias=False).parameters()] == [(3, 4)]


def test_a_cnn_refuses_rows_of_numbers() -> None:
    with pytest.raises(SpecError, match=r"cnn: expected images of shape \(H, W\) or \(C, H, W\), got \(30,\)"):
        cnn((30,), 2)


def test_a_cnn_refuses_more_layers_than_the_image_can_be_halved() -> None:
    with pytest.raises(SpecError, match="5 layers halve an image"):
        cnn((8, 8), 2, channels=(4, 4, 4, 4, 4))
    assert cnn((8, 8), 2, channels=(4, 4, 4, 4))(torch.zeros(1, 8, 8)).shape == (1, 2)


def test_a_users_factory_is_built_with_its_parameters(user_module: UserModule) -> None:
    name = user_module(
        """
        from torch import nn
        def make(input_shape, num_outputs, scale):
            return nn.Linear(input_shape[0] * scale, num_outputs)
        """
    )
    module = build_model(f"{name}:make", {"scale": 2}, (3,), 4)

    assert isinstance(module, torch.nn.Linear)
    assert (module.in_features, module.out_features) == (6, 4)


@pytest.mark.parametrize(
    ("source", "params", "expected"),
    [
        ("def make(shape, outputs): return 3", {}, "returned int, expected a torch.nn.Module"),
        ("def make(shape, outputs): return None", {}, "returned NoneType, expected a torch.nn.Module"),
        ("def make(shape, outputs): raise ValueError('too wide')", {}, "ValueError: too wide"),
        ("def make(shape, outputs): pass", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("import torch\nmake = 5", {}, "has no callable 'make'"),
        ("raise RuntimeError('no licence')", {}, "RuntimeError: no licence"),
        ("def make(:", {}, "SyntaxError"),
    ],
)
def test_a_factory_that_gives_no_module_is_told_with_its_name(
    user_module: UserModule, source: str, params: dict[str, Any], expected: str
) -> None:
    name = user_module(source)

    with pytest.raises(SpecError) as caught:
        build_model(f"{name}:make", params, (3,), 2)

    assert expected in str(caught.value)
    assert f"'{name}:make'" in str(caught.value)


def test_the_arguments_of_a_failing_factory_are_told() -> None:
    with pytest.raises(SpecError, match=r"input_shape=\(3,\), num_outputs=2, params=\{'hidden': 'wide'\}"):
        build_model("bigray.models:mlp", {"hidden": "wide"}, (3,), 2)


@pytest.mark.parametrize("path", ["bigray.models", "bigray.models:", ":mlp", ""])
def test_a_factory_of_another_form_is_refused(path: str) -> None:
    with pytest.raises(SpecError, match=r"expected the form 'package\.module:callable'"):
        load_factory(path)
