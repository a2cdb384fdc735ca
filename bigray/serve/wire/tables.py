"""Whole tables as a body: CSV and Arrow IPC. Anybody may send one, so nothing in it is believed unchecked."""

from __future__ import annotations

import csv
import json
import math
import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from bigray.data.codes import category_text, encode_column
from bigray.data.features import Column, FeatureSchema, column_to_numpy
from bigray.errors import SpecError

FloatArray = NDArray[np.float32]

BROKEN = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, struct.error)
"""What pyarrow, and the look into its messages, raise on a body that cannot be read."""

FILE_MAGIC = b"ARROW1\0\0"
EXTENSION_KEY = b"ARROW:extension:name"
"""Names a field's extension type in a schema. pyarrow calls the type's Python class with the bytes beside it."""
INERT_KEY = b"ARROW:extension-name"
TENSOR_METADATA_KEY = b"ARROW:extension:metadata"

OLD_COMPRESSION_KEY = b"ARROW:experimental_compression"
"""Beside the message, in the way of Arrow 0.17, which is read to this day."""

MESSAGE_HEADER = 2
RECORD_BATCH_COMPRESSION = 3
DICTIONARY_DATA, DICTIONARY_IS_DELTA = 1, 2
"""Positions of fields in Arrow's Message, RecordBatch and DictionaryBatch tables (Message.fbs)."""

MOST_BATCHES = 1024
"""In one body. Each costs the same, however few rows it has, and would be paid for again with every dictionary."""
MOST_FREE_VALUES = 100_000
"""More than the body has bytes: booleans take an eighth of one, and columns of nothing but nulls none."""
MOST_TIMES_THE_BODY = 8
"""What its columns may come to; a dictionary counts with each batch that it is used in."""

