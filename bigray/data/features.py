"""The columns a model reads: how a row, given as Arrow, JSON records or a tensor, becomes its input array.

Training, offline prediction and the replica all come through here, so a row means the same thing in each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bigray.errors import SpecError

FloatArray = NDArray[np.float32]


class Column(BaseModel):
    """One input column. `shape` is `()` for a number and, say, `(28, 28)` for an image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...] = ()


class FeatureSchema(BaseModel):
    """The model's input columns, in order: many scalar columns, or exactly one tensor column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: tuple[Column, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the model sees it, without the batch axis."""
        return self.columns[0].shape if self.is_tensor else (len(self.columns),)

    @property
    def is_tensor(self) -> bool:
        return len(self.columns) == 1 and self.columns[0].shape != ()

    @property
    def tensor_name(self) -> str:
        """Name of the single input tensor in the Open Inference Protocol."""
        return self.columns[0].name if self.is_tensor else "features"

    def from_table(self, table: pa.Table) -> FloatArray:
        """Rows of an Arrow table -> float32 array (rows, *input_shape)."""
        arrays = [column_to_numpy(table, column.name) for column in self.columns]
        stacked = arrays[0] if self.is_tensor else np.stack(arrays, axis=1)
        return np.ascontiguousarray(stacked, dtype=np.float32)

    def from_records(self, records: Sequence[Mapping[str, Any]]) -> FloatArray:
        """JSON records -> float32 array (rows, *input_shape).

        Raises:
            SpecError: no rows, a missing or unknown column, a value that is not a finite number, or a wrong shape.
        """
        if not isinstance(records, list) or not records:
            raise SpecError("records: expected a list with at least one row")
        values = self._values(records)
        quick = _plain_numbers(values, self.input_shape)
        return self.checked(values) if quick is None else quick

    def checked(self, values: Any) -> FloatArray:
        """Nested numbers or an array -> float32 array (rows, *input_shape), or `SpecError` naming what is wrong."""
        if isinstance(values, np.ndarray) and values.dtype == np.float32 and self._has_rows(values):
            return self._finite(values)
        expected = f"({', '.join(('rows', *map(str, self.input_shape)))})"
        if isinstance(values, list) and holds_text(values):
            raise SpecError(f"{self.tensor_name}: expected numbers, got {_example_of_non_number(values)}")
        try:
            array = np.asarray(values)
        except ValueError:
            raise SpecError(f"{self.tensor_name}: ragged values, expected shape {expected}") from None
        if array.dtype.kind not in "iufb" or array.dtype == np.bool_:
            raise SpecError(f"{self.tensor_name}: expected numbers, got {_example_of_non_number(values)}")
        if not self._has_rows(array):
            raise SpecError(f"{self.tensor_name}: wrong shape {array.shape}, expected {expected}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            return self._finite(array.astype(np.float32, copy=False))

    def _has_rows(self, values: NDArray[Any]) -> bool:
        return values.shape[1:] == self.input_shape and len(values) > 0

    def _finite(self, values: FloatArray) -> FloatArray:
        if not _holds_throughout(np.isfinite(values)):
            raise SpecError(f"{self.tensor_name}: NaN or infinite values are not accepted")
        return np.ascontiguousarray(values)

    def _values(self, records: Sequence[Mapping[str, Any]]) -> list[Any]:
        names = [column.name for column in self.columns]
        try:
            if self.is_tensor:
                return [record[names[0]] for record in records]
            return [[record[name] for name in names] for record in records]
        except (KeyError, TypeError, IndexError):
            raise SpecError(_missing_column(names, records)) from None


def holds_text(values: list[Any]) -> bool:
    """Whether there is a string or an object in nested lists: of one long string numpy would make a whole array of
    that length, gigabytes from a small body."""
    level: list[Any] = values
    while level:
        kinds = set(map(type, level))
        if kinds & {str, bytes, dict}:
            return True
        if list not in kinds:
            return False
        level = list(chain.from_iterable(value for value in level if type(value) is list))
    return False


def _holds_throughout(mask: NDArray[np.bool_]) -> bool:
    """`mask.all()`, in a fraction of its time where there are only the numbers of one row."""
    return int(np.count_nonzero(mask)) == mask.size


def _plain_numbers(rows: Sequence[Any], shape: tuple[int, ...]) -> FloatArray | None:
    """Nested lists of plain numbers -> checked float32 array (rows, *shape), three times as fast as numpy looks through
    them.

    None for anything else, which `checked` then names.
    """
    packed: list[bytes] = []
    pack = _packer(shape[-1])
    try:
        for row in rows:
            _gather(row, shape, pack, packed)
    except (TypeError, OverflowError, ValueError, struct.error):
        return None
    found: FloatArray = np.ndarray((len(rows), *shape), np.float32, bytearray().join(packed))
    # whole numbers beyond that are not exact as doubles, from which they were rounded; NaN is to be refused by name
    return found if _holds_throughout(np.abs(found) < 2**53) else None


@lru_cache(16)
def _packer(length: int) -> Callable[..., bytes]:
    return struct.Struct(f"{length}f").pack


def _gather(values: Any, shape: tuple[int, ...], pack: Callable[..., bytes], packed: list[bytes]) -> None:
    if type(values) is not list or len(values) != shape[0]:
        raise ValueError("not this shape")
    if len(shape) > 1:
        for inner in values:
            _gather(inner, shape[1:], pack, packed)
        return
    if type(values[0]) is bool:  # counts as a number here, and nowhere else
        raise TypeError("not a number")
    packed.append(pack(*values))


def column_to_numpy(table: pa.Table, name: str) -> NDArray[Any]:
    """One Arrow column -> array (rows, *shape); tensors and equal-length lists become trailing axes."""
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combine_chunks keeps extension types chunked when there are none
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if isinstance(column, pa.FixedShapeTensorArray):
        return column.to_numpy_ndarray()  # type: ignore[no-any-return]
    if _is_list(column.type):
        return _list_to_numpy(column, name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def table_to_records(table: pa.Table, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a table as JSON records; tensors become nested lists."""
    chosen = list(names) if names is not None else table.column_names
    missing = [name for name in chosen if name not in table.column_names]
    if missing:
        raise SpecError(f"data: the table has no column '{missing[0]}'; it has: {', '.join(table.column_names)}")
    columns = [_column_values(table, name) for name in chosen]
    return [dict(zip(chosen, row, strict=True)) for row in zip(*columns, strict=True)]


def _column_values(table: pa.Table, name: str) -> list[Any]:
    kind = table.schema.field(name).type
    if isinstance(kind, pa.FixedShapeTensorType):
        return column_to_numpy(table, name).tolist()  # type: ignore[no-any-return]
    return table.column(name).to_pylist()  # type: ignore[no-any-return]


def _list_to_numpy(column: pa.Array, name: str) -> NDArray[Any]:
    shape: list[int] = []
    while _is_list(column.type):
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False)) if len(column) else np.array([0])
        if len(lengths) != 1:
            raise SpecError(
                f"data: column '{name}' holds lists of different lengths ({lengths.min()} to {lengths.max()})"
            )
        shape.append(int(lengths[0]))
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(-1, *shape)  # type: ignore[no-any-return]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _missing_column(names: Sequence[str], records: Sequence[Any]) -> str:
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            return f"records[{row}]: expected an object with {_some(names)}, got {type(record).__name__}"
        missing = [name for name in names if name not in record]
        if missing:
            return f"records[{row}]: missing {_some(missing)}"
    return f"records: expected objects with {_some(names)}"


def _some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _example_of_non_number(values: Any) -> str:
    found = next(_non_numbers(values), values)
    return repr(found)[:40]


def _non_numbers(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _non_numbers(value)
    elif isinstance(values, bool) or not isinstance(values, int | float):
        yield values
