from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bigray.bundle import BundleManifest, ModelBundle
from bigray.data.features import Column, FeatureSchema
from bigray.errors import SpecError
from bigray.serve.http import Refusal
from bigray.serve.wire.bodies import decode_predict

GREY_PIXELS, TRANSPARENT_PIXELS = 0, 6
"""Colour types of a PNG's header."""
GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)


def manifest_of(bundle: ModelBundle, *columns: Column, **changes) -> BundleManifest:
    return bundle.manifest.model_copy(update={"inputs": FeatureSchema(columns=columns), **changes})


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(body: bytes, manifest: BundleManifest, kind: str = "image/png") -> np.ndarray:
    return decode_predict(body, kind, manifest)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_grey_image_of_the_models_size_is_taken_as_it_is(bundle: ModelBundle):
    rows = decode(encoded(GREY), bundle.manifest.model_copy(update={"input_range": None}))
    assert rows.dtype == np.float32
    assert rows.tolist() == [GREY.tolist()]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 3), (2, 3)), ((1, 2, 3), (1, 2, 3)), ((3, 2, 3), (3, 2, 3)), ((2, 4, 3), (2, 4, 3)), ((2, 4, 1), (2, 4, 1))],
)
def test_the_models_shape_says_how_channels_are_laid_out(bundle: ModelBundle, shape, expected):
    colour = np.zeros((8, 9, 3), np.uint8)
    colour[..., 0] = 255
    rows = decode(encoded(colour), manifest_of(bundle, Column(name="image", shape=shape), input_range=None))
    assert rows.shape == (1, *expected)
    if 3 in (shape[0], shape[-1]) and len(shape) == 3 and shape[0] != 1:
        channels = rows[0] if shape[0] == 3 else rows[0].transpose(2, 0, 1)
        assert [float(channel.mean()) for channel in channels] == [255, 0, 0]
    else:
        assert np.allclose(rows, 76, atol=1)  # red, as bright as it looks


def test_pixels_are_mapped_to_the_range_the_model_was_trained_on(bundle: ModelBundle):
    manifest = bundle.manifest.model_copy(update={"input_range": (-1.0, 1.0)})
    assert np.allclose(decode(encoded(GREY), manifest)[0], GREY / 255 * 2 - 1, atol=1e-6)


def test_another_size_is_scaled(bundle: ModelBundle):
    large = np.kron(GREY, np.ones((40, 40), np.uint8))
    rows = decode(encoded(large), bundle.manifest.model_copy(update={"input_range": None}))
    assert np.allclose(rows[0], GREY, atol=45)
    assert np.argsort(rows.ravel()).tolist() == list(range(6))


@pytest.mark.parametrize("declared", ["image/png", "image/jpeg"])
def test_a_jpeg_is_taken_even_under_the_other_name(bundle: ModelBundle, declared):
    large = np.kron(GREY, np.ones((40, 40), np.uint8))
    rows = decode(encoded(large, "JPEG"), bundle.manifest.model_copy(update={"input_range": None}), declared)
    assert np.argsort(rows.ravel()).tolist() == list(range(6))


def test_a_photograph_is_turned_upright(bundle: ModelBundle):
    turned = Image.fromarray(GREY).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    rows = decode(encoded(turned, exif=exif), bundle.manifest.model_copy(update={"input_range": None}))
    assert rows.tolist() == [GREY.tolist()]


def test_what_is_transparent_is_white(bundle: ModelBundle):
    stroke = np.zeros((2, 3, 4), np.uint8)
    stroke[0, 0, 3] = 255
    rows = decode(encoded(stroke), bundle.manifest.model_copy(update={"input_range": None}))
    assert rows[0].tolist() == [[0, 255, 255], [255, 255, 255]]


def test_sixteen_bits_become_eight(bundle: ModelBundle):
    rows = decode(encoded(GREY.astype(np.uint16) * 257), bundle.manifest.model_copy(update={"input_range": None}))
    assert rows.tolist() == [GREY.tolist()]


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_are_read(bundle: ModelBundle, mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    body = encoded(Image.new(mode, (3, 2), 1 if mode == "1" else None), kind)
    assert decode(body, bundle.manifest).shape == (1, 2, 3)


@pytest.mark.parametrize(
    "columns",
    [
        (Column(name="width"), Column(name="height")),
        (Column(name="signal", shape=(6,)),),
        (Column(name="clip", shape=(2, 3, 4, 5)),),
        (Column(name="bands", shape=(7, 8, 9)),),
    ],
)
def test_a_model_of_something_else_takes_no_image(bundle: ModelBundle, columns):
    with pytest.raises(SpecError, match="takes no image"):
        decode(encoded(GREY), manifest_of(bundle, *columns))


@pytest.mark.parametrize(
    "body",
    [b"", b"not an image", encoded(GREY)[:40], encoded(Image.fromarray(GREY), "GIF"), encoded(GREY, "JPEG")[:100]],
)
def test_what_is_no_image_is_refused_without_the_decoders_words(bundle: ModelBundle, body):
    with pytest.raises(SpecError, match="not a PNG or JPEG that can be read"):
        decode(body, bundle.manifest)


@pytest.mark.parametrize(
    ("size", "kind", "limit"),
    [
        ((10_000, 10_000), GREY_PIXELS, 16),
        ((200_000, 200_000), GREY_PIXELS, 16),
        ((16_000_001, 1), GREY_PIXELS, 16),
        ((2_001, 2_000), TRANSPARENT_PIXELS, 4),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(bundle: ModelBundle, size, kind, limit):
    header = struct.pack(">IIBBBBB", *size, 8, kind, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(Refusal, match=f" {limit} million pixels") as caught:
        decode(bomb, bundle.manifest)
    assert caught.value.status == 413


def test_a_large_jpeg_is_taken_where_it_is_decoded_at_a_part_of_its_size(bundle: ModelBundle):
    large = Image.new("L", (5000, 4000), 51)
    manifest = bundle.manifest.model_copy(update={"input_range": None})
    assert np.allclose(decode(encoded(large, "JPEG"), manifest), 51, atol=1)
    with pytest.raises(Refusal, match="16 million pixels"):  # its decoder holds all of it
        decode(encoded(large, "JPEG", progressive=True), manifest)
    with pytest.raises(Refusal, match="16 million pixels"):  # a model of this size has to have all of it
        decode(encoded(large, "JPEG"), manifest_of(bundle, Column(name="image", shape=(1500, 1500))))


def test_a_model_of_large_images_takes_larger_ones(bundle: ModelBundle):
    manifest = manifest_of(bundle, Column(name="image", shape=(3000, 4000)))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 6000, 8000, 8, 0, 0, 0, 0))
    with pytest.raises(SpecError, match="not a PNG"):  # the size is fine, but nothing follows
        decode(bomb + chunk(b"IDAT", b"") + chunk(b"IEND", b""), manifest)
