from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bigray.explanation.picture import AGAINST, FOR, bars, overlay


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int64)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (4, 6, 3)])
def test_red_is_for_the_answer_and_blue_against_it(shape: tuple[int, ...]) -> None:
    attributions = np.zeros((4, 6), np.float32)
    attributions[0, 0], attributions[3, 5] = 2.0, -2.0
    pixels = _pixels(overlay(attributions, np.ones(shape, np.float32)))

    assert pixels.shape[0] >= 256, "small pictures are enlarged"
    assert pixels.shape[1] / pixels.shape[0] == 6 / 4
    assert tuple(pixels[0, 0]) == FOR
    assert tuple(pixels[-1, -1]) == AGAINST
    middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
    assert len(set(middle.tolist())) == 1, "where nothing speaks, the picture is grey"


def test_a_picture_without_attributions_or_contrast_is_still_drawn() -> None:
    assert _pixels(overlay(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32))).shape == (256, 256, 3)


def test_bars_go_right_for_the_answer_and_left_against_it() -> None:
    pixels = _pixels(bars({"für": 3.0, "against": -1.0, "日本": 0.1}))
    red, blue = ((pixels == color).all(axis=2) for color in (FOR, AGAINST))

    assert red.any()
    assert blue.any()
    assert np.nonzero(red)[1].min() > np.nonzero(blue)[1].max() - 1
    assert np.nonzero(red)[0].min() < np.nonzero(blue)[0].min(), "the strongest first"
