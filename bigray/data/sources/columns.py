"""Arrays -> table, and what all kinds of sources have in common: their names, their images, several files as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from bigray.errors import SpecError

IMAGE_FIELD = {b"bigray": b"image"}
"""Metadata of a field whose values are PNG or JPEG files."""
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
MOST_LOOKED_AT = 20
INDEX_NAME = "__index_level_"
"""How pandas names an index without a name in the files it writes."""


def table_from_arrays(arrays: Mapping[str, Any]) -> pa.Table:
    """Columns of equal length -> table; arrays with more than one axis become fixed-shape tensor columns."""
    columns = {str(name): _to_numpy(values) for name, values in arrays.items()}
    lengths = {name: len(values) if values.ndim else 0 for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SpecError(f"columns have different numbers of rows: {lengths}")
    return pa.table({name: _to_arrow(name, values) for name, values in columns.items()})


def is_image(field: pa.Field) -> bool:
    """Whether a field was marked as holding PNG or JPEG files."""
    return (field.metadata or {}).get(b"bigray") == b"image"


def settled(table: pa.Table, place: str) -> pa.Table:
    """A table as every source gives it: names told apart, an index of pandas left out, images marked.

    Raises:
        SpecError: two columns have one name, or one has none.
    """
    table = table.drop_columns([name for name in table.column_names if name.startswith(INDEX_NAME)])
    _check_names(table.column_names, place)
    for number, field in enumerate(table.schema):
        column = _image_bytes(table.column(number))
        if not is_image(field) and _holds_images(column):
            table = table.set_column(number, pa.field(field.name, column.type, metadata=IMAGE_FIELD), column)
    return table


def joined(tables: Sequence[pa.Table], places: Sequence[str]) -> pa.Table:
    """Rows of several tables, one after another; whole numbers and fractions meet as fractions.

    Raises:
        SpecError: naming the column, and the table in which it is missing, or too many, or of another type.
    """
    first = tables[0].schema
    for table, place in zip(tables[1:], places[1:], strict=True):
        if faults := column_differences(first, table.schema, places[0]):
            raise SpecError([f"'{place}': {fault}" for fault in faults])
    ordered = [table.select(first.names) for table in tables]
    if any(not table.schema.equals(ordered[0].schema) for table in ordered):
        ordered = [_without_dictionaries(table) for table in ordered]
    return pa.concat_tables(ordered, promote_options="permissive")


def column_differences(wanted: pa.Schema, found: pa.Schema, place: str) -> list[str]:
    """One line for each column that is missing, too many or of a type that does not go with that of `place`."""
    missing = [f"column '{name}' is missing, which {place} has" for name in wanted.names if name not in found.names]
    surplus = [f"column '{name}' is not in {place}" for name in found.names if name not in wanted.names]
    both = [name for name in wanted.names if name in found.names]
    other = [
        f"column '{name}' is {found.field(name).type}, in {place} {wanted.field(name).type}"
        for name in both
        if not _go_together(wanted.field(name), found.field(name))
    ]
    return missing + surplus + other


def _go_together(one: pa.Field, other: pa.Field) -> bool:
    one, other = (field.with_type(_value_type(field.type)) for field in (one, other))
    if one.type.equals(other.type):
        return True
    try:
        pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive")
    except pa.ArrowException:
        return False
    # pyarrow would turn a number into a date, or 1 into True
    return _family(one.type) == _family(other.type) or pa.types.is_null(one.type) or pa.types.is_null(other.type)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _without_dictionaries(table: pa.Table) -> pa.Table:
    for number, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            column = table.column(number).cast(field.type.value_type)
            table = table.set_column(number, field.with_type(column.type), column)
    return table


def _family(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return "date" if pa.types.is_date(kind) or pa.types.is_timestamp(kind) else str(kind).removeprefix("large_")


def _check_names(names: Sequence[str], place: str) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise SpecError(f"'{place}': {times} columns are named '{name}'; give each a name of its own")
        if not name.strip():
            raise SpecError(
                f"'{place}': column {names.index(name) + 1} has no name; name it, or write without the index of rows"
            )


def _image_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The bytes in a column of images as Hugging Face writes it, a struct of `bytes` and `path`; others as they are."""
    kind = column.type
    if not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
        return column
    if not _is_binary(kind.field("bytes").type):
        return column
    inner = [_field_of(chunk, "bytes") for chunk in column.chunks]
    return pa.chunked_array(inner, kind.field("bytes").type)


def _field_of(chunk: pa.StructArray, name: str) -> pa.Array:
    # flatten, unlike field, lets a missing struct be a missing value
    return chunk.flatten()[chunk.type.get_field_index(name)]


def _holds_images(column: pa.ChunkedArray) -> bool:
    """Whether there is one among the first values: a broken one may come before it."""
    if not _is_binary(column.type):
        return False
    values = chain.from_iterable(column.chunks)
    present = islice((value for value in values if value.is_valid), MOST_LOOKED_AT)
    return any(value.as_py().startswith(MAGIC) for value in present)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _to_numpy(values: Any) -> np.ndarray[Any, Any]:
    """Lists, arrays and tensors of torch, wherever these are, in this machine's order of bytes."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    array = np.asarray(values)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _to_arrow(name: str, values: np.ndarray[Any, Any]) -> pa.Array:
    try:
        if values.ndim <= 1:
            return pa.array(values)
        if values.dtype.kind not in "iufb":
            return pa.array(values.tolist())
    except pa.ArrowException as error:
        raise SpecError(f"column '{name}': {str(error).splitlines()[0]}") from error
    numbers = values.astype(np.uint8) if values.dtype.kind == "b" else values
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(numbers))
