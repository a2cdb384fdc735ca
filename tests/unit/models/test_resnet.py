from __future__ import annotations

from typing import Any

import pytest
import torch

from bigray.errors import SpecError
from bigray.models import resnet


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_a_resnet_is_the_one_of_the_paper(depth: int, parameters: int) -> None:
    """0.27M, 0.46M and 0.85M in table 6 of He et al. 2015; shortcuts have none."""
    assert sum(parameter.numel() for parameter in resnet((3, 32, 32), 10, depth=depth).parameters()) == parameters


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("input_shape", "stem_stride"), [((3, 32, 32), 2), ((8, 6), 1), ((1, 5, 7), 2)])
def test_a_resnet_takes_images_of_any_size(input_shape: tuple[int, ...], stem_stride: int, norm: str) -> None:
    module = resnet(input_shape, 4, depth=6, widths=(8, 12), norm=norm, stem_stride=stem_stride)  # type: ignore[arg-type]

    assert module(torch.randn(3, *input_shape)).shape == (3, 4)


def test_each_stage_but_the_first_halves_the_image() -> None:
    module = resnet((3, 32, 32), 10, depth=14, widths=(4, 8, 16))
    sizes: list[tuple[int, ...]] = []
    for block in module.get_submodule("blocks").children():
        block.register_forward_hook(lambda _, __, features: sizes.append(tuple(features.shape[1:])))

    module(torch.zeros(1, 3, 32, 32))

    assert sizes == [(4, 32, 32)] * 2 + [(8, 16, 16)] * 2 + [(16, 8, 8)] * 2


def test_a_block_starts_as_the_identity() -> None:
    block = resnet((3, 8, 8), 2, depth=8).get_submodule("blocks.0")
    features = torch.rand(2, 16, 8, 8)

    torch.testing.assert_close(block(features), features)


def test_with_group_norm_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 3, 8, 8)
    for norm, is_alone in (("group", True), ("batch", False)):
        module = resnet((3, 8, 8), 2, depth=8, norm=norm).train()  # type: ignore[arg-type]
        assert torch.allclose(module(rows)[:2], module(rows[:2]), atol=1e-5) == is_alone


@pytest.mark.parametrize(
    ("input_shape", "params", "expected"),
    [
        ((30,), {}, r"expected images of shape \(H, W\) or \(C, H, W\), got \(30,\)"),
        ((8, 8), {"depth": 18}, r"depth 18 cannot be cut into 3 equal stages; use 6n \+ 2, such as 8 or 20"),
        ((8, 8), {"depth": 2}, "depth 2 cannot be cut"),
        ((8, 8), {"widths": []}, r"widths must be one or more whole numbers from 1, such as \[16, 32, 64\], got \[\]"),
        ((8, 8), {"widths": [16.0, 32]}, r"one or more whole numbers from 1, .*, got \[16.0, 32\]"),
        ((8, 8), {"depth": 20.0}, "depth must be a whole number from 1, got 20.0"),
        ((8, 8), {"norm": "layer"}, "norm must be 'batch' or 'group', got 'layer'"),
        ((8, 8), {"stem_stride": 3}, "stem_stride must be 1 or 2, got 3"),
        ((8, 8), {"dropout": 1}, "dropout must be at least 0 and less than 1, got 1"),
    ],
)
def test_a_resnet_refuses_what_it_cannot_be(
    input_shape: tuple[int, ...], params: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SpecError, match=f"^resnet: .*{expected}"):
        resnet(input_shape, 2, **params)
