"""What a source names -> the files it stands for, on this machine or on any storage that `pyarrow.fs` opens."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from bigray.errors import SpecError, StorageError
from bigray.storage import open_storage


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    filesystem: fs.FileSystem
    path: str
    """As the filesystem spells it."""
    name: str
    """As the user would write it, for messages."""
    parts: tuple[str, ...]
    """Its path below the folder that was named; only the file's name where a file or a glob was."""

    @property
    def kind(self) -> str:
        """`.parquet`, `.csv`, ...: the ending in small letters."""
        return os.path.splitext(self.path)[1].lower()  # of many pictures: a path object takes ten times as long

    def open(self) -> pa.NativeFile:
        """Open for reading anywhere in it."""
        return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return bytes(file.read())


def find_files(source: str) -> tuple[SourceFile, ...]:
    """Files of a path, a glob or a folder with all below it, in order of name; none where nothing is there.

    Raises:
        SpecError: the storage cannot be reached, or a link in a folder leads out of it.
    """
    source = _as_path(source)
    if "://" in source:
        return _remote_files(source)
    if _is_pattern(source):
        return tuple(
            _local_file(path, (Path(path).name,)) for path in sorted(glob.glob(source)) if Path(path).is_file()
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return tuple(_files_below(path))
    return (_local_file(str(path), (path.name,)),) if path.exists() else ()


def is_there(source: str) -> bool:
    """Whether a file or folder is there, or a glob matches one; lists no folder of this machine."""
    source = _as_path(source)
    if _is_pattern(source):
        return bool(find_files(source))
    return _remote_type(source) != fs.FileType.NotFound if "://" in source else Path(source).expanduser().exists()


def is_folder(source: str) -> bool:
    source = _as_path(source)
    if _is_pattern(source):
        return False
    return _remote_type(source) == fs.FileType.Directory if "://" in source else Path(source).expanduser().is_dir()


def below(folder: str, name: str) -> str:
    """The source of what is called `name` in a folder."""
    path, query = _without_query(folder)
    return f"{path.rstrip('/')}/{name}{query}"


def list_folders(source: str) -> tuple[str, ...]:
    """Names of the folders directly below a folder, sorted, without hidden ones."""
    source = _as_path(source)
    if "://" in source:
        filesystem, root = _open(source)
        with _reaching(source):
            found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        names = [info.base_name for info in found if info.type == fs.FileType.Directory]
    else:
        names = [entry.name for entry in Path(source).expanduser().iterdir() if entry.is_dir()]
    return tuple(sorted(name for name in names if not name.startswith(".")))


def _as_path(source: str) -> str:
    """A `file://` URI as the path it is, so that links are treated alike; others as they are."""
    if not source.startswith("file://"):
        return source
    folder, pattern = _split_pattern(_without_query(source)[0])
    root = _open(folder)[1]
    return f"{root}/{pattern}" if pattern else root


def _local_file(path: str, parts: tuple[str, ...]) -> SourceFile:
    return SourceFile(fs.LocalFileSystem(), str(Path(path).absolute()), path, parts)


def _files_below(root: Path) -> Iterator[SourceFile]:
    """Links to files are followed inside the folder and refused where they lead out; links to folders go nowhere."""
    inside, filesystem = root.resolve(), fs.LocalFileSystem()
    for folder, folders, names in os.walk(root, followlinks=False):
        _check_inside(folder, folders, inside)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = sorted(name for name in names if not name.startswith("."))
        _check_inside(folder, shown, inside)
        absolute, above = str(Path(folder).absolute()), Path(folder).relative_to(root).parts
        for name in shown:
            yield SourceFile(filesystem, os.path.join(absolute, name), os.path.join(folder, name), (*above, name))


def _check_inside(folder: str, names: list[str], inside: Path) -> None:
    for path in (os.path.join(folder, name) for name in names):
        if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(inside):
            raise SpecError(
                f"'{path}': a link that leads out of the folder; copy it there, or name the files by a glob"
            )


def _remote_files(source: str) -> tuple[SourceFile, ...]:
    path, query = _without_query(source)
    folder, pattern = _split_pattern(path)
    filesystem, root = _open(folder + query)
    if not pattern and _remote_type(source) == fs.FileType.File:
        return (SourceFile(filesystem, root, path, (PurePosixPath(root).name,)),)
    selector = fs.FileSelector(root, allow_not_found=True, recursive=not pattern or "/" in pattern)
    with _reaching(source):
        infos = filesystem.get_file_info(selector)
    paths = sorted(info.path for info in infos if info.type == fs.FileType.File)
    found = [(one, PurePosixPath(one).relative_to(root).parts) for one in paths]
    if pattern:
        found = [(one, parts[-1:]) for one, parts in found if _matches(parts, pattern.split("/"))]
    shown = [(one, parts) for one, parts in found if not any(part.startswith(".") for part in parts)]
    return tuple(SourceFile(filesystem, one, _uri_of(folder, root, one), parts) for one, parts in shown)


def _is_pattern(source: str) -> bool:
    if "://" in source:
        return glob.has_magic(_without_query(source)[0])
    return glob.has_magic(source) and not Path(source).exists()  # a file may be named rows[1].csv


def _without_query(source: str) -> tuple[str, str]:
    """`s3://bucket/rows.csv?region=eu` -> `s3://bucket/rows.csv` and `?region=eu`: what a filesystem is opened with is
    no pattern, though it has a question mark."""
    path, mark, query = source.partition("?") if "://" in source else (source, "", "")
    return path, mark + query


def _split_pattern(source: str) -> tuple[str, str]:
    """`s3://bucket/a/b-*/c.csv` -> `s3://bucket/a` and `b-*/c.csv`; no pattern where there is no `*` or `[`."""
    if not glob.has_magic(source):
        return source, ""
    parts = source.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _matches(parts: tuple[str, ...], patterns: list[str]) -> bool:
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _uri_of(folder: str, root: str, path: str) -> str:
    return folder.rstrip("/") + path.removeprefix(root.rstrip("/"))


def _remote_type(source: str) -> fs.FileType:
    filesystem, root = _open(source)
    with _reaching(source):
        return filesystem.get_file_info(root).type


@contextmanager
def _reaching(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpecError(f"'{_without_query(source)[0]}': cannot be reached: {_first_line(error)}") from error


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        storage = open_storage(uri)
    except StorageError as error:
        raise SpecError(
            f"'{_without_query(uri)[0]}': cannot be opened: {_first_line(error.__cause__ or error)}"
        ) from error
    return storage.filesystem, storage.root


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
