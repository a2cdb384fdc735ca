"""Arrow IPC, as a stream or as a file, whatever extension types its schema names."""

from __future__ import annotations

import struct

import pyarrow as pa
import pyarrow.ipc

from bigray.data.sources.extensions import PatchedFile, hide, restore_tensors
from bigray.data.sources.locations import SourceFile

FILE_MAGIC = b"ARROW1\0\0"
CONTINUATION = b"\xff\xff\xff\xff"
"""Before the length of a message; files older than Arrow 0.15 have the length alone."""


def read_ipc(file: SourceFile) -> pa.Table:
    """All rows of one file.

    Raises:
        ValueError, pa.ArrowException, OSError: it is of another kind, cut, or says what is not so.
    """
    with file.open() as handle:
        start, end = _schema_message(handle)
        handle.seek(0)
        message = hide(bytes(handle.read(end)))
        patched = pa.PythonFile(PatchedFile(handle, 0, message), mode="r")
        # a file is a stream between a magic word and an index, which is of no use to who reads all of it
        patched.seek(start)
        table = pa.ipc.open_stream(patched).read_all()
    table.validate(full=True)  # else a false offset reads other memory
    return restore_tensors(table, file.name)


def _schema_message(handle: pa.NativeFile) -> tuple[int, int]:
    """Where the stream starts, and where its first message, the schema, ends."""
    start = len(FILE_MAGIC) if bytes(handle.read(len(FILE_MAGIC))) == FILE_MAGIC else 0
    handle.seek(start)
    head = bytes(handle.read(8))
    if len(head) < 8:
        raise ValueError("it ends before its schema")
    prefix = 8 if head.startswith(CONTINUATION) else 4
    length = struct.unpack("<i", head[prefix - 4 : prefix])[0]
    if not 0 < length <= handle.size() - start:
        raise ValueError("it is neither an Arrow stream nor an Arrow file, or cut off")
    return start, start + prefix + length
