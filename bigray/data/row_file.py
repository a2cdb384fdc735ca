"""Rows of one shape in one flat file, read at random without being held in memory.

Reading is by `pread` into the caller's array: the pages stay in the kernel's cache, which gives them up when memory is
short, and never count as the process's own, as those of a mapping would. A row that is not in the cache is asked for
ahead, together with all others of the batch, so that the disk works on many at once.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from bigray.errors import StorageError

FloatArray = NDArray[np.float32]
IndexArray = NDArray[np.int64]

CHUNK_BYTES = 8 * 2**20
"""Read or changed together where all rows are gone through."""
_ITEM_BYTES = 4


@dataclass(frozen=True)
class RowFile:
    """float32 rows (num_rows, *row_shape) in a file, in the machine's order of bytes. Indexed like an array.

    Picklable; each process opens the file when it first reads. `numpy.take` works on it. What would read all rows at
    once is refused.
    """

    path: str
    row_shape: tuple[int, ...]
    num_rows: int
    owner: Any = field(default=None, repr=False, compare=False)
    """What keeps the file on the disk in this process; does not travel."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, *self.row_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """On the disk."""
        return self.num_rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * _ITEM_BYTES

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, key: int | slice | IndexArray) -> FloatArray:
        """One row, or those of a slice or of an array of numbers; a copy."""
        if isinstance(key, slice):
            start, stop, step = key.indices(self.num_rows)
            return self._span(start, max(start, stop)) if step == 1 else self.take(np.arange(start, stop, step))
        found = self.take(np.atleast_1d(np.asarray(key)))
        return found if np.ndim(key) else cast(FloatArray, found[0])

    def take(
        self,
        indices: IndexArray,
        axis: Literal[0] = 0,
        out: FloatArray | None = None,
        mode: Literal["raise", "wrap", "clip"] = "raise",
    ) -> FloatArray:
        """As an array's own. `mode` changes nothing: a number of no row raises IndexError."""
        if axis != 0 or indices.dtype.kind not in "iu" or indices.ndim != 1:
            raise IndexError("rows are taken by an array of their numbers")
        rows = np.where(indices < 0, indices + self.num_rows, indices)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"there are rows 0 to {self.num_rows - 1}")
        found = np.empty((len(rows), *self.row_shape), np.float32) if out is None else out
        if found.shape != (len(rows), *self.row_shape) or found.dtype != np.float32 or not found.flags.c_contiguous:
            raise ValueError(f"expected a float32 array of shape {(len(rows), *self.row_shape)} to read into")
        if found.size:
            self._file.read_rows(rows, _bytes_of(found), self.row_bytes)
        return found

    def chunks(self) -> Iterator[FloatArray]:
        """All rows in order, a few megabytes at a time."""
        for start in range(0, self.num_rows, self._rows_at_once):
            yield self[start : start + self._rows_at_once]

    def rewritten(self, change: Callable[[FloatArray], FloatArray]) -> None:
        """Put `change` of each row, of the same shape, in its place."""
        with open(self.path, "r+b", buffering=0) as file:
            for start in range(0, self.num_rows, self._rows_at_once):
                changed = change(self[start : start + self._rows_at_once])
                file.seek(start * self.row_bytes)
                _write(file.fileno(), changed)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("rows that are streamed from disk are not read as a whole; take some: rows[start:stop]")

    def __iter__(self) -> Iterator[FloatArray]:
        return (row for chunk in self.chunks() for row in chunk)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "row_shape": self.row_shape, "num_rows": self.num_rows, "owner": None}

    @property
    def _rows_at_once(self) -> int:
        return max(1, CHUNK_BYTES // max(1, self.row_bytes))

    def _span(self, start: int, stop: int) -> FloatArray:
        found = np.empty((stop - start, *self.row_shape), np.float32)
        if found.size:
            self._file.read_at(start * self.row_bytes, _bytes_of(found))
        return found

    @cached_property
    def _file(self) -> _OpenFile:
        return _OpenFile(self.path, self.nbytes)


class RowWriter:
    """Appends rows to a new file, inside a `with` block."""

    def __init__(self, path: str, row_shape: tuple[int, ...], owner: Any = None) -> None:
        self.path, self.row_shape, self.num_rows, self._owner = path, row_shape, 0, owner
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def append(self, rows: NDArray[Any]) -> None:
        """(rows, *row_shape)."""
        assert rows.shape[1:] == self.row_shape, f"{rows.shape[1:]} is not {self.row_shape}"
        _write(self._fd, rows)
        self.num_rows += len(rows)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    @property
    def rows(self) -> RowFile:
        """What was written."""
        return RowFile(self.path, self.row_shape, self.num_rows, self._owner)


class _OpenFile:
    """A file descriptor for reading anywhere, closed with this object."""

    _NOT_HERE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

    def __init__(self, path: str, num_bytes: int) -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{path}: the rows cannot be read: {error.strerror}") from None
        self._path = path
        self._flags = os.RWF_NOWAIT
        """Of a row that is read in the hope that it is in the cache; 0 where the file system cannot tell."""
        if (size := os.fstat(self._fd).st_size) != num_bytes:
            raise StorageError(f"{path}: holds {size:,} bytes instead of {num_bytes:,}; it was changed or cut")

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read_rows(self, rows: IndexArray, target: memoryview, row_bytes: int) -> None:
        absent = []
        for place, offset in enumerate((rows * row_bytes).tolist()):
            piece = target[place * row_bytes : (place + 1) * row_bytes]
            if not self._is_read(offset, piece):
                absent.append((offset, piece))
        for offset, _ in absent:
            os.posix_fadvise(self._fd, offset, row_bytes, os.POSIX_FADV_WILLNEED)
        for offset, piece in absent:
            self.read_at(offset, piece)

    def read_at(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._fd, [target[done:]], offset + done)
            if count == 0:
                raise StorageError(f"{self._path}: ends before the row that is read; it was changed or cut")
            done += count

    def _is_read(self, offset: int, target: memoryview) -> bool:
        """Read a row where that needs no disk."""
        try:
            return os.preadv(self._fd, [target], offset, self._flags) == len(target)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in self._NOT_HERE or not self._flags:
                raise
            self._flags = 0
            return False


def _bytes_of(rows: NDArray[Any]) -> memoryview:
    return memoryview(rows.data).cast("B") if rows.size else memoryview(b"")


def _write(fd: int, rows: NDArray[Any]) -> None:
    """At the descriptor's place, as float32."""
    content = _bytes_of(np.ascontiguousarray(rows, np.float32))
    done = 0
    try:
        while done < len(content):
            done += os.write(fd, content[done:])
    except OSError as error:
        raise StorageError(f"rows could not be written to the disk: {error.strerror}; set TMPDIR to another") from None
