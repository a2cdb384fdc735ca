"""The columns a model reads: how a row, given as Arrow, JSON records or a tensor, becomes an array of codes.

Training, offline prediction and the replica all come through here, so a row means the same thing in each. A code is a
number: what it stands for is told by the column's kind (`bigray.data.codes`). `Preprocessing` makes model inputs of it.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bigray.data.codes import decode_value, encode_column, encode_rows, encoder_of, is_plain_number, plain_values
from bigray.data.images import decode, decode_all
from bigray.data.text import encode, prompt_window
from bigray.errors import SpecError

FloatArray = NDArray[np.float32]


class Column(BaseModel):
    """One input column. `shape` is `()` for a single value and, say, `(28, 28)` for an image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...] = ()
    kind: Literal["number", "category", "date", "image", "text"] = "number"
    """What its codes stand for. image: brightness from 0 to 255. text: tokens."""
    categories: tuple[str, ...] = ()
    """Those that training saw; the code of one is its place in here, and -1 is that of all others."""
    nullable: bool = False
    """Whether a value may be missing: null, NaN or an empty string, with the code NaN."""
    unknown: Literal["ignore", "refuse"] = "ignore"
    """What becomes of a category that training did not see."""


class FeatureSchema(BaseModel):
    """The model's input columns, in order: many scalar columns, or exactly one tensor column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: tuple[Column, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the codes of one sample, without the batch axis."""
        return self.columns[0].shape if self.is_tensor else (len(self.columns),)

    @property
    def is_tensor(self) -> bool:
        return len(self.columns) == 1 and self.columns[0].shape != ()

    @cached_property
    def is_plain(self) -> bool:
        """Whether every value is its own code: numbers that cannot be missing."""
        return self.is_tensor or not any(column.kind != "number" or column.nullable for column in self.columns)

    @property
    def tensor_name(self) -> str:
        """Name of the single input tensor in the Open Inference Protocol."""
        return self.columns[0].name if self.is_tensor else "features"

    def from_table(self, table: pa.Table, rows: Sequence[int] | None = None) -> FloatArray:
        """Rows of an Arrow table -> codes (rows, *input_shape) float32. `rows` are the numbers to name its rows by.

        Raises:
            SpecError: a column is not there, or a value has no code; names row and column.
        """
        if missing := [column.name for column in self.columns if column.name not in table.column_names]:
            raise SpecError(f"no column {_some(missing)}; the columns are: {_some(table.column_names, 20)}")
        if self.is_tensor:
            codes = np.ascontiguousarray(_tensor_of(table, self.columns[0], rows), dtype=np.float32)
        elif self.is_plain and all(is_plain_number(table.schema.field(column.name).type) for column in self.columns):
            arrays = [column_to_numpy(table, column.name) for column in self.columns]
            with np.errstate(over="ignore"):
                codes = np.ascontiguousarray(np.stack(arrays, axis=1), dtype=np.float32)
        else:
            return np.stack([encode_column(table.column(column.name), column, rows) for column in self.columns], axis=1)
        self._refuse_non_finite(codes, rows)
        return codes

    def from_records(self, records: Sequence[Mapping[str, Any]]) -> FloatArray:
        """JSON records -> codes (rows, *input_shape) float32.

        Raises:
            SpecError: no rows, a missing or unknown column, a value that has no code, or a wrong shape.
        """
        if not isinstance(records, list) or not records:
            raise SpecError("records: expected a list with at least one row")
        values = self._values(records)
        if not self.is_plain:
            return encode_rows(self.columns, self._encoders, values)
        quick = _plain_numbers(values, self.input_shape)
        return self.checked(values) if quick is None else quick

    def to_records(self, codes: FloatArray) -> list[dict[str, Any]]:
        """Codes (rows, *input_shape) -> JSON records that have them, such as a caller would send."""
        if self.is_tensor:
            return [{self.tensor_name: values} for values in codes.tolist()]
        return [
            {column.name: decode_value(code, column) for column, code in zip(self.columns, row, strict=True)}
            for row in codes.tolist()
        ]

    def checked(self, values: Any) -> FloatArray:
        """Nested raw values, or an array of numbers -> codes (rows, *input_shape), or `SpecError` naming what is wrong.

        The values are raw ones in the order of the columns: 3 in a column of categories is the category "3".
        """
        if self.is_plain and isinstance(values, np.ndarray) and values.dtype == np.float32 and self._has_rows(values):
            return self._finite(values)
        expected = f"({', '.join(('rows', *map(str, self.input_shape)))})"
        if not self.is_plain:
            return self._checked_rows(values, expected)
        if self.columns[0].kind in ("image", "text") and isinstance(values, list):
            values = [_from_text(value, self.columns[0]) if isinstance(value, str) else value for value in values]
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

    def __getstate__(self) -> dict[Any, Any]:
        """Without what was worked out from the columns: functions cannot go to another process."""
        return {**super().__getstate__(), "__dict__": {"columns": self.columns}}

    @cached_property
    def _encoders(self) -> tuple[Callable[[Any], float], ...]:
        return tuple(encoder_of(column) for column in self.columns)

    def _checked_rows(self, values: Any, expected: str) -> FloatArray:
        if isinstance(values, np.ndarray):
            if values.dtype.kind not in "iuf":
                raise SpecError(f"{self.tensor_name}: expected numbers, got {values.dtype}")
            if values.ndim != 2 or values.shape[1:] != self.input_shape or len(values) == 0:
                raise SpecError(f"{self.tensor_name}: wrong shape {values.shape}, expected {expected}")
            values = values.tolist()
        if not isinstance(values, list) or not values:
            raise SpecError(f"{self.tensor_name}: expected a list of rows of {len(self.columns)} values")
        return encode_rows(self.columns, self._encoders, values)

    def _refuse_non_finite(self, codes: FloatArray, rows: Sequence[int] | None) -> None:
        is_bad = ~np.isfinite(codes.reshape(len(codes), -1))
        bad_rows = np.flatnonzero(is_bad.any(axis=1))
        if not len(bad_rows):
            return
        first = int(bad_rows[0])
        column = 0 if self.is_tensor else int(is_bad[first].argmax())
        raise SpecError(
            f"column '{self.columns[column].name}' holds NaN or infinite values, first in row "
            f"{first if rows is None else rows[first]} of {len(bad_rows)} such rows"
        )

    def _values(self, records: Sequence[Mapping[str, Any]]) -> list[Any]:
        names = [column.name for column in self.columns]
        try:
            if self.is_tensor:
                return [record[names[0]] for record in records]
            return [[record[name] for name in names] for record in records]
        except (KeyError, TypeError, IndexError):
            raise SpecError(_missing_column(names, records)) from None