CELLS = pa.dictionary(pa.int32(), pa.utf8())
"""How categories and dates are read from CSV: each text is looked at once."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
WANTED = {"number": "numbers", "category": "text, numbers or booleans", "date": "dates or text"}


def decode_csv(body: bytes, schema: FeatureSchema) -> FloatArray:
    """CSV with a header line -> float32 array (rows, *input_shape); columns the model does not know are left out."""
    if schema.is_tensor:
        shape = schema.input_shape
        raise SpecError(f"text/csv: '{schema.tensor_name}' is a tensor of shape {shape}; send JSON, Arrow or .npy")
    names = [column.name for column in schema.columns]
    from pyarrow import csv as arrow_csv  # not at each replica's start: it loads the whole of pyarrow.compute

    _check_csv_header(body, names)
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(body),
            # one thread and one block: only so does a message name the row
            arrow_csv.ReadOptions(use_threads=False, block_size=min(len(body) + 1, 2**31 - 1)),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=names,
                column_types={one.name: pa.float64() if one.kind == "number" else CELLS for one in schema.columns},
                # else what the source takes for a missing number as well, NA and such; in text an empty cell is one
                null_values=[""] if schema.is_plain else None,
            ),
        )
    except BROKEN as error:
        raise SpecError(f"text/csv: {_first_line(error)}") from None
    if not schema.is_plain:
        return _encoded(_retyped(table, schema), schema, "text/csv", first_row=1)
    for name in names:
        _refuse_empty_cells(table.column(name), name)
    return schema.checked(np.stack([table.column(name).to_numpy() for name in names], axis=1))


def decode_arrow(body: bytes, schema: FeatureSchema) -> FloatArray:
    """An Arrow IPC stream or file -> float32 array (rows, *input_shape); columns the model does not know are left out.

    Of those nothing is read but their place: pyarrow takes minutes to look through some types that are legal and no
    numbers. No extension type is instantiated, whatever types this process has registered: a column arrives as its
    storage.
    """
    # a file is a stream between a magic word and an index that is of no use here
    start = len(FILE_MAGIC) if body.startswith(FILE_MAGIC) else 0
    source = pa.py_buffer(body.replace(EXTENSION_KEY, INERT_KEY))[start:]
    try:
        _check_messages(source)
        indices = _column_indices(pa.ipc.open_stream(source).schema, schema)
        options = pa.ipc.IpcReadOptions(included_fields=indices)
        table = pa.ipc.open_stream(source, options=options).read_all()
        table.validate(full=True)  # else a false offset reads memory beyond the body
    except BROKEN as error:
        raise SpecError(f"Arrow: {_first_line(error)}") from None
    _check_room(table, schema, len(body))
    if not schema.is_plain:
        return _encoded(table, schema, "Arrow", first_row=0)
    columns = [_column_values(table, column) for column in schema.columns]
    return schema.checked(columns[0] if schema.is_tensor else np.stack(columns, axis=1))


def _check_room(table: pa.Table, schema: FeatureSchema, num_bytes: int) -> None:
    """A body may name the same bytes many times; each time they would be paid for."""
    most = num_bytes if schema.is_plain else max(num_bytes, MOST_FREE_VALUES)
    if table.num_rows * math.prod(schema.input_shape) > most:
        raise SpecError(f"Arrow: {table.num_rows} rows take more than the body's {num_bytes} bytes")
    if not schema.is_plain and table.nbytes > MOST_TIMES_THE_BODY * num_bytes:
        raise SpecError(f"Arrow: columns of {table.nbytes} bytes in a body of {num_bytes}; write fewer, larger batches")


def _encoded(table: pa.Table, schema: FeatureSchema, place: str, first_row: int) -> FloatArray:
    """Columns that are not all plain numbers -> codes (rows, columns), by what encodes the columns of a source.

    `first_row` is the number by which a message names the first one.
    """
    if not table.num_rows:
        raise SpecError(f"{place}: holds no rows")
    try:
        codes = [_codes_of(table.column(column.name), column, first_row) for column in schema.columns]
    except SpecError as error:
        raise SpecError([f"{place}: {fault}" for fault in error.faults]) from None
    except BROKEN as error:
        raise SpecError(f"{place}: {_first_line(error)}") from None
    return np.stack(codes, axis=1)


def _codes_of(values: pa.ChunkedArray, column: Column, first_row: int) -> FloatArray:
    if not pa.types.is_dictionary(values.type):
        known = values.cast(pa.utf8()) if pa.types.is_null(values.type) else values
        return encode_column(known, column, range(first_row, first_row + len(values)))
    parts = []
    for chunk in values.chunks:
        parts.append(_codes_of_dictionary(chunk, column, first_row))
        first_row += len(chunk)
    return np.concatenate(parts)


def _codes_of_dictionary(chunk: pa.DictionaryArray, column: Column, first_row: int) -> FloatArray:
    """Those of the entries that rows name, once each: written out, a long text that all rows name would fill memory."""
    indices = np.nan_to_num(chunk.indices.to_numpy(zero_copy_only=False), nan=-1).astype(np.int64)
    used, rows, inverse = np.unique(indices, return_index=True, return_inverse=True)
    order = np.argsort(rows)  # as they appear, so that the first row with a fault is named
    entries = chunk.dictionary.take(pa.array(used[order], mask=used[order] < 0))
    codes = np.empty(len(used), np.float32)
    codes[order] = encode_column(pa.chunked_array([entries]), column, (rows[order] + first_row).tolist())
    return codes[inverse]


def _retyped(table: pa.Table, schema: FeatureSchema) -> pa.Table:
    """CSV has no types: texts become those of the values that the source of the training rows took such for."""
    for column in schema.columns:
        if column.kind != "number":
            chunks = [_retyped_chunk(chunk, column) for chunk in table.column(column.name).chunks]
            place = table.column_names.index(column.name)
            table = table.set_column(place, column.name, pa.chunked_array(chunks, CELLS))
    return table


def _retyped_chunk(chunk: pa.DictionaryArray, column: Column) -> pa.DictionaryArray:
    retyped = _date_text if column.kind == "date" else partial(_category_text, known=frozenset(column.categories))
    texts = [retyped(text) for text in chunk.dictionary.to_pylist()]
    return pa.DictionaryArray.from_arrays(chunk.indices, pa.array(texts, pa.utf8()))


def _category_text(text: str, known: frozenset[str]) -> str:
    """True and TRUE are the category `true`, and 1.0 is that of 1, where there is no other of this name."""
    if text in known:
        return text
    try:
        name = text.lower() if text.lower() in ("true", "false") else category_text(float(text))
    except ValueError:
        return text
    return name if name in known else text


def _date_text(text: str) -> str:
    """An ISO date; of a number of days, the moment it names."""
    try:
        return (EPOCH + timedelta(days=float(text))).isoformat()
    except (ValueError, OverflowError):
        return text


def _column_values(table: pa.Table, column: Column) -> NDArray[Any]:
    """One column -> (rows, *shape); a tensor may come as nested lists, or flat as its storage is."""
    chunks = table.column(column.name)
    if any(map(_has_nulls, chunks.chunks)):
        raise SpecError(f"Arrow: column '{column.name}' holds nulls")
    try:
        values = column_to_numpy(pa.table({column.name: _without_dictionary(chunks)}), column.name)
    except BROKEN as error:
        raise SpecError(f"Arrow: column '{column.name}': {_first_line(error)}") from None
    if values.ndim == 2 and values.shape[1] == math.prod(column.shape):
        values = values.reshape(-1, *column.shape)
    if values.shape[1:] != column.shape:
        raise SpecError(f"Arrow: column '{column.name}' has shape {values.shape[1:]}, expected {column.shape}")
    return values


def _column_indices(found: pa.Schema, schema: FeatureSchema) -> list[int]:
    """Where the model's columns are, each of them once and of a type that it can be made of."""
    indices = []
    for column in schema.columns:
        places = found.get_all_field_indices(column.name)
        if len(places) != 1:
            known = ", ".join(found.names[:20])
            raise SpecError(
                f"Arrow: expected one column '{column.name}', got {len(places)}; the columns are: {known[:400]}"
            )
        field = found.field(places[0])
        _check_type(field.type, column)
        _check_tensor_shape(field, column)
        indices += places
    return sorted(set(indices))


