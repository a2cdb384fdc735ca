"""Where predictions go: numbered files as they come, and at the end one file, or the folder of them.

<out>.parquet            the joined file, with `<out>.parquet.parts/` beside it until it is whole
<out>/                   any other name: the folder of the parts themselves
  part-000000.parquet    rows of one part, in order
  _predictions.json      what makes them; written first, so that a rerun knows whether it may go on
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from bigray.errors import SpecError, StorageError
from bigray.prediction.answers import read_lineage, with_lineage
from bigray.prediction.parts import Part, check_same
from bigray.storage import open_storage

SINGLE_FILE = ".parquet"
PARTS = ".parts"
RECORD = "_predictions.json"
SAME = ("bundle_version", "source_fingerprint", "rows")
"""What has to be as it was for a rerun to go on."""


class Output:
    """One `--out`: its parts, and what becomes of them."""

    def __init__(self, out: str) -> None:
        place = open_storage(out)
        self._is_file = place.root.endswith(SINGLE_FILE)  # a URI may end in settings of its storage
        self._parent, self._name = place.parent, place.root.rpartition("/")[2]
        self._parts = self._parent.child(self._name + PARTS) if self._is_file else place
        self.location = place.uri

    def begin(self, document: Mapping[str, Any]) -> dict[str, int] | None:
        """Rows of each part that is whole already; None where all has been written, by the same bundle from the same
        rows. `document` is the lineage.

        Raises:
            SpecError: what is there is of another bundle or of other rows, or is no prediction.
        """
        asked = {name: document[name] for name in SAME}
        if self._is_file and self._parent.exists(self._name):
            check_same(self._joined_lineage(), asked, self.location)
            self._remove_parts()  # of a process that died between the last two steps
            return None
        if self._parts.exists(RECORD):
            check_same(self._record(), asked, self._parts.uri)
        elif any(not _is_torn_record(name) for name in self._parts.list_names()):
            raise SpecError(f"--out: {self._parts.uri}: there is something else here; choose another place")
        else:
            self._parts.write_bytes(RECORD, json.dumps(dict(document), indent=2).encode())
        names = [name for name in self._parts.list_names() if name.endswith(SINGLE_FILE)]
        found = {name: self._rows_of(name, asked) for name in names}
        return {name: rows for name, rows in found.items() if rows is not None}

    def write(self, part: Part, table: pa.Table, document: Mapping[str, Any]) -> None:
        """All rows of a part at once: a file is whole or not there."""
        sink = pa.BufferOutputStream()
        parquet.write_table(table.cast(with_lineage(table.schema, dict(document))), sink)
        self._parts.write_bytes(part.file, bytes(sink.getvalue()))

    def finish(self, parts: Sequence[Part], schema: pa.Schema, document: Mapping[str, Any]) -> None:
        """Join the parts, a row group each, and remove them; of a folder there is nothing left to do."""
        if not self._is_file:
            return
        temporary = self._parent.child(f".{self._name}.tmp")
        filesystem = temporary.filesystem
        whole = with_lineage(schema, dict(document))
        with self._telling():
            with (
                filesystem.open_output_stream(temporary.root) as stream,
                parquet.ParquetWriter(stream, whole) as writer,
            ):
                for part in parts:
                    writer.write_table(self._read(part.file).cast(whole))
            if temporary.is_local:  # the parts go next: a power cut must not take both
                _sync(temporary.root)
            filesystem.move(temporary.root, self._parent.child(self._name).root)
            if temporary.is_local:
                _sync(self._parent.root)
        self._remove_parts()

    def _remove_parts(self) -> None:
        if self._parts.exists():
            with self._telling():
                self._parts.filesystem.delete_dir(self._parts.root)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StorageError(
                f"--out: {self.location}: cannot be written: {reason}; the same command goes on from the parts"
            ) from error

    def _record(self) -> dict[str, Any]:
        try:
            document = json.loads(self._parts.read_bytes(RECORD))
        except ValueError:
            document = None
        return document if isinstance(document, dict) else {}

    def _joined_lineage(self) -> dict[str, Any]:
        place = self._parent.child(self._name)
        try:
            found = read_lineage(parquet.read_schema(place.root, filesystem=place.filesystem))
        except (pa.ArrowException, OSError):
            found = None
        if found is None:
            raise SpecError(f"--out: {self.location} is no file that `bigray predict` wrote; choose another place")
        return found

    def _rows_of(self, name: str, asked: Mapping[str, object]) -> int | None:
        """None for a file that was cut, and for one of something else than what is asked for."""
        try:
            with self._parts.filesystem.open_input_file(self._parts.child(name).root) as file:
                opened = parquet.ParquetFile(file)
                made_by = read_lineage(opened.schema_arrow) or {}
                is_same = all(made_by.get(key) == value for key, value in asked.items())
                return int(opened.metadata.num_rows) if is_same else None
        except (pa.ArrowException, OSError):
            return None

    def _read(self, name: str) -> pa.Table:
        return parquet.ParquetFile(pa.BufferReader(self._parts.read_bytes(name))).read()


def _is_torn_record(name: str) -> bool:
    """Whether a file is what a process left that died while it wrote the record."""
    return name.startswith(f".{RECORD}")


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
