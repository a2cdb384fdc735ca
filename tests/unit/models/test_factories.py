from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bigray.errors import SpecError
from bigray.models import build_model, cnn, linear, load_factory, mlp, resnet, transformer

UserModule = Callable[[str], str]


@pytest.mark.parametrize("factory", [linear, mlp, cnn, resnet, transformer])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_factory_takes_grey_images(factory: Callable[..., torch.nn.Module], rows: int) -> None:
    assert factory((8, 6), 3)(torch.zeros(rows, 8, 6)).shape == (rows, 3)


@pytest.mark.parametrize("factory", [linear, mlp, cnn, resnet, transformer])
def test_every_factory_takes_images_with_channels(factory: Callable[..., torch.nn.Module]) -> None:
    assert factory((3, 8, 6), 4)(torch.zeros(2, 3, 8, 6)).shape == (2, 4)


@pytest.mark.parametrize("factory", [linear, mlp, transformer])
def test_tabular_factories_take_vectors(factory: Callable[..., torch.nn.Module]) -> None:
    assert factory((7,), 1)(torch.zeros(2, 7)).shape == (2, 1)


def test_an_mlp_has_the_layers_it_was_asked_for() -> None:
    shapes = [tuple(weights.shape) for weights in mlp((5,), 2, hidden=(7, 3)).parameters()]

    assert shapes == [(7, 5), (7,), (3, 7), (3,), (2, 3), (2,)]


def test_an_mlp_without_hidden_layers_is_affine() -> None:
    assert [tuple(weights.shape) for weights in mlp((5,), 2, hidden=()).parameters()] == [(2, 5), (2,)]


@pytest.mark.parametrize("factory", [mlp, cnn, resnet, transformer])
def test_dropout_is_there_only_when_asked_for(factory: Callable[..., torch.nn.Module]) -> None:
    def has_dropout(module: torch.nn.Module) -> bool:
        return any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in module.modules())

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


def test_a_transformer_has_the_blocks_it_was_asked_for() -> None:
    module = transformer((5, 3), 2, width=8, depth=3, heads=2, mlp_ratio=2)
    weights = {name: tuple(weight.shape) for name, weight in module.named_parameters() if weight.dim() == 2}

    assert len([name for name in weights if name.startswith("blocks.")]) == 3 * 4
    assert weights["embedding.weight"] == (8, 3)
    assert weights["positions"] == (5, 8)
    assert weights["blocks.2.perceptron.1.weight"] == (16, 8)
    assert weights["head.weight"] == (2, 8)


def test_a_transformer_knows_the_places_of_its_tokens() -> None:
    torch.manual_seed(0)
    module, rows = transformer((6, 3), 2).eval(), torch.randn(1, 6, 3)

    assert not torch.allclose(module(rows), module(rows.flip(1)), atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_transformer_sees_no_later_token(causal: bool) -> None:
    """The last token is not seen by those before it."""
    torch.manual_seed(0)
    module, rows = transformer((6, 3), 2, causal=causal).eval(), torch.randn(1, 6, 3)
    seen: list[torch.Tensor] = []
    module.get_submodule("blocks").register_forward_hook(lambda _, __, tokens: seen.append(tokens))

    module(rows)
    rows[:, -1] += 1.0
    module(rows)

    assert torch.equal(seen[0][:, :-1], seen[1][:, :-1]) == causal
    assert not torch.equal(seen[0][:, -1], seen[1][:, -1])


def test_a_transformer_trains_with_fused_attention_also_with_dropout() -> None:
    rows = torch.randn(2, 6, 3)
    module = transformer((6, 3), 2, dropout=0.1).train()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(rows).sum().backward()

    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


def test_each_line_of_an_image_is_a_token_of_all_its_channels() -> None:
    images = torch.randn(4, 3, 8, 6)
    torch.manual_seed(0)
    by_image = transformer((3, 8, 6), 2)
    torch.manual_seed(0)
    by_line = transformer((8, 18), 2)

    torch.testing.assert_close(by_image(images), by_line(images.transpose(1, 2).reshape(4, 8, 18)))


@pytest.mark.parametrize(
    ("input_shape", "params", "expected"),
    [
        ((2, 3, 4, 5), {}, r"expected rows of shape \(T,\), \(T, F\) or \(C, H, W\), got \(2, 3, 4, 5\)"),
        ((8,), {"width": 30}, "width 30 cannot be cut into 4 heads; use a multiple of 4"),
        ((8,), {"depth": 0}, "must be whole numbers from 1, got 64, 0 and 4"),
        ((8,), {"width": 64.0}, "must be whole numbers from 1, got 64.0, 2 and 4"),
        ((8,), {"mlp_ratio": 0.001}, "mlp_ratio 0.001 leaves a width of 64 nothing"),
        ((8,), {"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_a_transformer_refuses_what_it_cannot_be(
    input_shape: tuple[int, ...], params: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SpecError, match=f"^transformer: .*{expected}"):
        transformer(input_shape, 2, **params)


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
    with pytest.raises(SpecError, match=r"input_shape=\(3,\), num_outputs=2, params=\{'bias': \[\], 'wide': 1\}"):
        build_model("bigray.models:linear", {"bias": [], "wide": 1}, (3,), 2)


@pytest.mark.parametrize("path", ["bigray.models", "bigray.models:", ":mlp", ""])
def test_a_factory_of_another_form_is_refused(path: str) -> None:
    with pytest.raises(SpecError, match=r"expected the form 'package\.module:callable'"):
        load_factory(path)


@pytest.mark.parametrize(
    ("factory", "params"),
    [
        ("mlp", {"hidden": 64}),
        ("mlp", {"hidden": [0]}),
        ("mlp", {"hidden": [4.5]}),
        ("mlp", {"dropout": 1.5}),
        ("mlp", {"dropout": -0.5}),
        ("cnn", {"channels": [0]}),
        ("cnn", {"channels": 8}),
        ("cnn", {"dropout": 1.0}),
    ],
    ids=str,
)
def test_sizes_and_shares_that_make_no_layer_are_refused_before_torch_is_asked(
    factory: str, params: dict[str, object]
) -> None:
    name = next(iter(params))
    with pytest.raises(SpecError, match=f"^{factory}: {name} must be"):
        build_model(f"bigray.models:{factory}", params, (8, 8), 3)
