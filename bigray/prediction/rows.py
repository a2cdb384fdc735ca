"""The rows of a data set, part by part: shipped with the part, or read where they are predicted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from bigray.data.features import FeatureSchema
from bigray.data.sources import read_table
from bigray.data.sources.extensions import restore_tensors
from bigray.data.sources.locations import SourceFile
from bigray.data.sources.parquet_files import open_parquet
from bigray.data.sources.reading import parquet_files
from bigray.errors import SpecError
from bigray.prediction.parts import Part, cut, parts_of

LARGE_BYTES = 256 * 2**20
"""Of Parquet files; from this size on they are read part by part, wherever they are predicted."""


class Rows(Protocol):
    """A data set cut into parts. What `pack` makes on the driver, `unpack` makes rows of, on any node."""

    @property
    def parts(self) -> tuple[Part, ...]: ...

    @property
    def fingerprint(self) -> str:
        """Of the rows themselves: a rerun goes on only with the same ones."""

    def pack(self, part: Part) -> bytes: ...

    def unpack(self, part: Part, packed: bytes) -> pa.Table: ...


def open_rows(source: str, inputs: FeatureSchema, large_bytes: int = LARGE_BYTES) -> Rows:
    """Rows of any source that a job can have, by `read_table`; Parquet of `large_bytes` or more stays on storage.

    Raises:
        SpecError: it cannot be read, or lacks a column of the model.
    """
    names = [column.name for column in inputs.columns]
    if (files := _large_parquet(source, large_bytes)) is not None:
        return ParquetRows.of(files, names)
    table = read_table(source)
    _check_columns(table.schema, names, source)
    return TableRows(table.select(names))


class TableRows:
    """A table in memory, whose slices travel as Arrow IPC: any column type comes through as it is."""

    def __init__(self, table: pa.Table) -> None:
        self.parts = cut(table.num_rows)
        self._table = table

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(self.pack(part))
        return digest.hexdigest()[:16]

    def pack(self, part: Part) -> bytes:
        return _to_ipc(self._table.slice(part.start, part.num_rows))

    def unpack(self, part: Part, packed: bytes) -> pa.Table:
        with pa.ipc.open_stream(packed) as stream:
            return stream.read_all()

    def __getstate__(self) -> dict[str, Any]:
        """The table stays on the driver."""
        return {"parts": self.parts, "_table": None}


@dataclass(frozen=True)
class ParquetRows:
    """Parquet files on storage that every node reaches; a part is a row group."""

    files: tuple[SourceFile, ...]
    names: tuple[str, ...]
    groups: tuple[tuple[int, int], ...]
    """(file, row group) of each part."""
    parts: tuple[Part, ...]
    fingerprint: str

    @classmethod
    def of(cls, files: Sequence[SourceFile], names: Sequence[str]) -> ParquetRows:
        """Reads the footers."""
        digest, groups, sizes = hashlib.sha256(), [], []
        for number, file in enumerate(files):
            with _opened(file) as opened:
                _check_columns(opened.schema_arrow, names, file.name)
                metadata = opened.metadata
                # offsets, sizes and statistics of every column: other rows have others, as a rule, and another time
                digest.update(repr((metadata.to_dict(), _info(file).mtime_ns)).encode())
                for group in range(metadata.num_row_groups):
                    if rows := metadata.row_group(group).num_rows:
                        groups.append((number, group))
                        sizes.append(rows)
        return cls(tuple(files), tuple(names), tuple(groups), parts_of(sizes), digest.hexdigest()[:16])

    def pack(self, part: Part) -> bytes:
        return b""

    def unpack(self, part: Part, packed: bytes) -> pa.Table:
        number, group = self.groups[part.number]
        file = self.files[number]
        with _opened(file) as opened:
            return restore_tensors(opened.read_row_group(group, columns=list(self.names)), file.name)


def _large_parquet(source: str, large_bytes: int) -> tuple[SourceFile, ...] | None:
    """The files, where all are Parquet and there is much of it."""
    files = parquet_files(source)
    if files is None:
        return None
    return files if sum(_info(file).size for file in files) >= large_bytes else None


def _info(file: SourceFile) -> Any:
    return file.filesystem.get_file_info(file.path)


def _opened(file: SourceFile) -> Any:
    try:
        return open_parquet(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SpecError(f"'{file.name}': cannot be read: {next(iter(str(error).splitlines()), '')}") from error


def _check_columns(schema: pa.Schema, names: Sequence[str], place: str) -> None:
    if missing := [name for name in names if name not in schema.names]:
        raise SpecError(
            f"'{place}': has no column '{missing[0]}', which the model reads; it has: {', '.join(schema.names[:20])}"
        )


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