def _tensor_of(table: pa.Table, column: Column, rows: Sequence[int] | None) -> NDArray[Any]:
    kind = table.schema.field(column.name).type
    if column.kind == "text" and column.categories and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return np.stack([_window(text or "", column) for text in table.column(column.name).to_pylist()])
    if column.kind == "image" and len(column.shape) == 3 and is_binary(kind):
        return _pictures(table, column, 0 if rows is None or not len(rows) else int(rows[0]))
    values = column_to_numpy(table, column.name)
    if values.shape[1:] != column.shape:
        values = values.reshape(-1, *column.shape) if values[:1].size == np.prod(column.shape) else values
    if values.dtype.kind not in "biuf" or values.shape[1:] != column.shape:
        found = kind if values.dtype.kind not in "biuf" else f"of shape {values.shape[1:]}"
        raise SpecError(f"column '{column.name}' is {found}, expected numbers of shape {column.shape}")
    return values


def _pictures(table: pa.Table, column: Column, first_row: int) -> NDArray[Any]:
    try:
        return decode_all(table.column(column.name), *_layout(column), first_row=first_row)[0]
    except SpecError as error:
        raise SpecError([f"column '{column.name}': {fault}" for fault in error.faults]) from None


def _from_text(value: str, column: Column) -> Any:
    """What a text in JSON stands for; as it is where the column has no such."""
    if column.kind == "text" and column.categories:
        return _window(value, column)
    return _picture(value, column) if len(column.shape) == 3 else value


def _window(text: str, column: Column) -> FloatArray:
    """The end of a text as tokens, (context,)."""
    tokens = encode(text, column.categories)
    if not len(tokens):
        raise SpecError(f"{column.name}: is empty")
    return prompt_window(tokens, column.shape[0])


def _picture(text: str, column: Column) -> NDArray[Any]:
    """A PNG or JPEG in base64, as JSON has it."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise SpecError(f"{column.name}: expected numbers, or a PNG or JPEG in base64") from None
    try:
        return decode(data, *_layout(column))
    except SpecError as error:
        raise type(error)(f"{column.name}: {error}") from None


def _layout(column: Column) -> tuple[tuple[int, int], Literal[1, 3]]:
    """Height and width, and channels."""
    channels, height, width = column.shape
    return (height, width), 1 if channels == 1 else 3


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, such as those of pictures."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


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
    return [_for_json(value) for value in plain_values(table.column(name)).to_pylist()]


def _for_json(value: Any) -> Any:
    """A value as JSON can hold it, with the same code."""
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return float(value) if isinstance(value, Decimal) else value


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
