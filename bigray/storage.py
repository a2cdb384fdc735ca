"""Files of a run, through `pyarrow.fs`: a local folder, NFS, `s3://` or `gs://`.

A folder is *committed* when its `manifest.json` exists: files are written first, the manifest last, and the manifest
holds the size and SHA-256 of every file. What has no manifest does not exist, and what a manifest does not name is no
part of its folder.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from bigray.errors import CorruptFile, DiskFull, StorageError
from bigray.s3 import needs_uri, open_s3, options_of, reopen_s3
from bigray.storage_retry import AT_THE_START, PATIENCE, Patience, is_transient, keep_trying

T = TypeVar("T")

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
"""Ending of a file that is being written; one that stays was left by a process that died."""
CREDENTIALS = re.compile(r"(?s)(?<=://)(?<!hdfs://)[^/\s:@]*:.*@|(?<=hdfs://)[^/\s:@]*:[^/\s]*@")
"""A name and a secret in front of a URI's host; a secret may hold slashes. With HDFS a port may stand there instead."""
SECRET_PARAMETERS = re.compile(r"(?is)(?<=[?&])([^=&?]*(?:secret|key|password|token|sig)[^=&?]*)=[^&]+")
"""Parameters of a URI that hold a secret."""
ANY_CREDENTIALS = re.compile(r"(?s)(?<=://).*:.*@")
"""What may be some, in a URI that cannot be read anyway."""
_logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Hashed and written at a time: small enough to be in the cache for both, large enough to cost no time in calls."""

Content = bytes | Iterable[bytes | memoryview]
"""What a file is to hold: at once, or in pieces made while it is written. Pieces that can be walked again, as those of
a list, let an upload that broke off be begun anew; an iterator does not."""


@dataclass(frozen=True)
class Written:
    """A file as it went to storage: what its manifest says about it."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Storage:
    """One root under which a run keeps its files. Picklable: the driver hands it to workers and replicas.

    What an object store refuses for a while is tried again for as long as `storage_retry.PATIENCE`; a `StorageError`
    is final. A pickled one holds no credentials: every process has those of its own environment.
    """

    filesystem: fs.FileSystem
    root: str
    """Path of the root as the filesystem spells it (no scheme)."""
    uri: str
    """What the user wrote, for messages, and to open it again elsewhere."""
    patience: Patience = PATIENCE

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.filesystem, fs.S3FileSystem) and needs_uri(self.uri):
            return _opened_again, (self.uri, self.patience)
        if isinstance(self.filesystem, fs.S3FileSystem):
            return _reopened, (options_of(self.filesystem), self.root, self.uri, self.patience)
        return Storage, (self.filesystem, self.root, self.uri, self.patience)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def parent(self) -> Storage:
        """The folder this one is in."""
        path, options = _split_uri(self.uri)
        uri = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
        return Storage(self.filesystem, self.root.rpartition("/")[0], uri + options, self.patience)

    def child(self, *parts: str) -> Storage:
        return Storage(self.filesystem, "/".join((self.root, *parts)), self.uri_of(*parts), self.patience)

    def uri_of(self, *parts: str) -> str:
        """The URI of what is in here: how its store is reached stays at the end."""
        path, options = _split_uri(self.uri)
        return "/".join((path, *parts)) + options

    def uri_beside(self, name: str) -> str:
        """The URI of what has this name in the same folder."""
        path, options = _split_uri(self.uri)
        folder, slash, _ = path.rpartition("/")
        return f"{folder}{slash}{name}{options}"

    def exists(self, path: str = "") -> bool:
        info = self._try("look up", path, self.filesystem.get_file_info)
        return bool(info.type != fs.FileType.NotFound)

    def list_names(self, path: str = "") -> list[str]:
        """Base names directly under `path`, sorted; empty where `path` is absent."""

        def look(full: str) -> list[fs.FileInfo]:
            return list(self.filesystem.get_file_info(fs.FileSelector(full, allow_not_found=True)))

        return sorted(info.base_name for info in self._try("list", path, look))

    def read_bytes(self, path: str) -> bytes:
        def read(full: str) -> bytes:
            # a stream would ask an object store for a quarter of a megabyte at a time
            with self.filesystem.open_input_file(full) as file:
                return bytes(file.read())

        return self._try("read", path, read)

    def file_size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none."""
        info = self._try("look up", path, self.filesystem.get_file_info)
        return int(info.size) if info.type == fs.FileType.File else None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole file so that a reader sees all of it or nothing, and a crash cannot undo it."""
        self.write_file(path, data)

    def write_file(self, path: str, content: Content) -> Written:
        """As `write_bytes`, of content that is walked once: each chunk is hashed and written while it is in the cache.

        On an object store it is walked again for each attempt, where it can be.

        Raises:
            DiskFull: there is no space for it; what was there before still is.
            StorageError: it cannot be written.
        """
        if self.is_local:
            return self._try("write", path, lambda full: _write_durably(Path(full), content))
        # an object store shows an object only once its upload is complete
        return self._try("write", path, lambda full: _upload(self.filesystem, full, content), _can_be_again(content))

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
        return self._try("write", path, lambda full: _create_durably(Path(full)))

    def append_line(self, path: str, line: str) -> None:
        """Add to a file on a local disk; it is with the kernel before this returns."""
        with self._telling(path, "write"), open(self._full(path), "a") as file:
            file.write(line)

    def delete_file(self, path: str) -> None:
        """Remove a file that is there."""
        self._try("delete", path, _once_there(self.filesystem.delete_file))

    def delete_folder(self, path: str) -> None:
        """Remove a folder, its manifest first, so that a half-deleted folder never counts as committed."""
        manifest = f"{path}/{MANIFEST}"
        if self.exists(manifest):
            self.delete_file(manifest)
            if self.is_local:  # a power cut must not bring the manifest back after the files are gone
                self._try("delete", path, lambda full: _sync_folder(Path(full)))
        if self.exists(path):
            self._try("delete", path, _once_there(self.filesystem.delete_dir))

    def check_writable(self) -> None:
        """Raise `StorageError` unless a file can be made here; leaves nothing behind, not even the root.

        Of an object store that does not answer it is told in seconds.
        """
        if not self.is_local:
            at_once = replace(self, patience=AT_THE_START)
            at_once.write_bytes(".bigray-probe", b"")
            at_once.delete_file(".bigray-probe")
            return
        with self._telling("", "write here"):  # looking is refused too, say below a folder of someone else
            probe = _nearest_existing(Path(self.root))
            if not probe.is_dir() or not _can_create_in(probe):
                raise StorageError(f"{self.uri}: cannot write here ({probe} is not a folder this user may write to)")

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _try(self, action: str, path: str, call: Callable[[str], T], can_be_again: bool = True) -> T:
        """What `call` gives for the full path, in the end."""
        full = self._full(path)
        with self._telling(path, action):
            if self.is_local or not can_be_again:
                return call(full)

            def warn(error: OSError) -> None:
                place, reason = self._place(path), _one_line(error)
                limit = f"trying again for {self.patience.total_s:g} s"
                _logger.warning("%s: cannot %s: %s; %s", place, action, reason, limit)

            return keep_trying(lambda: call(full), self.patience, warn)

    def _place(self, path: str) -> str:
        return self.uri_of(path) if path else self.uri

    @contextmanager
    def _telling(self, path: str, action: str) -> Iterator[None]:
        """Turn what the filesystem raises into a `StorageError` that names the place and what was tried."""
        try:
            yield
        except OSError as error:
            place = self._place(path)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = os.strerror(error.errno)
                raise DiskFull(
                    f"{place}: cannot {action}: {reason}; free some, then run the same command again"
                ) from error
            hint = "; once it answers again, run the same command" if is_transient(error) else ""
            raise StorageError(f"{place}: cannot {action}: {_one_line(error)}{hint}") from error


