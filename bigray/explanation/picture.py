"""Attributions as a PNG: over the picture that was explained, or as bars of a table's columns.

Red speaks for the answer, blue against it; the stronger, the more.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigray.explanation.integrated_gradients import channel_axis

FloatArray = NDArray[np.float32]
Color = tuple[int, int, int]

FOR: Color = (214, 39, 40)
AGAINST: Color = (31, 90, 180)
LEAST_SIDE = 256
"""Pixels of the shorter side; smaller pictures are enlarged."""
STRONGEST_SHARE = 0.99
"""Attributions up to this quantile have shades of their own: one pixel must not make the others pale."""
MOST_BARS = 20
ROW_HEIGHT, NAME_WIDTH, BAR_WIDTH, MARGIN = 18, 180, 300, 8


def overlay(attributions: FloatArray, picture: FloatArray) -> bytes:
    """Attributions (H, W) over the picture (H, W), (C, H, W) or (H, W, C) of any range of values -> a PNG."""
    from PIL import Image

    gray = _gray(picture)
    strength = np.abs(attributions)
    scale = float(np.quantile(strength, STRONGEST_SHARE)) or float(strength.max()) or 1.0
    share = np.clip(strength / scale, 0, 1)[..., None]
    color = np.where((attributions > 0)[..., None], np.asarray(FOR, np.float32), np.asarray(AGAINST, np.float32))
    # the picture itself is pale, so that the colours stand out
    pixels = (1 - share) * (127 + gray[..., None] / 2) + share * color
    image = Image.fromarray(pixels.round().astype(np.uint8))
    times = max(1, -(-LEAST_SIDE // min(image.size)))
    return _png(image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST))


def bars(attributions: Mapping[str, float]) -> bytes:
    """The strongest columns of a row as bars to the right (for) and to the left (against) -> a PNG."""
    from PIL import Image, ImageDraw

    shown = sorted(attributions.items(), key=lambda item: -abs(item[1]))[:MOST_BARS]
    largest = max((abs(value) for _, value in shown), default=0.0) or 1.0
    size = (2 * MARGIN + NAME_WIDTH + BAR_WIDTH, 2 * MARGIN + ROW_HEIGHT * len(shown))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    zero = MARGIN + NAME_WIDTH + BAR_WIDTH // 2
    for number, (name, value) in enumerate(shown):
        top = MARGIN + number * ROW_HEIGHT
        end = zero + round(value / largest * BAR_WIDTH / 2)
        draw.text((MARGIN, top + 2), _latin(name), fill="black")
        draw.rectangle(
            (min(zero, end), top + 2, max(zero, end), top + ROW_HEIGHT - 4), fill=FOR if value > 0 else AGAINST
        )
    draw.line((zero, MARGIN, zero, size[1] - MARGIN), fill="black")
    return _png(image)


def _gray(picture: FloatArray) -> FloatArray:
    """(H, W) from 0 to 255, of any range."""
    axis = channel_axis(picture.shape)
    flat = picture if axis is None else picture.mean(axis=axis)
    low, high = float(flat.min()), float(flat.max())
    return np.asarray((flat - low) * (255 / (high - low)) if high > low else np.zeros_like(flat), np.float32)


def _latin(name: str, longest: int = 28) -> str:
    """As Pillow's own font can write it."""
    text = name.encode("latin-1", "replace").decode("latin-1")
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
