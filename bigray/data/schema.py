"""What kind of values each input column holds: told by the table, or by the job (driver)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa

from bigray.data.codes import category_text, days_since_1970, distinct_values, is_missing, is_plain_number
from bigray.data.features import is_binary
from bigray.data.sources import is_image
from bigray.errors import SpecError, did_you_mean
from bigray.specs import DataSpec

Kind = Literal["number", "category", "date", "image", "tensor"]

MOST_CATEGORIES = 1000
_ISO_DATE = re.compile(r"\s*\d{4}-\d{2}-\d{2}([T ].*)?", re.DOTALL)
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def infer_kinds(table: pa.Table, names: Sequence[str], spec: DataSpec) -> dict[str, Kind]:
    """The kind of each column, by its type and values, or as `data.columns.<name>.kind` says.

    Text whose values are ISO dates is dates; other text is categories where it has few distinct values, also where all
    of them are numbers, which a source would have read as such had it not been told otherwise.

    Raises:
        SpecError: one line for each column that a model cannot be given.
    """
    faults = [
        f"data.columns: no column '{name}'{did_you_mean(name, names)}" for name in spec.columns if name not in names
    ]
    kinds: dict[str, Kind] = {}
    for name in names:
        try:
            kinds[name] = _kind_of(table, name, spec.of_column(name).kind)
        except SpecError as error:
            faults += error.faults
    tensors = [name for name, kind in kinds.items() if kind in ("tensor", "image")]
    if tensors and len(names) > 1:
        what = "image" if kinds[tensors[0]] == "image" else "tensor"
        faults.append(
            f"data.source: {what} column '{tensors[0]}' cannot be mixed with others; name it alone in data.features"
        )
    if faults:
        raise SpecError(faults)
    return kinds


def _kind_of(table: pa.Table, name: str, told: str | None) -> Kind:
    field, column = table.schema.field(name), table.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if told is not None:
        return _as_told(column, kind, name, told)
    if is_plain_number(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return "date"
    if _is_tensor(kind):
        return "tensor"
    if is_image(field) or (is_binary(kind) and _first_bytes(column).startswith(_MAGIC)):
        return "image"
    if _is_text(kind):
        return _kind_of_text(column, name)
    if column.null_count == len(column):
        raise SpecError(f"data.source: column '{name}' is empty in every row; leave it out in data.features")
    raise SpecError(
        f"data.source: column '{name}' is {kind}, not numeric, text, dates or images; "
        f"name the columns to use in data.features"
    )


def _kind_of_text(column: pa.ChunkedArray, name: str) -> Kind:
    values = [value for value in distinct_values(_decoded(column)) if not is_missing(value)]
    if not values:
        raise SpecError(f"data.source: column '{name}' is empty in every row; leave it out in data.features")
    if all(map(_is_date, values)):
        return "date"
    if len(values) > MOST_CATEGORIES or 2 * len(values) >= len(column):
        raise SpecError(
            f"data.source: column '{name}' is text with {len(values):,} distinct values in {len(column):,} rows; "
            f'name the columns to use in data.features, or set data.columns.{name}.kind = "category"'
        )
    return "category"


def _as_told(column: pa.ChunkedArray, kind: pa.DataType, name: str, told: str) -> Kind:
    """Whether the values can be of the kind that the job names; single values are looked at when they are encoded."""
    fits = {
        "number": is_plain_number(kind) or pa.types.is_decimal(kind) or _is_tensor(kind),
        "category": is_plain_number(kind) or pa.types.is_decimal(kind) or pa.types.is_date(kind) or _is_text(kind),
        "date": is_plain_number(kind) or pa.types.is_date(kind) or pa.types.is_timestamp(kind) or _is_text(kind),
        "image": is_binary(kind) or _is_tensor(kind),
    }
    if not fits[told]:
        raise SpecError(f"data.columns.{name}.kind: '{told}', but the column is {kind}")
    if told == "category":
        _check_countable(column, name)
    return "tensor" if told == "number" and _is_tensor(kind) else told  # type: ignore[return-value]


def _check_countable(column: pa.ChunkedArray, name: str) -> None:
    count = len({category_text(value) for value in distinct_values(_decoded(column)) if not is_missing(value)})
    if count > 100 * MOST_CATEGORIES:
        raise SpecError(f"data.columns.{name}.kind: {count:,} categories; leave the column out in data.features")


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_date(value: str) -> bool:
    if not _ISO_DATE.fullmatch(value):
        return False
    try:
        days_since_1970(value)
    except ValueError:
        return False
    return True


def _first_bytes(column: pa.ChunkedArray) -> bytes:
    values: Any = next((value for value in column if value.is_valid), None)
    return values.as_py()[:16] if values is not None else b""


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_tensor(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.FixedShapeTensorType):
        return is_plain_number(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return is_plain_number(kind.value_type) or _is_tensor(kind.value_type)
    return False