def _reopened(options: Mapping[str, Any], root: str, uri: str, patience: Patience) -> Storage:
    return Storage(reopen_s3(options), root, uri, patience)


def _opened_again(uri: str, patience: Patience) -> Storage:
    return replace(open_storage(uri), patience=patience)


def _split_uri(uri: str) -> tuple[str, str]:
    """The path, and how its store is reached: what follows `?`. A local path may have a question mark of its own."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return path, mark + options


def _one_line(error: OSError) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class CommittedFolder:
    """A folder read back and verified."""

    manifest: dict[str, Any]
    files: dict[str, bytes]


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """Storage rooted at a local path or at a URI that `pyarrow.fs` knows.

    Raises:
        StorageError: the scheme is unknown or its filesystem cannot be opened; or the URI holds a secret, which would
            end in logs, journals, command lines and bundles.
    """
    text = os.fspath(uri)
    shown = _without_secrets(text)
    if shown != text:
        raise StorageError(
            f"{shown}: a URI may hold no key and secret; set them in the environment "
            f"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if "://" not in text:
        return Storage(fs.LocalFileSystem(), str(Path(text).expanduser().absolute()), text.rstrip("/") or "/")
    try:
        filesystem, root = open_s3(text) if text.startswith("s3://") else fs.FileSystem.from_uri(text)
    except (ValueError, OSError) as error:
        shown = ANY_CREDENTIALS.sub("***@", text)
        raise StorageError(f"{shown}: cannot open storage: {str(error).replace(text, shown)}") from error
    path, options = _split_uri(text)
    return Storage(filesystem, root.rstrip("/"), path.rstrip("/") + options, PATIENCE)


def _without_secrets(uri: str) -> str:
    """The same where there are none; a local path has none."""
    if "://" not in uri:
        return uri
    return SECRET_PARAMETERS.sub(r"\1=***", CREDENTIALS.sub("***@", uri))


def commit_folder(
    storage: Storage,
    folder: str,
    files: Mapping[str, Content],
    manifest: Mapping[str, Any],
    *,
    token: str = "",
    before_commit: Callable[[], None] | None = None,
) -> None:
    """Write `files` into `folder` and then the manifest that makes them count.

    With a `token` each file is stored under a name of its own (`model.safetensors` as `model-<token>.safetensors`), so
    that no two writers share a file and a folder can be committed again: until its manifest is replaced, in one step,
    the folder is what it was.

    `before_commit` is called right before the manifest is written and raises where this process may not write any
    more. That is a check followed by a write: `pyarrow.fs` (26) has no conditional put, neither `If-None-Match` on S3
    nor a generation on GCS, so a writer that stands still between the two can still replace the manifest of the one
    that took over. With tokens the folder then is what either of them wrote or is refused by its hashes, never a
    mixture that loads.
    """
    entries = write_files(storage, folder, files, token)
    try:
        if before_commit is not None:
            before_commit()
        write_manifest(storage, folder, {**manifest, "files": entries})
    except DiskFull:
        if not _may_be_committed(storage, folder, entries):
            _give_up(storage, folder, entries)
        raise


def write_files(storage: Storage, folder: str, files: Mapping[str, Content], token: str = "") -> dict[str, Any]:
    """Write `files`, under the names that go with `token`; returns what a manifest says of them.

    Raises:
        DiskFull: none of them is left.
    """
    entries: dict[str, dict[str, Any]] = {}
    try:
        for name, content in files.items():
            stored = _stored_name(name, token)
            written = storage.write_file(f"{folder}/{stored}", content)
            entries[name] = {"size": written.size, "sha256": written.sha256} | ({"stored": stored} if token else {})
    except DiskFull:
        _give_up(storage, folder, entries)
        raise
    return entries


def _may_be_committed(storage: Storage, folder: str, entries: Mapping[str, Any]) -> bool:
    """Whether the manifest took effect though writing it failed: it is renamed before the folder is synced."""
    try:
        return storage.exists(f"{folder}/{MANIFEST}") and read_manifest(storage, folder)["files"] == entries
    except StorageError:
        return True


def _give_up(storage: Storage, folder: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Delete what was written: it is of no use now, and others may need the space."""
    for name, entry in entries.items():
        with suppress(StorageError):
            storage.delete_file(f"{folder}/{entry.get('stored', name)}")