def _without_dictionary(chunks: pa.ChunkedArray) -> pa.ChunkedArray:
    """Each batch by itself: to put batches together, pyarrow would compare their dictionaries, each with each."""
    if not pa.types.is_dictionary(chunks.type):
        return chunks
    return pa.chunked_array([chunk.dictionary_decode() for chunk in chunks.chunks], chunks.type.value_type)


def _check_type(kind: pa.DataType, column: Column) -> None:
    inner = kind.value_type if pa.types.is_dictionary(kind) and not column.shape else kind
    sizes: list[int | None] = []
    while _is_list(inner) and column.shape:
        sizes.append(inner.list_size if pa.types.is_fixed_size_list(inner) else None)
        inner = inner.value_type
    # of a wrong fixed size pyarrow makes any number of rows without a byte for them
    asked = column.shape if len(sizes) > 1 else (math.prod(column.shape),)
    if any(size not in (None, wanted) for size, wanted in zip(sizes, asked, strict=False)):
        raise SpecError(f"Arrow: column '{column.name}' has shape {tuple(sizes)}, expected {column.shape}")
    if len(sizes) > max(1, len(column.shape)):
        raise SpecError(f"Arrow: column '{column.name}' has {len(sizes)} axes, expected shape {column.shape}")
    if not _can_hold(inner, column):
        wanted = f"lists of numbers for shape {column.shape}" if column.shape else WANTED[column.kind]
        raise SpecError(f"Arrow: column '{column.name}' is of type {str(kind)[:80]}, expected {wanted}")


