"""PNG and JPEG files -> pixels. Training, offline prediction and the endpoint all come through `decode`, so that a
picture is the same numbers in each. Pillow does its work without Python's lock: a pool of threads is enough."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.errors import ImageTooLarge, SpecError

if TYPE_CHECKING:
    from PIL.Image import Image

PixelArray = NDArray[np.uint8]
Size = tuple[int, int]
"""Height and width."""
Column: TypeAlias = "pa.ChunkedArray | pa.Array | Sequence[bytes | None]"
"""Files, one a row; null where there is none."""

MAX_PIXELS = 50_000_000
JPEG, JPEG_SCAN = b"\xff\xd8", b"\xff\xda"
MOST_SCANS = 100
"""Of a progressive JPEG; each is worked over the whole picture, and an empty one is 16 bytes."""
FORMATS = ("PNG", "JPEG")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
EXIF_ORIENTATION = 0x0112
LYING = 5
"""From this EXIF orientation on, a picture's height and width change places."""

SMALL_BYTES = 4096
"""Of the mean file, up to which threads only wait for Python's lock: 1 is faster than 2 at 128 x 128, slower at 256."""
ROWS_AT_ONCE = 64
"""Decoded by a thread before it takes the next."""
MOST_PROBED = 1000
MOST_TOLD = 5


def decode(data: bytes, size: Size, channels: Literal[1, 3]) -> PixelArray:
    """A PNG or JPEG -> (channels, height, width), 0 to 255.

    As a person sees it: upright, on white where it is transparent; sixteen bits a pixel become eight, and another size
    is resized bilinearly.

    Raises:
        ImageTooLarge: more than `MAX_PIXELS`, or than `MOST_SCANS`.
        SpecError: it is none, or damaged.
        ImportError: there is no Pillow here.
    """
    from PIL import Image

    mode, turned = "L" if channels == 1 else "RGB", (size[1], size[0])
    _check_scans(data)
    try:
        image = _open(data)
        # a JPEG is decoded at an eighth, a quarter or half of its size where that is still more than enough
        image.draft(mode, (2 * turned[0], 2 * turned[1]))
        image = _in_mode(image, mode)
    except SpecError:
        raise
    except Exception:  # decoders raise what they like on a damaged file
        raise SpecError("not a PNG or JPEG that can be read") from None
    if image.size != turned:
        image = image.resize(turned, Image.Resampling.BILINEAR)
    pixels: PixelArray = np.asarray(image, np.uint8).reshape(*size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_all(
    column: Column,
    size: Size,
    channels: Literal[1, 3],
    policy: Literal["stop", "skip"] = "stop",
    max_bad_share: float = 0.0,
    *,
    paths: Sequence[str] | None = None,
    num_threads: int | None = None,
    first_row: int = 0,
) -> tuple[PixelArray, NDArray[np.bool_], list[str]]:
    """Pixels (rows, channels, height, width), which rows are good, and a line for each that is not.

    A row that is not good is all 0. `paths` are told beside the numbers of the rows, which count from `first_row`.

    Raises:
        SpecError: naming broken pictures, by policy "stop" any, by "skip" a greater share than `max_bad_share` or all.
    """
    num_rows = len(column)
    pixels = np.zeros((num_rows, channels, *size), dtype=np.uint8)

    def work(start: int) -> list[tuple[int, str]]:
        stop = min(start + ROWS_AT_ONCE, num_rows)
        return [(row, fault) for row in range(start, stop) if (fault := _decode_into(pixels[row], column[row]))]

    with ThreadPoolExecutor(num_threads or _num_threads(column), "decode") as pool:
        bad = [found for chunk in pool.map(work, range(0, num_rows, ROWS_AT_ONCE)) for found in chunk]
    good = np.ones(num_rows, dtype=np.bool_)
    good[[row for row, _ in bad]] = False
    faults = [f"row {first_row + row}{_path_of(row, paths)}: {fault}" for row, fault in bad]
    _check_share(faults, num_rows, policy, max_bad_share)
    return pixels, good, faults


def probe_size(column: Column) -> tuple[Size, Literal[1, 3]]:
    """The commonest height and width, and the commonest number of channels, by the headers of at most `MOST_PROBED`
    rows, spread evenly; the smallest of equally common ones.

    Raises:
        SpecError: there is no picture that can be read.
    """
    rows = np.unique(np.linspace(0, max(len(column) - 1, 0), min(len(column), MOST_PROBED), dtype=np.int64))
    probed = [found for row in rows.tolist() if (found := _probe(_bytes_of(column[row]))) is not None]
    if not probed:
        raise SpecError(f"none of the {len(rows)} pictures looked at is a PNG or JPEG that can be read")
    return _commonest([size for size, _ in probed]), _commonest([channels for _, channels in probed])


def _num_threads(column: Column) -> int:
    size = column.nbytes if isinstance(column, pa.Array | pa.ChunkedArray) else sum(len(data or b"") for data in column)
    return 1 if size <= SMALL_BYTES * len(column) else len(os.sched_getaffinity(0))


def _commonest(values: Sequence[Any]) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _decode_into(pixels: PixelArray, value: Any) -> str | None:
    """Fill in one row; what is wrong with it where it cannot be."""
    data = _bytes_of(value)
    if data is None:
        return "there is no picture"
    try:
        pixels[:] = decode(data, (pixels.shape[1], pixels.shape[2]), 1 if pixels.shape[0] == 1 else 3)
    except SpecError as error:
        return str(error)
    return None


def _bytes_of(value: pa.Scalar | bytes | None) -> bytes | None:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _path_of(row: int, paths: Sequence[str] | None) -> str:
    return "" if paths is None else f" ({paths[row]})"


def _check_share(faults: list[str], num_rows: int, policy: str, max_bad_share: float) -> None:
    if not faults or (policy == "skip" and len(faults) < num_rows and len(faults) <= max_bad_share * num_rows):
        return
    rest = len(faults) - MOST_TOLD
    told = faults[:MOST_TOLD] + ([f"and {rest} more pictures that cannot be read"] if rest > 0 else [])
    if policy == "skip":
        told.insert(
            0, f"{len(faults)} of {num_rows} pictures cannot be read, of which a share of {max_bad_share:g} may be"
        )
    raise SpecError(told)


def _probe(data: bytes | None) -> tuple[Size, Literal[1, 3]] | None:
    if data is None:
        return None
    try:
        image = _open(data)
        width, height = image.size
        lies = image.getexif().get(EXIF_ORIENTATION, 1) >= LYING
    except Exception:  # as in decode
        return None
    return (width, height) if lies else (height, width), 1 if image.mode in GREY_MODES else 3


def _open(data: bytes) -> Image:
    """By its header; nothing is decoded yet."""
    from PIL import Image

    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large() from None
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise _too_large()
    return image


def _in_mode(image: Image, mode: str) -> Image:
    from PIL import Image, ImageOps

    image.load()  # a PNG may name its orientation behind its pixels
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image if image.mode == mode else image.convert(mode)


def _check_scans(data: bytes) -> None:
    if data.startswith(JPEG) and data.count(JPEG_SCAN) > MOST_SCANS:
        raise ImageTooLarge(f"a JPEG of more than {MOST_SCANS} scans; send it as a baseline JPEG or a PNG")


def _too_large() -> ImageTooLarge:
    return ImageTooLarge(f"more than {MAX_PIXELS / 1e6:g} million pixels; send a smaller one")