def write_manifest(storage: Storage, folder: str, manifest: Mapping[str, Any]) -> None:
    """Write, or replace in one step, what a folder consists of."""
    storage.write_bytes(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=2, sort_keys=True).encode())


def remove_leftovers(storage: Storage, folder: str, manifest: Mapping[str, Any]) -> None:
    """Remove the files of a committed folder that its manifest does not name."""
    named = {MANIFEST, *(entry.get("stored", name) for name, entry in manifest["files"].items())}
    for name in storage.list_names(folder):
        if name not in named:
            storage.delete_file(f"{folder}/{name}")


def read_folder(storage: Storage, folder: str = "") -> CommittedFolder:
    """Read a committed folder and verify the size and hash of every file.

    Raises:
        CorruptFile: a file is missing, or its bytes differ from the manifest; what was expected and what was found are
            in the message.
        StorageError: the manifest is missing or unreadable, or names a file outside the folder.
    """
    manifest = read_manifest(storage, folder)
    return CommittedFolder(manifest, read_files(storage, folder, manifest))


def read_manifest(storage: Storage, folder: str = "") -> dict[str, Any]:
    """The manifest of a committed folder, checked for its form only.

    Raises:
        StorageError: it is missing or unreadable, or names a file outside the folder.
    """
    path = f"{folder}/{MANIFEST}" if folder else MANIFEST
    data = storage.read_bytes(path)
    try:
        manifest: dict[str, Any] = json.loads(data)
        entries = {str(name): Written(int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        stored = [*entries, *(str(entry.get("stored", "")) for entry in manifest["files"].values())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{storage.uri}/{path}: not a manifest: {error}") from error
    if outside := [name for name in stored if _leads_elsewhere(name)]:
        raise StorageError(f"{storage.uri}/{path}: names a file outside its folder: {outside[0]!r}")
    return manifest


def read_files(
    storage: Storage, folder: str, manifest: Mapping[str, Any], names: Iterable[str] | None = None
) -> dict[str, bytes]:
    """The files a manifest lists, or those of them in `names`, each verified.

    Raises:
        CorruptFile: one is missing or differs.
        StorageError: one cannot be read.
    """
    entries = manifest["files"]
    wanted = entries if names is None else names
    return {name: _read_verified(storage, folder, name, entries[name]) for name in wanted}


def _read_verified(storage: Storage, folder: str, name: str, entry: Mapping[str, Any]) -> bytes:
    stored = entry.get("stored", name)
    path = f"{folder}/{stored}" if folder else stored
    place = f"{storage.uri}/{path}"
    size = storage.file_size(path)
    if size != entry["size"]:  # asked first, so that a wrong file is not read into memory
        found = "no file" if size is None else f"{size}"
        raise CorruptFile(place, f"{entry['size']}", found, what="size")
    data = storage.read_bytes(path)
    if (actual := sha256(data)) != entry["sha256"]:
        raise CorruptFile(place, entry["sha256"], actual)
    return data


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stored_name(name: str, token: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return f"{stem}-{token}{dot}{ending}" if token else name


def _leads_elsewhere(name: str) -> bool:
    return any(part in name for part in ("/", "\\", ".."))


def _write_hashing(content: Content, write: Callable[[memoryview], object]) -> Written:
    digest, size = hashlib.sha256(), 0
    for piece in (content,) if isinstance(content, bytes) else content:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            digest.update(chunk)
            write(chunk)
        size += len(view)
    return Written(size, digest.hexdigest())


def _upload(filesystem: fs.FileSystem, full: str, content: Content) -> Written:
    """Whole, or not at all: pyarrow can only complete an upload, which for one that broke off it refuses."""
    stream = filesystem.open_output_stream(full)
    try:
        if isinstance(content, bytes):  # handed over at once: no signal gets in between
            stream.write(content)
            written = Written(len(content), sha256(content))
        else:
            written = _write_hashing(content, stream.write)
    except BaseException:
        with suppress(OSError):
            stream.close()
            if not isinstance(content, bytes):  # what there was of it is an object now
                filesystem.delete_file(full)
        raise
    stream.close()
    return written


def _can_be_again(content: Content) -> bool:
    return isinstance(content, bytes) or iter(content) is not content


def _once_there(delete: Callable[[str], None]) -> Callable[[str], None]:
    """A deletion of which the answer got lost has happened: to find nothing at the next attempt is what was wanted."""
    attempts = itertools.count()

    def attempt(full: str) -> None:
        is_first = next(attempts) == 0
        try:
            delete(full)
        except FileNotFoundError:
            if is_first:
                raise

    return attempt


def _write_durably(path: Path, content: Content) -> Written:
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb", buffering=CHUNK_BYTES) as file:
            written = _write_hashing(content, file.write)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)  # the rename itself must survive a power cut
    except OSError:
        with suppress(OSError):  # a full disk wants the space back; why it failed is the story to tell
            temporary.unlink(missing_ok=True)
        raise
    return written


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it; each survives a power cut, as what will be written into it has to."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _create_durably(path: Path) -> bool:
    _make_folder(path.parent)
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
    except OSError as error:  # some network mounts have no such thing for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
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
