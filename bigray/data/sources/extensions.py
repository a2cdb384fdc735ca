"""Extension types of Arrow, read without being believed.

A schema names an extension type, and pyarrow hands the bytes beside the name to the Python class that some library of
this process has registered for it; Ray Data's and old ones of pyarrow unpickle them. So the name is hidden from pyarrow
before it reads, whatever is registered: a column arrives as its storage, and only tensors, which are described by
JSON, are put together again here.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pyarrow as pa

from bigray.errors import SpecError

NAME_KEY = b"ARROW:extension:name"
HIDDEN_KEY = b"ARROW:extension-name"
"""As long as the key it stands for, so that nothing in a file moves."""
METADATA_KEY = b"ARROW:extension:metadata"
TENSORS = ("arrow.fixed_shape_tensor", "ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")


class PatchedFile(io.RawIOBase):
    """A file with some of its bytes replaced by as many others; for `pa.PythonFile`."""

    def __init__(self, file: pa.NativeFile, start: int, patch: bytes) -> None:
        self._file, self._start, self._patch = file, start, patch
        self._size = file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.size()}[whence]
        self._file.seek(position)
        return position

    def size(self) -> int:
        return int(self._size)

    def read(self, size: int | None = -1) -> bytes:
        begin = self.tell()
        data = bytes(self._file.read(None if size is None or size < 0 else size))
        first, last = max(begin, self._start), min(begin + len(data), self._start + len(self._patch))
        if first >= last:
            return data
        patch = self._patch[first - self._start : last - self._start]
        return data[: first - begin] + patch + data[last - begin :]

    def close(self) -> None:
        self._file.close()
        super().close()


def hide(schema: bytes) -> bytes:
    """A schema in Arrow's own form, its extension types under another key."""
    return schema.replace(NAME_KEY, HIDDEN_KEY)


def restore_tensors(table: pa.Table, place: str) -> pa.Table:
    """Columns whose hidden type is a tensor's become fixed-shape tensors; what was hidden is dropped from the schema.

    Raises:
        SpecError: the type of a column is described by something else than JSON, a pickle say.
    """
    for number, field in enumerate(table.schema):
        described = dict(field.metadata or {})
        name = described.pop(HIDDEN_KEY, None)
        if name is None:
            continue
        content = _description(described.pop(METADATA_KEY, b""), f"'{place}': column '{field.name}'", name.decode())
        column = table.column(number)
        if name.decode() in TENSORS:
            column = _as_tensors(column, content, f"'{place}': column '{field.name}'")
        table = table.set_column(number, pa.field(field.name, column.type, metadata=described), column)
    return table


def _description(content: bytes, place: str, name: str) -> Any:
    if not content:
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise SpecError(
            f"{place} is of the extension type '{name:.80}', which is not described by JSON and is not unpickled; "
            f"write it as fixed-shape tensors, lists or plain values"
        ) from None


def _as_tensors(column: pa.ChunkedArray, described: Any, place: str) -> pa.ChunkedArray:
    shape = _shape(described)
    if shape is None:
        raise SpecError(f"{place} is a tensor described as {str(described)[:80]}; write it in row-major order")
    try:
        chunks = [_tensor_chunk(chunk, shape) for chunk in column.chunks]
    except (pa.ArrowException, ValueError, AttributeError) as error:
        raise SpecError(f"{place} does not hold tensors of shape {shape}: {str(error).splitlines()[0]}") from None
    return pa.chunked_array(chunks, chunks[0].type) if chunks else column


def _shape(described: Any) -> tuple[int, ...] | None:
    """A list of sizes, or Arrow's own object with one and, where the axes are in another order, what that is."""
    shape = described.get("shape") if isinstance(described, dict) else described
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        return None
    order = described.get("permutation") if isinstance(described, dict) else None
    return tuple(shape) if order in (None, list(range(len(shape)))) else None


def _tensor_chunk(chunk: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    if chunk.null_count:
        raise ValueError(f"{chunk.null_count} are missing")
    if {*chunk.value_lengths().unique().to_pylist()} - {math.prod(shape)}:
        raise ValueError("other lengths")
    storage = pa.FixedSizeListArray.from_arrays(chunk.flatten(), math.prod(shape))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(storage.type.value_type, shape), storage)
