"""Files of a run, through `pyarrow.fs`: a local folder, NFS, `s3://` or `gs://`.

A folder is *committed* when its `manifest.json` exists: files are written first, the manifest last, and the manifest
holds the size and SHA-256 of every file. What has no manifest does not exist.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from bigray.errors import CorruptFile, StorageError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Storage:
    """One root under which a run keeps its files. Picklable: the driver hands it to workers and replicas."""

    filesystem: fs.FileSystem
    root: str
    """Path of the root as the filesystem spells it (no scheme)."""
    uri: str
    """What the user wrote, for messages."""

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def child(self, *parts: str) -> Storage:
        return Storage(self.filesystem, "/".join((self.root, *parts)), "/".join((self.uri, *parts)))

    def exists(self, path: str = "") -> bool:
        with self._telling(path, "look up"):
            return bool(self.filesystem.get_file_info(self._full(path)).type != fs.FileType.NotFound)

    def list_names(self, path: str = "") -> list[str]:
        """Base names directly under `path`, sorted; empty where `path` is absent."""
        with self._telling(path, "list"):
            selector = fs.FileSelector(self._full(path), allow_not_found=True)
            return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def read_bytes(self, path: str) -> bytes:
        with self._telling(path, "read"), self.filesystem.open_input_stream(self._full(path)) as stream:
            return bytes(stream.read())

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole file so that a reader sees all of it or nothing, and a crash cannot undo it."""
        full = self._full(path)
        with self._telling(path, "write"):
            if self.is_local:
                _write_durably(Path(full), data)
            else:  # an object store shows an object only once its upload is complete
                with self.filesystem.open_output_stream(full) as stream:
                    stream.write(data)

    def create(self, path: str) -> bool:
        """Make an empty file; False where there is one already.

        On a local disk one of two processes that try at the same moment gets True. On an object store, for which
        `pyarrow.fs` has no such call, both may.
        """
        if not self.is_local:
            if self.exists(path):
                return False
            self.write_bytes(path, b"")
            return True
        with self._telling(path, "write"):
            return _create_durably(Path(self._full(path)))

    def append_line(self, path: str, line: str) -> None:
        """Add to a file on a local disk; it is with the kernel before this returns."""
        with self._telling(path, "write"), open(self._full(path), "a") as file:
            file.write(line)

    def delete_folder(self, path: str) -> None:
        """Remove a folder, its manifest first, so that a half-deleted folder never counts as committed."""
        manifest = f"{path}/{MANIFEST}"
        with self._telling(path, "delete"):
            if self.exists(manifest):
                self.filesystem.delete_file(self._full(manifest))
            if self.exists(path):
                self.filesystem.delete_dir(self._full(path))

    def check_writable(self) -> None:
        """Raise `StorageError` unless a file can be made here; leaves nothing behind, not even the root."""
        if not self.is_local:
            self.write_bytes(".bigray-probe", b"")
            with self._telling(".bigray-probe", "delete"):
                self.filesystem.delete_file(self._full(".bigray-probe"))
            return
        with self._telling("", "write here"):  # looking is refused too, say below a folder of someone else
            probe = _nearest_existing(Path(self.root))
            if not probe.is_dir() or not _can_create_in(probe):
                raise StorageError(f"{self.uri}: cannot write here ({probe} is not a folder this user may write to)")

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    @contextmanager
    def _telling(self, path: str, action: str) -> Iterator[None]:
        """Turn what the filesystem raises into a `StorageError` that names the place and what was tried."""
        try:
            yield
        except OSError as error:
            place = f"{self.uri}/{path}" if path else self.uri
            raise StorageError(f"{place}: cannot {action}: {error}") from error


@dataclass(frozen=True)
class CommittedFolder:
    """A folder read back and verified."""

    manifest: dict[str, Any]
    files: dict[str, bytes]


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """Storage rooted at a local path or at a URI that `pyarrow.fs` knows.

    Raises:
        StorageError: the scheme is unknown or its filesystem cannot be opened.
    """
    text = os.fspath(uri)
    if "://" not in text:
        return Storage(fs.LocalFileSystem(), str(Path(text).expanduser().absolute()), text.rstrip("/") or "/")
    try:
        filesystem, root = fs.FileSystem.from_uri(text)
    except (ValueError, OSError) as error:
        raise StorageError(f"{text}: cannot open storage: {error}") from error
    return Storage(filesystem, root.rstrip("/"), text.rstrip("/"))


def commit_folder(storage: Storage, folder: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Write `files` into `folder` and then the manifest that makes them count."""
    for name, data in files.items():
        storage.write_bytes(f"{folder}/{name}", data)
    entries = {name: {"sha256": sha256(data), "size": len(data)} for name, data in files.items()}
    document = json.dumps({**manifest, "files": entries}, indent=2, sort_keys=True)
    storage.write_bytes(f"{folder}/{MANIFEST}", document.encode())


def read_folder(storage: Storage, folder: str = "") -> CommittedFolder:
    """Read a committed folder and verify every hash.

    Raises:
        CorruptFile: a file's bytes differ from the manifest (both hashes are in the message).
        StorageError: the manifest or a file is missing or unreadable, or the manifest names one outside the folder.
    """
    prefix = f"{folder}/" if folder else ""
    manifest_bytes = storage.read_bytes(f"{prefix}{MANIFEST}")
    try:
        manifest = json.loads(manifest_bytes)
        entries = {str(name): entry["sha256"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{storage.uri}/{prefix}{MANIFEST}: not a manifest: {error}") from error
    if outside := [name for name in entries if _leads_elsewhere(name)]:
        raise StorageError(f"{storage.uri}/{prefix}{MANIFEST}: names a file outside its folder: {outside[0]!r}")
    files = {}
    for name, expected in entries.items():
        data = storage.read_bytes(f"{prefix}{name}")
        if (actual := sha256(data)) != expected:
            raise CorruptFile(f"{storage.uri}/{prefix}{name}", expected, actual)
        files[name] = data
    return CommittedFolder(manifest, files)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _leads_elsewhere(name: str) -> bool:
    return any(part in name for part in ("/", "\\", ".."))


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk wants the space back
        raise
    _sync_folder(path.parent)  # the rename itself must survive a power cut


def _create_durably(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    _sync_folder(path.parent)
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _can_create_in(folder: Path) -> bool:
    # root passes os.access everywhere, also on read-only mounts and /proc: only trying tells
    probe = folder / f".bigray-probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
