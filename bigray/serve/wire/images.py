"""A picture as a body: one image, one row; and pictures as text in JSON."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest
from bigray.data.features import FeatureSchema
from bigray.data.images import FORMATS, decode
from bigray.errors import ImageTooLarge, SpecError
from bigray.serve.http import Refusal

FloatArray = NDArray[np.float32]

MAX_PIXELS, TIMES_THE_INPUT = 16_000_000, 4
"""Of what is decoded: at four to sixteen bytes each, or more where the model's own input is as large."""
MAX_ALPHA_PIXELS = 4_000_000
"""Of a picture with transparency: to lay it on white takes several copies of it, and seconds."""
MAX_REDUCED_PIXELS = 50_000_000
"""Of a JPEG, as large as a camera makes it, that is decoded at a part of its size. A progressive one is held whole."""
BRIGHTEST = 255.0
JPEG = b"\xff\xd8"
MOST_PIXELS_IN_JSON = 16_000_000
"""Of all pictures of a JSON body together: no more than one that is a body itself."""


def decode_image(body: bytes, manifest: BundleManifest) -> FloatArray:
    """A PNG or JPEG -> float32 array (1, *input_shape), in the range of values that the model was trained on.

    Raises:
        SpecError: the model takes no image, or the body is none.
        Refusal: 413, more pixels than are decoded; 415, this endpoint has no Pillow.
    """
    height, width, channels, axis = image_layout(manifest)
    with _refusals("image"):
        _num_pixels(body, (height, width))
        try:
            pixels: Any = decode(body, (height, width), channels).astype(np.float32)
        except SpecError as error:
            raise type(error)(f"body: {error}" if not isinstance(error, ImageTooLarge) else str(error)) from None
    if axis == 2:
        pixels = pixels.transpose(1, 2, 0)
    is_image = manifest.inputs.columns[0].kind == "image"  # whose codes are brightness
    low, high = (not is_image and manifest.input_range) or (0.0, BRIGHTEST)
    values = low + pixels * ((high - low) / BRIGHTEST)
    return manifest.inputs.checked(values.reshape(1, *manifest.inputs.input_shape))


def decode_picture_records(records: Any, schema: FeatureSchema) -> FloatArray:
    """JSON records of a column of pictures, as numbers or as a PNG or JPEG in base64 -> (rows, *input_shape) float32.

    Raises:
        SpecError: as `FeatureSchema.from_records`.
        Refusal: 413, more pixels than are decoded; 415, this endpoint has no Pillow.
    """
    column = schema.columns[0]
    with _refusals("records"):
        if isinstance(records, list) and len(column.shape) == 3:
            texts = [record.get(column.name) for record in records if isinstance(record, dict)]
            _check_texts([text for text in texts if isinstance(text, str)], column.shape[1:])
        return schema.from_records(records)


def _check_texts(texts: list[str], size: tuple[int, ...]) -> None:
    num_pixels = 0
    for text in texts:
        with contextlib.suppress(ValueError):  # the schema names what is no base64
            num_pixels += _num_pixels(base64.b64decode(text, validate=True), size)
        if num_pixels > MOST_PIXELS_IN_JSON:
            raise Refusal(
                413,
                f"records: pictures of more than {MOST_PIXELS_IN_JSON / 1e6:g} million pixels together; "
                f"send fewer rows, or smaller pictures",
            )


def prepare_images(manifest: BundleManifest) -> None:
    """Load what decoding needs, where the model takes images: the first one should not wait for it."""
    with contextlib.suppress(SpecError, ImportError):
        image_layout(manifest)
        from PIL import Image

        Image.preinit()


def image_layout(manifest: BundleManifest) -> tuple[int, int, Literal[1, 3], int]:
    """Height, width, channels (1 or 3) and the channels' axis of the model's input.

    Raises:
        SpecError: the input is no image.
    """
    schema = manifest.inputs
    shape = schema.input_shape
    if schema.is_tensor:
        if len(shape) == 2:
            return shape[0], shape[1], 1, 0
        if len(shape) == 3 and shape[0] in (1, 3):
            return shape[1], shape[2], 1 if shape[0] == 1 else 3, 0
        if len(shape) == 3 and shape[2] in (1, 3):
            return shape[0], shape[1], 1 if shape[2] == 1 else 3, 2
    raise SpecError(f"the model takes no image: '{schema.tensor_name}' has shape {shape}; send JSON, Arrow or .npy")


@contextlib.contextmanager
def _refusals(place: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise Refusal(415, "images need Pillow where the endpoint runs; send JSON, Arrow or .npy") from None
    except ImageTooLarge as error:
        raise Refusal(413, f"{place}: {error}") from None


def _num_pixels(data: bytes, size: tuple[int, ...]) -> int:
    """How many are decoded, by the header alone; 0 where it cannot be read, which the decoder says in its own words.

    Raises:
        Refusal: 413, more than one picture may have. Anybody may send one, so it is less than training takes.
    """
    from PIL import Image

    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(MAX_PIXELS) from None
    except Exception:  # as in decode
        return 0
    most = MAX_ALPHA_PIXELS if image.has_transparency_data else MAX_PIXELS
    limit = max(most, TIMES_THE_INPUT * size[0] * size[1])
    is_reduced = data.startswith(JPEG) and "progressive" not in image.info
    _check_size(image.size, max(limit, MAX_REDUCED_PIXELS) if is_reduced else limit)
    # what the decoder asks of a JPEG: an eighth, a quarter or half of its size where that is still more than enough
    image.draft(image.mode, (2 * size[1], 2 * size[0]))
    _check_size(image.size, limit)
    return image.size[0] * image.size[1]


def _check_size(size: tuple[int, int], limit: int) -> None:
    if size[0] * size[1] > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"image: more than {limit / 1e6:g} million pixels; send a smaller one")
