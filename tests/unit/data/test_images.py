from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from bigray.data.images import decode, decode_all, probe_size
from bigray.errors import ImageTooLarge, SpecError

GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
CIFAR = Path(__file__).parents[4] / "shared/data/cifar10_test.parquet"


def _encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


GOOD = _encoded(GREY)
BROKEN = {"not an image": b"no", "empty": b"", "cut": GOOD[:40], "a GIF": _encoded(GREY, "GIF")}


def _turned(pixels: np.ndarray) -> bytes:
    """As a camera held sideways saves it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return _encoded(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90), exif=exif)


def test_an_image_of_the_wanted_size_keeps_its_pixels() -> None:
    pixels = decode(GOOD, (2, 3), 1)

    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [GREY.tolist()]
    assert decode(GOOD, (2, 3), 3).tolist() == [GREY.tolist()] * 3


def test_colours_come_first_and_grey_is_as_bright_as_they_look() -> None:
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 0] = 255

    assert decode(_encoded(red), (2, 3), 3).mean(axis=(1, 2)).tolist() == [255, 0, 0]
    assert decode(_encoded(red), (2, 3), 1).tolist() == [[[76] * 3] * 2]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_another_size_is_resized(kind: str) -> None:
    large = _encoded(np.kron(GREY, np.ones((40, 40), np.uint8)), kind)

    assert np.abs(decode(large, (2, 3), 1)[0].astype(int) - GREY).max() < 45
    assert decode(large, (7, 5), 3).shape == (3, 7, 5)


def test_a_photograph_is_turned_upright() -> None:
    assert decode(_turned(GREY), (2, 3), 1).tolist() == [GREY.tolist()]


def test_what_is_transparent_is_white_and_sixteen_bits_become_eight() -> None:
    stroke = np.zeros((2, 3, 4), np.uint8)
    stroke[0, 0, 3] = 255

    assert decode(_encoded(stroke), (2, 3), 1).tolist() == [[[0, 255, 255], [255, 255, 255]]]
    assert decode(_encoded(GREY.astype(np.uint16) * 257), (2, 3), 1).tolist() == [GREY.tolist()]


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_no_image_is_told_without_the_decoders_words(data: bytes) -> None:
    with pytest.raises(SpecError, match=r"^not a PNG or JPEG that can be read$"):
        decode(data, (2, 3), 1)


@pytest.mark.parametrize("size", [(10_000, 10_000), (200_000, 200_000), (50_000_001, 1)])
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")

    with pytest.raises(ImageTooLarge, match="50 million pixels") as caught:
        decode(bomb, (2, 3), 1)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_jpeg_of_a_thousand_empty_scans_is_refused() -> None:
    with pytest.raises(ImageTooLarge, match="more than 100 scans"):
        decode(_encoded(GREY, "JPEG") + b"\xff\xda" * 1000, (2, 3), 1)


def test_one_broken_image_in_ten_thousand_is_named_by_its_row_and_path() -> None:
    files = [GOOD] * 10_000
    files[7_777] = GOOD[:40]
    paths = [f"cat/{row}.png" for row in range(10_000)]

    with pytest.raises(SpecError) as caught:
        decode_all(pa.chunked_array([files[:9_000], files[9_000:]]), (2, 3), 1, paths=paths, num_threads=1)

    assert str(caught.value) == "row 7777 (cat/7777.png): not a PNG or JPEG that can be read"


def test_broken_images_are_skipped_up_to_a_share() -> None:
    column = pa.array([GOOD, b"no", GOOD, None])

    pixels, good, faults = decode_all(column, (2, 3), 1, "skip", 0.5)

    assert good.tolist() == [True, False, True, False]
    assert faults == ["row 1: not a PNG or JPEG that can be read", "row 3: there is no picture"]
    assert pixels[good].tolist() == [[GREY.tolist()]] * 2
    assert not pixels[~good].any()
    with pytest.raises(SpecError, match=r"^2 of 4 pictures cannot be read, of which a share of 0\.4 may be\nrow 1: "):
        decode_all(column, (2, 3), 1, "skip", 0.4)


def test_of_nothing_but_broken_images_none_is_skipped() -> None:
    with pytest.raises(SpecError, match="9 of 9 pictures cannot be read") as caught:
        decode_all([b"no"] * 9, (2, 3), 1, "skip", 1.0)

    assert caught.value.faults[-1] == "and 4 more pictures that cannot be read"


def test_every_row_is_what_it_is_alone_whatever_the_number_of_threads() -> None:
    files = [_encoded(np.full((4, 4, 3), value, np.uint8), "JPEG") for value in range(256)]
    alone = np.stack([decode(data, (4, 4), 3) for data in files])

    for num_threads in (1, 3):
        pixels, good, faults = decode_all(pa.array(files), (4, 4), 3, num_threads=num_threads)
        np.testing.assert_array_equal(pixels, alone)
        assert good.all()
        assert not faults


def test_the_size_is_that_of_most_images_upright() -> None:
    colour = _encoded(np.zeros((5, 5, 3), np.uint8))

    assert probe_size(pa.array([colour, _turned(GREY), None, b"no", GOOD])) == ((2, 3), 1)
    assert probe_size([colour, GOOD]) == ((2, 3), 1)
    assert probe_size([colour]) == ((5, 5), 3)
    with pytest.raises(SpecError, match="none of the 2 pictures"):
        probe_size([b"no", None])


@pytest.mark.skipif(not CIFAR.exists(), reason="no copy of CIFAR-10 beside the checkout")
def test_images_of_a_parquet_file_are_decoded() -> None:
    from bigray.data.sources import read_table

    column = read_table(str(CIFAR)).column("image").slice(0, 200)
    size, channels = probe_size(column)
    pixels, good, _ = decode_all(column, size, channels)

    assert pixels.shape == (200, 3, 32, 32)
    assert good.all()
    assert 100 < pixels.mean() < 140