def _can_hold(kind: pa.DataType, column: Column) -> bool:
    """Whether values of the column may be of this type, which is one that `validate` looks all through."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return True
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    match column.kind:
        case "category":
            fits = is_text or pa.types.is_boolean(kind)
        case "date":
            fits = is_text or pa.types.is_date(kind) or pa.types.is_timestamp(kind)
        case _:
            fits = False
    return bool(fits or (column.nullable and pa.types.is_null(kind)))


def _check_tensor_shape(field: pa.Field, column: Column) -> None:
    """A fixed shape tensor names its shape beside the storage type."""
    text = (field.metadata or {}).get(TENSOR_METADATA_KEY)
    if not text:
        return
    try:
        described = json.loads(text)
        shape, permutation = described["shape"], described.get("permutation") or sorted(range(len(column.shape)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # of another type: its storage counts
    if shape != list(column.shape) or permutation != list(range(len(column.shape))):
        raise SpecError(f"Arrow: column '{column.name}' is a tensor of shape {shape!s:.60}, expected {column.shape}")


def _has_nulls(array: pa.Array) -> bool:
    if array.null_count:
        return True
    if pa.types.is_dictionary(array.type):
        return bool(array.dictionary.null_count)
    return _is_list(array.type) and _has_nulls(array.flatten())


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_csv_header(body: bytes, names: Sequence[str]) -> None:
    """Each column exactly once: of two with the same name, pyarrow would take one without a word."""
    line = body.lstrip(b"\r\n").partition(b"\n")[0]
    try:
        found = next(csv.reader([line.decode("utf-8-sig", "replace").rstrip("\r")], strict=False), [])
    except csv.Error as error:
        raise SpecError(f"text/csv: the header cannot be read: {error}") from None
    for name in names:
        if found.count(name) != 1:
            listed = ", ".join(found[:20])
            raise SpecError(f"text/csv: expected one column '{name}' in the header, got: {listed[:200] or 'nothing'}")


def _refuse_empty_cells(column: pa.ChunkedArray, name: str) -> None:
    if column.null_count:
        row = int(column.is_null().index(True).as_py())
        raise SpecError(f"text/csv: row {row + 1}: '{name}' is empty")


def _check_messages(source: pa.Buffer) -> None:
    """Refuse what a small body can make large: compression, dictionaries that grow, batches without end."""
    for number, message in enumerate(pa.ipc.MessageReader.open_stream(source)):
        if number > MOST_BATCHES:
            raise SpecError(f"Arrow: more than {MOST_BATCHES} batches; write larger ones")
        if message.type in ("record batch", "dictionary"):
            _check_batch(message.metadata.to_pybytes(), is_dictionary=message.type == "dictionary")


def _check_batch(metadata: bytes, *, is_dictionary: bool) -> None:
    """Looks at fields of a message that pyarrow does not show."""
    batch = _follow(metadata, _field(metadata, _follow(metadata, 0), MESSAGE_HEADER))
    if is_dictionary:
        is_delta = _field(metadata, batch, DICTIONARY_IS_DELTA)
        if is_delta and metadata[is_delta]:  # pyarrow copies all that came before for the batch behind each of them
            raise SpecError("Arrow: dictionaries that come in parts are not accepted; write each of them at once")
        batch = _follow(metadata, _field(metadata, batch, DICTIONARY_DATA))
    # a compressed buffer says itself how much memory is to be taken for it
    if OLD_COMPRESSION_KEY in metadata or _field(metadata, batch, RECORD_BATCH_COMPRESSION):
        raise SpecError("Arrow: compressed buffers are not accepted; write without, or gzip the whole body")


def _field(buffer: bytes, table: int, index: int) -> int:
    """Where a flatbuffer table's field is; 0 where the table has none."""
    vtable = table - int(struct.unpack_from("<i", buffer, table)[0])
    slot = 4 + 2 * index
    if slot >= struct.unpack_from("<H", buffer, vtable)[0]:
        return 0
    offset = int(struct.unpack_from("<H", buffer, vtable + slot)[0])
    return table + offset if offset else 0


def _follow(buffer: bytes, position: int) -> int:
    return position + int(struct.unpack_from("<I", buffer, position)[0])


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]
