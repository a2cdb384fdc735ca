"""CSV with a header line, in UTF-8 with or without a byte order mark."""

from __future__ import annotations

import codecs
import csv
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from bigray.data.sources.locations import SourceFile
from bigray.errors import SpecError

if TYPE_CHECKING:
    from _csv import Reader

PIECE_BYTES = 1 << 24
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(file: SourceFile) -> pa.Table:
    """All rows of one file. Only an empty cell is missing in a column of text; in one of numbers NA, NaN and null are.

    Raises:
        SpecError: naming the line that is ragged, not UTF-8, or in which a quote is opened that nothing closes.
    """
    from pyarrow import csv as arrow_csv

    content = _content(file)
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(content), parse_options=arrow_csv.ParseOptions(newlines_in_values=True)
        )
    except pa.ArrowInvalid as error:
        raise SpecError(_ragged(content, file.name) or f"'{file.name}': cannot be read: {_line(error)}") from error
    if fault := _open_quote(content, file.name):
        raise SpecError(fault)
    if any(pa.types.is_binary(kind) for kind in table.schema.types):
        raise SpecError(_not_utf8(content, file.name))
    _check_delimiter(table, file.name)
    return _empty_as_missing(table)


def _content(file: SourceFile) -> pa.Buffer:
    with file.open() as handle:
        content = handle.read_buffer()
    if bytes(content[:2]) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise SpecError(f"'{file.name}': is UTF-16; save it as UTF-8")
    return content


def _ragged(content: pa.Buffer, place: str) -> str | None:
    """The first row with more or fewer values than the header. A quoted value may hold line breaks, so lines are told
    from rows by reading it again."""
    lines = _reader(content)
    try:
        header = next(filter(None, lines), [""])
        for row in lines:
            if row and len(row) != len(header):
                return f"'{place}': line {lines.line_num} has {len(row)} values, the header has {len(header)}"
    except csv.Error as error:
        return f"'{place}': line {lines.line_num}: {error}"
    return None


def _open_quote(content: pa.Buffer, place: str) -> str | None:
    """A quote that nothing closes takes all rows behind it into one value, of which pyarrow says nothing."""
    pieces = (bytes(content[start : start + PIECE_BYTES]) for start in range(0, content.size, PIECE_BYTES))
    if sum(piece.count(b'"') for piece in pieces) % 2 == 0:
        return None
    lines, last = _reader(content), 0
    try:
        for _row in lines:
            last = lines.line_num
    except csv.Error:
        return f"'{place}': line {last + 1} opens a quote that nothing closes"
    return None


def _reader(content: pa.Buffer) -> Reader:
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", errors="replace", newline="")
    return csv.reader(text, strict=True)


def _not_utf8(content: pa.Buffer, place: str) -> str:
    for number, line in enumerate(_lines(content), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return f"'{place}': line {number} is not UTF-8; save the file as UTF-8"
    return f"'{place}': is not UTF-8; save it so"


def _lines(content: pa.Buffer) -> Iterator[bytes]:
    yield from io.BytesIO(content)


def _check_delimiter(table: pa.Table, place: str) -> None:
    if table.num_columns > 1:
        return
    for delimiter, name in OTHER_DELIMITERS.items():
        if delimiter in table.column_names[0]:
            raise SpecError(f"'{place}': its values are parted by {name}; save it with commas")


def _empty_as_missing(table: pa.Table) -> pa.Table:
    import pyarrow.compute as pc

    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            column = table.column(number)
            filled = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
            table = table.set_column(number, field, filled)
    return table


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
