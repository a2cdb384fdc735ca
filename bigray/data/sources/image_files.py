"""Pictures as files: `root/class/*.png`, or as a split that is given, `root/train/class/*.png` and `root/test/...`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa

from bigray.data.sources.columns import IMAGE_FIELD
from bigray.data.sources.locations import SourceFile
from bigray.errors import SpecError

IMAGE_KINDS = (".png", ".jpg", ".jpeg")
OTHER_IMAGE_KINDS = (".bmp", ".gif", ".heic", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = ("train", "test")
CHUNK_BYTES = 256 << 20
"""Of images in one chunk of the column; Arrow holds at most 2 GB in one."""
READERS = 16
"""Files read at once: they wait for the disk or the network, not for a CPU."""


def read_images(files: Sequence[SourceFile]) -> pa.Table:
    """Columns `image` (the file's bytes), `label` (its folder, where they have folders) and `path` (below the root).

    Broken pictures are told when they are decoded.

    Raises:
        SpecError: a file lies beside the class folders or too deep, is empty, or is of another image format.
    """
    classes = _classes(files)
    schema = pa.schema([pa.field("image", pa.binary(), metadata=IMAGE_FIELD)])
    images = pa.chunked_array(list(_chunks(files)), pa.binary())
    table = pa.table([images], schema=schema)
    if classes:
        table = table.append_column("label", pa.array(classes, pa.string()))
    return table.append_column("path", pa.array(["/".join(file.parts) for file in files], pa.string()))


def refuse_other_formats(files: Sequence[SourceFile]) -> None:
    for file in files:
        if file.kind in OTHER_IMAGE_KINDS:
            raise SpecError(f"'{file.name}': pictures are read as PNG or JPEG; convert it")


def _classes(files: Sequence[SourceFile]) -> list[str]:
    """The folder of each file; empty where all lie in the root."""
    is_split = all(len(file.parts) == 3 and file.parts[0] in SPLIT_FOLDERS for file in files)
    depth = 3 if is_split else min(max(len(file.parts) for file in files), 2)
    for file in files:
        if len(file.parts) != depth:
            raise SpecError(f"'{file.name}': expected every picture at folder/class/name.png, or all in one folder")
    return [file.parts[-2] for file in files] if depth > 1 else []


def _chunks(files: Sequence[SourceFile]) -> Iterator[pa.Array]:
    contents: list[bytes] = []
    size = 0
    for content in _contents(files):
        contents.append(content)
        size += len(content)
        if size >= CHUNK_BYTES:
            yield pa.array(contents, pa.binary())
            contents, size = [], 0
    yield pa.array(contents, pa.binary())


def _contents(files: Sequence[SourceFile]) -> Iterator[bytes]:
    """In order, a few at a time, so that no more than those and a chunk are in memory besides the column."""
    remaining = iter(files)
    with ThreadPoolExecutor(READERS) as pool:
        while batch := list(islice(remaining, 8 * READERS)):
            yield from pool.map(_content, batch)


def _content(file: SourceFile) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SpecError(f"'{file.name}': cannot be read: {str(error).splitlines()[0]}") from error
