"""One raw value of a column <-> its code: the number that stands for it in the rows of a `FeatureSchema`.

A number is its own code, a category is its place among those seen in training, a date is its days since 1970-01-01.
Records take the way of single values and tables that of whole columns; both give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigray.errors import SpecError

if TYPE_CHECKING:
    from bigray.data.features import Column

FloatArray = NDArray[np.float32]

UNSEEN = -1.0
"""Code of a category that training did not see; a missing value is NaN."""
UNSEEN_NAME = "(unseen in training)"
"""Stands for such a category where a code is turned back into a value."""

_MOST_BITS = 256
"""Of a whole number that is written out: of far longer ones Python refuses to."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_MICROSECONDS_A_DAY = 86_400_000_000


def is_missing(value: Any) -> bool:
    """Null, NaN and the empty string."""
    return value is None or (isinstance(value, float | str) and (value == "" or value != value))


def category_text(value: Any) -> str:
    """A category's name, however its value was written: true and True, 1 and 1.0 are one category.

    Raises:
        ValueError: lists, objects and infinite numbers name none.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() <= _MOST_BITS:
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(float(value))
    if isinstance(value, date):
        return value.isoformat()
    raise ValueError("expected a category")


def days_since_1970(value: Any) -> float:
    """An ISO 8601 date or time, a `date`, or a number of days. Times without a zone are UTC.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str | date):
        raise ValueError("expected a date")
    if isinstance(value, int | float):
        return float(value)
    moment = value if isinstance(value, date) else datetime.fromisoformat(value.strip())
    if not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day)
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (aware - _EPOCH) // _MICROSECOND / _MICROSECONDS_A_DAY


def encoder_of(column: Column) -> Callable[[Any], float]:
    """What turns a value of this column into its code; raises `ValueError` with the reason where there is none."""
    encode = {"category": _category_encoder, "date": _date_encoder}.get(column.kind, _number_encoder)(column)
    nullable = column.nullable

    def code_of(value: Any) -> float:
        if value is None or value == "" or value != value:
            if nullable:
                return math.nan
            raise ValueError("is empty")
        return encode(value)

    return code_of


def encode_rows(
    columns: Sequence[Column], encoders: Sequence[Callable[[Any], float]], rows: Sequence[Any]
) -> FloatArray:
    """Rows of raw values in the order of the columns -> codes (rows, columns) float32.

    Raises:
        SpecError: names row and column of a value that has no code.
    """
    codes: list[list[float]] = []
    for row, values in enumerate(rows):
        try:
            codes.append([encode(value) for encode, value in zip(encoders, values, strict=True)])
        except (ValueError, TypeError, OverflowError):
            raise _first_fault(columns, encoders, values, f"records[{row}]") from None
    return _as_codes(np.asarray(codes, np.float64), columns, "records[{}]")


def encode_column(values: pa.ChunkedArray, column: Column, rows: Sequence[int] | None = None) -> FloatArray:
    """A whole column of a table -> codes (rows,) float32. `rows` are the numbers to name its rows by.

    Raises:
        SpecError: names row and column of a value that has no code.
    """
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    if column.kind == "number" and is_plain_number(kind):
        found = values.cast(pa.float64(), safe=False).to_numpy()
        codes = _refuse_missing(found, column, rows)
    elif column.kind == "date" and (pa.types.is_date(kind) or pa.types.is_timestamp(kind)):
        codes = _refuse_missing(_microseconds(values, column) / _MICROSECONDS_A_DAY, column, rows)
    else:
        codes = _encode_distinct(values, column, rows)
    return _as_codes(codes[:, None], [column], "row {}", rows)[:, 0]


def distinct_values(values: pa.ChunkedArray) -> list[Any]:
    """The distinct values of a column as Python's own, in order of appearance, null among them."""
    found: list[Any] = plain_values(values.unique()).to_pylist()
    return found


def plain_values(values: pa.ChunkedArray | pa.Array) -> Any:
    """Times in microseconds and UTC, which Python's own can hold; other columns as they are."""
    if pa.types.is_timestamp(values.type):
        zone = "UTC" if values.type.tz is not None else None
        # of nanoseconds the rest is cut off; seconds beyond the range of microseconds are an error
        return values.cast(pa.timestamp("us", tz=zone), safe=values.type.unit != "ns")
    return values


def decode_value(code: float, column: Column) -> Any:
    """A code -> a value that JSON can hold and that has this code; None for a missing one."""
    if math.isnan(code):
        return None
    if column.kind == "category":
        return column.categories[int(code)] if code >= 0 else UNSEEN_NAME
    if column.kind == "date":
        return (_EPOCH + timedelta(microseconds=round(code * _MICROSECONDS_A_DAY))).isoformat()
    return code


