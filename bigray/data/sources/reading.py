"""From what a source is to who reads it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from bigray.data.sources.columns import column_differences, joined, settled
from bigray.data.sources.csv_files import read_csv
from bigray.data.sources.functions import call
from bigray.data.sources.image_files import IMAGE_KINDS, SPLIT_FOLDERS, read_images, refuse_other_formats
from bigray.data.sources.ipc_files import read_ipc
from bigray.data.sources.locations import SourceFile, below, find_files, is_folder, is_there, list_folders
from bigray.data.sources.npz_files import read_npz
from bigray.data.sources.parquet_files import read_parquet
from bigray.data.sources.text_files import read_text
from bigray.errors import SpecError
from bigray.models.resolve import load_factory

FUNCTION = re.compile(r"[\w.]+:\w+")
TEXT_KIND = ".txt"
IPC_KINDS = (".arrow", ".arrows", ".feather", ".ipc")
TABLE_READERS: dict[str, Callable[[SourceFile], pa.Table]] = {
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".npz": read_npz,
    **dict.fromkeys(IPC_KINDS, read_ipc),
}
READERS = {**TABLE_READERS, TEXT_KIND: read_text}
KINDS = (*READERS, *IMAGE_KINDS)
BROKEN = (pa.ArrowException, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What readers raise on a file that is cut or of another kind."""


def read_table(source: str) -> pa.Table:
    """Read files of one kind (a path, a folder, a glob; here or at `s3://` and `gs://`) or call a function.

    Parquet, CSV, Arrow IPC, NPZ, text (a row a file, column `text`), folders of images (columns `image`, `label`,
    `path`), or `package.module:function`, which returns a table, a dict of arrays or a map-style torch dataset. Columns
    of PNG or JPEG files have fields for which `is_image` holds. Paths are relative to the folder the command runs in.

    Raises:
        SpecError: nothing is there, the kind is unknown, or it cannot be read.
    """
    if FUNCTION.fullmatch(source):
        table = settled(call(source), source)
    else:
        check_source(source)
        table = settled(_read(source), source)
    if table.num_rows == 0:
        raise SpecError(f"'{source}': holds no rows")
    return table


def read_split(train: str, test: str) -> tuple[pa.Table, pa.Table]:
    """Two sources with the same columns, the second in the first one's order and both in the types that hold both.

    Raises:
        SpecError: as `read_table`, or one line for each column in which they differ; each names its key.
    """
    first, second = _keyed("data.train", train), _keyed("data.test", test)
    if faults := column_differences(first.schema, second.schema, "data.train"):
        raise SpecError([f"data.test: '{test}': {fault}" for fault in faults])
    both = joined([first, second], [train, test])
    return both.slice(0, first.num_rows), both.slice(first.num_rows)


def given_split(source: str) -> tuple[str, str] | None:
    """The two sources of a folder that consists of `train/` and `test/`; None for any other source."""
    if FUNCTION.fullmatch(source) or not is_folder(source):
        return None
    if set(list_folders(source)) != set(SPLIT_FOLDERS):
        return None
    train, test = (below(source, name) for name in SPLIT_FOLDERS)
    return train, test


def parquet_files(source: str) -> tuple[SourceFile, ...] | None:
    """The files of a source that is Parquet, in the order in which `read_table` joins them; None of any other.

    Raises:
        SpecError: nothing is there, or files of several kinds.
    """
    if FUNCTION.fullmatch(source):
        return None
    check_source(source)
    files = tuple(_of_one_kind(find_files(source), source))
    return files if files[0].kind == ".parquet" else None


def check_source(source: str) -> None:
    """Raise `SpecError` unless the source is there and of a kind `read_table` knows; reads nothing."""
    if FUNCTION.fullmatch(source):
        load_factory(source)
        return
    if not is_there(source):
        where = "" if "://" in source else f" (looked in {Path.cwd()})"
        raise SpecError(f"'{source}': no such file or folder{where}")
    if is_folder(source):
        return
    if (kind := find_files(source)[0].kind) not in KINDS:
        known = ", ".join(kind for kind in KINDS if kind not in IPC_KINDS[1:])
        raise SpecError(f"'{source}': unknown kind '{kind}'; use {known}, or 'package.module:function'")


def _keyed(key: str, source: str) -> pa.Table:
    try:
        return read_table(source)
    except SpecError as error:
        raise SpecError([f"{key}: {fault}" for fault in error.faults]) from error


def _read(source: str) -> pa.Table:
    files = _of_one_kind(find_files(source), source)
    if files[0].kind in IMAGE_KINDS:
        return read_images(files)
    tables = [_read_file(file) for file in files]
    return tables[0] if len(tables) == 1 else joined(tables, [file.name for file in files])


def _of_one_kind(files: Sequence[SourceFile], source: str) -> list[SourceFile]:
    """The files to read. A table or pictures may have a README.txt beside them; `_SUCCESS` and the like are no data."""
    kinds = {file.kind for file in files}
    if not kinds & set(TABLE_READERS):
        refuse_other_formats(files)
    found = sorted(kinds & set(TABLE_READERS)) or ([TEXT_KIND] if not kinds & set(IMAGE_KINDS) else [])
    if found and kinds & set(IMAGE_KINDS):
        found.append("pictures")
    if len(found) > 1:
        raise SpecError(f"'{source}': holds files of several kinds ({', '.join(found)}); name one by a glob")
    wanted = tuple(found) or IMAGE_KINDS
    chosen = [file for file in files if file.kind in wanted and not _is_marker(file)]
    if not chosen:
        raise SpecError(f"'{source}': holds no rows: no file of a kind that can be read ({', '.join(KINDS)})")
    return chosen


def _is_marker(file: SourceFile) -> bool:
    return file.kind in TABLE_READERS and len(file.parts) > 1 and any(part.startswith("_") for part in file.parts)


def _read_file(file: SourceFile) -> pa.Table:
    try:
        if file.filesystem.get_file_info(file.path).size == 0:
            raise SpecError(f"'{file.name}': is empty")
        return READERS[file.kind](file)
    except BROKEN as error:
        raise SpecError(f"'{file.name}': cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
