"""A picture as a body: one image, one row."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest
from bigray.errors import SpecError
from bigray.serve.http import Refusal

if TYPE_CHECKING:
    from PIL.Image import Image

FloatArray = NDArray[np.float32]

MAX_PIXELS, TIMES_THE_INPUT = 16_000_000, 4
"""Of what is decoded: at four to sixteen bytes each, or more where the model's own input is as large."""
MAX_ALPHA_PIXELS = 4_000_000
"""Of a picture with transparency: to lay it on white takes several copies of it, and seconds."""
MAX_REDUCED_PIXELS = 50_000_000
"""Of a JPEG, as large as a camera makes it, that is decoded at a part of its size. A progressive one is held whole."""
BRIGHTEST = 255.0
JPEG, JPEG_SCAN = b"\xff\xd8", b"\xff\xda"
MOST_SCANS = 100
"""Of a progressive JPEG; each is worked over the whole picture, and an empty one is 16 bytes."""


def decode_image(body: bytes, manifest: BundleManifest) -> FloatArray:
    """A PNG or JPEG -> float32 array (1, *input_shape), in the range of values that the model was trained on.

    Raises:
        SpecError: the model takes no image, or the body is none.
        Refusal: 413, more pixels than are decoded; 415, this endpoint has no Pillow.
    """
    height, width, channels, axis = image_layout(manifest)
    image = _load(body, "L" if channels == 1 else "RGB", (width, height))
    pixels: Any = np.asarray(image, np.float32)
    if channels == 3 and axis == 0:
        pixels = pixels.transpose(2, 0, 1)
    low, high = manifest.input_range or (0.0, BRIGHTEST)
    values = low + pixels * ((high - low) / BRIGHTEST)
    return manifest.inputs.checked(values.reshape(1, *manifest.inputs.input_shape))


def prepare_images(manifest: BundleManifest) -> None:
    """Load what decoding needs, where the model takes images: the first one should not wait for it."""
    with contextlib.suppress(SpecError, ImportError):
        image_layout(manifest)
        from PIL import Image

        Image.preinit()


def image_layout(manifest: BundleManifest) -> tuple[int, int, int, int]:
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
            return shape[1], shape[2], shape[0], 0
        if len(shape) == 3 and shape[2] in (1, 3):
            return shape[0], shape[1], shape[2], 2
    raise SpecError(f"the model takes no image: '{schema.tensor_name}' has shape {shape}; send JSON, Arrow or .npy")


def _load(body: bytes, mode: str, size: tuple[int, int]) -> Image:
    try:
        from PIL import Image
    except ImportError:
        raise Refusal(415, "images need Pillow where the endpoint runs; send JSON, Arrow or .npy") from None
    if body.startswith(JPEG) and body.count(JPEG_SCAN) > MOST_SCANS:
        raise Refusal(413, f"image: a JPEG of more than {MOST_SCANS} scans; send it as a baseline JPEG or a PNG")
    try:
        image: Image.Image = Image.open(io.BytesIO(body), formats=("PNG", "JPEG"))
        _bound_size(image, mode, size, is_jpeg=body.startswith(JPEG))
        image = _in_mode(image, mode)
    except Refusal:
        raise
    except Image.DecompressionBombError:
        raise _too_large(MAX_PIXELS) from None
    except Exception:  # decoders raise what they like on a damaged file
        raise SpecError("body: not a PNG or JPEG that can be read") from None
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def _bound_size(image: Image, mode: str, size: tuple[int, int], *, is_jpeg: bool) -> None:
    """See, before anything is decoded, that it takes no more memory than a picture may."""
    most = MAX_ALPHA_PIXELS if image.has_transparency_data else MAX_PIXELS
    limit = max(most, TIMES_THE_INPUT * size[0] * size[1])
    is_reduced = is_jpeg and "progressive" not in image.info
    _check_size(image.size, max(limit, MAX_REDUCED_PIXELS) if is_reduced else limit)
    # a JPEG is decoded at an eighth, a quarter or half of its size where that is still more than enough
    image.draft(mode, (2 * size[0], 2 * size[1]))
    _check_size(image.size, limit)


def _in_mode(image: Image, mode: str) -> Image:
    """As a person sees it: upright, on white where it is transparent, sixteen bits a pixel as eight."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image.convert(mode)


def _check_size(size: tuple[int, int], limit: int) -> None:
    if size[0] * size[1] > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"image: more than {limit / 1e6:g} million pixels; send a smaller one")
