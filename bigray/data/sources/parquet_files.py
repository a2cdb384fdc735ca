"""Parquet, whatever extension types its footer names."""

from __future__ import annotations

import base64
import struct
from typing import TYPE_CHECKING

import pyarrow as pa

from bigray.data.sources.extensions import PatchedFile, hide, restore_tensors
from bigray.data.sources.locations import SourceFile

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MAGIC = b"PAR1"
TAIL_BYTES = 8
"""The footer's length and the magic word."""
SCHEMA_KEY = b"ARROW:schema"
HIDDEN_SCHEMA_KEY = b"ARROW-schema"


def read_parquet(file: SourceFile) -> pa.Table:
    """All rows of one file."""
    with open_parquet(file) as opened:
        return restore_tensors(opened.read(), file.name)


def open_parquet(file: SourceFile, buffer_bytes: int = 0) -> ParquetFile:
    """For reading whole or by row groups: no extension type is resolved; `restore_tensors` goes with what is read.

    With `buffer_bytes` a column of a row group is read in pieces of that size, not as a whole; pyarrow's own way holds
    all row groups until the file is closed.

    Raises:
        ValueError, pa.ArrowException, OSError: it is no Parquet file, or cut.
    """
    from pyarrow import parquet

    handle = file.open()
    start, footer = _footer(handle)
    if SCHEMA_KEY not in footer:
        return parquet.ParquetFile(handle, buffer_size=buffer_bytes, pre_buffer=not buffer_bytes)
    if footer.count(SCHEMA_KEY) > 1:
        raise ValueError(f"its footer holds {SCHEMA_KEY.decode()} more than once")
    # Parquet's own reader takes the footer apart, which then has no schema of Arrow for pyarrow to believe
    hidden = footer.replace(SCHEMA_KEY, HIDDEN_SCHEMA_KEY)
    metadata = parquet.ParquetFile(_patched(handle, start, hidden)).metadata.metadata or {}
    safe = _safe_footer(footer, metadata.get(HIDDEN_SCHEMA_KEY))
    opened = file.open() if safe == footer else _patched(file.open(), start, safe)
    return parquet.ParquetFile(opened, buffer_size=buffer_bytes, pre_buffer=not buffer_bytes)


def _footer(handle: pa.NativeFile) -> tuple[int, bytes]:
    """Where the footer is, and its bytes."""
    size = handle.size()
    if size < len(MAGIC) + TAIL_BYTES:
        raise ValueError(f"its {size} bytes are no Parquet file")
    handle.seek(size - TAIL_BYTES)
    length, magic = struct.unpack("<I4s", handle.read(TAIL_BYTES))
    start = size - TAIL_BYTES - length
    if magic != MAGIC or start < len(MAGIC):
        raise ValueError("it does not end as a Parquet file does: cut off, or of another kind")
    handle.seek(start)
    return start, bytes(handle.read(length))


def _safe_footer(footer: bytes, encoded: bytes | None) -> bytes:
    if encoded is None:  # a column is named so
        return footer
    safe = base64.b64encode(hide(base64.b64decode(encoded, validate=True)))
    if len(safe) != len(encoded) or footer.count(encoded) != 1:
        raise ValueError(f"the {SCHEMA_KEY.decode()} of its footer cannot be read")
    return footer.replace(encoded, safe)


def _patched(handle: pa.NativeFile, start: int, footer: bytes) -> pa.PythonFile:
    return pa.PythonFile(PatchedFile(handle, start, footer), mode="r")