def is_plain_number(kind: pa.DataType) -> bool:
    """Integers, floats and booleans; decimals are exact, and take the way of single values."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def shown(value: Any) -> str:
    """A value as a message has it."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return "a huge number"
    text = repr(value) if not isinstance(value, date | Decimal) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _number_encoder(_: Column) -> Callable[[Any], float]:
    def encode(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise ValueError("expected a number")
        return float(value)

    return encode


def _category_encoder(column: Column) -> Callable[[Any], float]:
    known = {name: float(number) for number, name in enumerate(column.categories)}
    refuses = column.unknown == "refuse"

    def encode(value: Any) -> float:
        code = known.get(category_text(value), UNSEEN)
        if refuses and code == UNSEEN:
            raise ValueError("is not a category that training saw:")
        return code

    return encode


def _date_encoder(_: Column) -> Callable[[Any], float]:
    def encode(value: Any) -> float:
        try:
            return days_since_1970(value)
        except ValueError:
            raise ValueError("expected a date such as 2024-05-31 or 2024-05-31T12:00:00Z") from None

    return encode


def _first_fault(
    columns: Sequence[Column], encoders: Sequence[Callable[[Any], float]], values: Any, place: str
) -> SpecError:
    if not isinstance(values, list | tuple) or len(values) != len(columns):
        return SpecError(f"{place}: expected {len(columns)} values, got {shown(values)}")
    for column, encode, value in zip(columns, encoders, values, strict=True):
        try:
            encode(value)
        except (ValueError, TypeError, OverflowError) as error:
            return _fault(place, column, _reason(error, value))
    raise AssertionError("one of them has no code")


def _reason(error: Exception, value: Any) -> str:
    if isinstance(error, OverflowError):
        return "is no finite number"
    if str(error) == "is empty":
        return "is empty"
    word = str(error)
    return f"{word} {shown(value)}" if word.endswith(":") else f"{word}, got {shown(value)}"


def _fault(place: str, column: Column, reason: str) -> SpecError:
    joint = " " if reason.startswith("is ") else ": "
    return SpecError(f"{place}: '{column.name}'{joint}{reason}")


def _as_codes(
    values: NDArray[np.float64], columns: Sequence[Column], place: str, rows: Sequence[int] | None = None
) -> FloatArray:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        codes = values.astype(np.float32)
    infinite = np.isinf(codes)
    if infinite.any():
        row, index = (int(found) for found in np.argwhere(infinite)[0])
        raise _fault(place.format(_numbered(row, rows)), columns[index], "is no finite number")
    return codes


def _refuse_missing(values: NDArray[np.float64], column: Column, rows: Sequence[int] | None) -> NDArray[np.float64]:
    if not column.nullable and np.isnan(values).any():
        row = int(np.isnan(values).argmax())
        raise _fault(f"row {_numbered(row, rows)}", column, "is empty")
    return values


def _microseconds(values: pa.ChunkedArray, column: Column) -> NDArray[np.float64]:
    """Of dates and times since 1970 in UTC, NaN where there is none; a double holds them exactly for 285 years."""
    try:
        moments = values.cast(pa.timestamp("us")) if pa.types.is_date(values.type) else plain_values(values)
    except pa.ArrowException:
        raise SpecError(f"column '{column.name}' holds dates beyond the year 290,000") from None
    return np.asarray(moments.cast(pa.int64()).to_numpy(), np.float64)


def _encode_distinct(values: pa.ChunkedArray, column: Column, rows: Sequence[int] | None) -> NDArray[np.float64]:
    """Each distinct value once, by the function that encodes records."""
    encode = encoder_of(column)
    done: list[NDArray[np.float64]] = [np.zeros(0)]
    for indices, distinct in _distinct_parts(values, column):
        codes, faults = np.zeros(len(distinct)), dict[int, str]()
        for number, value in enumerate(distinct):
            try:
                codes[number] = encode(value)
            except (ValueError, TypeError, OverflowError) as error:
                faults[number] = _reason(error, value)
        if faults:
            row = int(np.isin(indices, list(faults)).argmax())
            place = f"row {_numbered(row + sum(map(len, done)), rows)}"
            raise _fault(place, column, faults[int(indices[row])])
        done.append(codes[indices])
    return np.concatenate(done)


def _distinct_parts(values: pa.ChunkedArray, column: Column) -> list[tuple[NDArray[np.int32], list[Any]]]:
    """Which distinct value is in each row, and the distinct values; of a huge column in parts."""
    try:
        encoded = plain_values(values).combine_chunks().dictionary_encode(null_encoding="encode")
        parts = encoded.chunks if isinstance(encoded, pa.ChunkedArray) else [encoded]
        return [(part.indices.to_numpy(zero_copy_only=False), part.dictionary.to_pylist()) for part in parts]
    except (pa.ArrowException, ValueError, OverflowError):  # of lists, or of times that Python's own cannot hold
        raise SpecError(f"column '{column.name}' is {values.type}, which has no values to compare") from None


def _numbered(row: int, rows: Sequence[int] | None) -> int:
    return row if rows is None else int(rows[row])
