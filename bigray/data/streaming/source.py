"""Parquet files as one sequence of batches, each a table as `read_table` would give those rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from bigray.data.sources import given_split
from bigray.data.sources.columns import joined, settled
from bigray.data.sources.extensions import restore_tensors
from bigray.data.sources.locations import SourceFile
from bigray.data.sources.parquet_files import open_parquet
from bigray.data.sources.reading import BROKEN, parquet_files
from bigray.errors import SpecError
from bigray.specs import DataSpec

HEAD_BYTES = 4 * 2**20
HEAD_ROWS = 16_384
"""Most rows by which columns are judged before all are gone through."""
_HEAD_PART = 1024
_BUFFER_BYTES = 2**16
"""Of one column of a row group, read ahead: a whole one may be hundreds of megabytes."""


@dataclass(frozen=True, eq=False)
class ParquetRows:
    """The rows of all files, one file after another."""

    files: tuple[SourceFile, ...]
    schema: pa.Schema
    """Of each batch."""
    raw: pa.Schema = field(repr=False)
    """As the files have it together, before images are marked and an index is left out."""
    num_rows: int
    num_given: int | None
    """Rows to train and validate on, where the rest was given as a holdout."""
    head: pa.Table = field(repr=False)
    """Some of the first rows."""

    def batches(self, num_rows: int, names: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """At most so many rows of some columns, all by default, and the number of the first.

        Raises:
            SpecError: a file is broken, or was changed meanwhile.
        """
        names, start = list(names) if names is not None else self.schema.names, 0
        for file in self.files:
            for table in _tables_of(file, num_rows, self._read_names(names)):
                yield start, self._as_one(table, names)
                start += table.num_rows
        if start != self.num_rows:
            raise SpecError(f"data.source: had {self.num_rows:,} rows, now {start:,}: it was changed while it was read")

    def _read_names(self, names: Sequence[str]) -> list[str]:
        """Columns of all files, in the order of `raw`."""
        return [name for name in self.raw.names if name in names]

    def _as_one(self, table: pa.Table, names: Sequence[str]) -> pa.Table:
        wanted = pa.schema([self.raw.field(name) for name in table.column_names])
        if not table.schema.equals(wanted):
            table = joined([wanted.empty_table(), table], ["data.source", "data.source"])
        found = settled(table, "data.source").select(names)
        return pa.table(found.columns, schema=pa.schema([self.schema.field(name) for name in names]))


def find_rows(spec: DataSpec) -> ParquetRows | None:
    """The source as batches, by what the footers of its files and some first rows say; None where it is not Parquet.

    Raises:
        SpecError: it cannot be read.
    """
    given = (spec.train, spec.test) if spec.source is None else given_split(spec.source)
    sources = (spec.source,) if given is None else given
    parts = [parquet_files(source) for source in sources if source is not None]
    if not all(parts):
        return None
    found = [_described(file) for part in parts for file in part or ()]
    files = [file for part in parts for file in part or ()]
    counts = [num_rows for num_rows, _, _ in found]
    raw = joined([schema.empty_table() for _, schema, _ in found], [file.name for file in files]).schema
    heads = [head for _, _, head in found if head.num_rows]
    if not heads:
        return None  # what there is to say of no rows is said elsewhere
    whole = heads[0] if heads[0].schema.equals(raw) else joined([raw.empty_table(), heads[0]], [files[0].name] * 2)
    head = settled(whole, files[0].name)
    num_given = None if given is None else sum(counts[: len(parts[0] or ())])
    return ParquetRows(tuple(files), head.schema, raw, sum(counts), num_given, head)


def _described(file: SourceFile) -> tuple[int, pa.Schema, pa.Table]:
    """Rows, schema and some first rows of one file."""
    try:
        with open_parquet(file, _BUFFER_BYTES) as opened:
            num_rows = opened.metadata.num_rows
            empty = restore_tensors(opened.schema_arrow.empty_table(), file.name)
            parts = [empty]
            for batch in opened.iter_batches(_HEAD_PART, use_threads=False):
                parts.append(restore_tensors(pa.Table.from_batches([batch]), file.name))
                if sum(part.nbytes for part in parts) > HEAD_BYTES or sum(map(len, parts)) >= HEAD_ROWS:
                    break
            head = pa.concat_tables(parts[1:] or parts)
            return num_rows, head.schema, head
    except BROKEN as error:
        raise _broken(file, error) from error


def _tables_of(file: SourceFile, num_rows: int, names: Sequence[str]) -> Iterator[pa.Table]:
    try:
        with open_parquet(file, _BUFFER_BYTES) as opened:
            for batch in opened.iter_batches(num_rows, columns=list(names)):
                table = restore_tensors(pa.Table.from_batches([batch]), file.name)
                yield table.select(names)
    except BROKEN as error:
        raise _broken(file, error) from error


def _broken(file: SourceFile, error: BaseException) -> SpecError:
    line = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return SpecError(f"data.source: '{file.name}': cannot be read: {line}")
