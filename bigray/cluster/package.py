"""What of a folder is sent to a cluster with a job: ignore files, secrets, sizes, the limit. Reads the folder alone.

`ray job submit` sends whatever no ignore file names, `.env` and `id_rsa` too, and learns from the dashboard's error 500
that it is too much. Here a package is looked through before there is a connection, and a person is told what is in it.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import stat
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from bigray.cluster.secrets import HEAD_BYTES, holds_private_key, is_secret_path
from bigray.data.sources.locations import find_files
from bigray.data.sources.reading import KINDS
from bigray.errors import SpecError, StorageError

if TYPE_CHECKING:
    from bigray.specs import JobSpec

LIMIT_BYTES = 95 * 2**20
"""The dashboard takes request bodies of up to 100 MiB."""
NEVER_SENT = frozenset(
    {".git", ".hg", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"}
)
"""Folders that no job reads; Ray leaves out the first of them too."""
IGNORE_FILES = (".gitignore", ".rayignore")
MIB = 2**20

Ignored = Callable[[Path], bool]


@dataclass(frozen=True)
class PackedFile:
    """A file that is sent."""

    path: str
    """From the folder, with slashes."""
    size: int
    """Bytes."""
    is_executable: bool = False


@dataclass(frozen=True)
class LeftOut:
    """What no ignore file names and is not sent all the same."""

    path: str
    why: str


@dataclass(frozen=True)
class Package:
    """What is sent of a folder. Nothing has been read of it but the first bytes of each file."""

    folder: Path
    files: tuple[PackedFile, ...]
    """By path."""
    left_out: tuple[LeftOut, ...]

    @property
    def size(self) -> int:
        """Bytes, before they are compressed."""
        return sum(file.size for file in self.files)

    def largest(self, count: int = 10) -> tuple[PackedFile, ...]:
        return tuple(sorted(self.files, key=lambda file: (-file.size, file.path))[:count])

    def holds(self, path: str) -> bool:
        """Whether a file, or anything of a folder, is sent."""
        return any(file.path == path or file.path.startswith(f"{path}/") for file in self.files)


def find_package(folder: str | Path = ".") -> Package:
    """Look through a folder. Ignored are what its `.gitignore` and `.rayignore` files name, by Ray's own reading.

    Raises:
        SpecError: with one line for each file or folder that cannot be read, or has a name that no package can hold.
    """
    search = _Search(Path(folder).resolve())
    search.look_through(search.root, (), frozenset())
    if search.faults:
        raise SpecError(search.faults)
    files = tuple(sorted(search.files, key=lambda file: file.path))
    return Package(search.root, files, tuple(sorted(search.left_out, key=lambda left: left.path)))


@dataclass
class _Search:
    root: Path
    files: list[PackedFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def look_through(self, folder: Path, ignores: tuple[Ignored, ...], around: frozenset[Path]) -> None:
        """`around`: the folders that this one is in, each as it really is."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            ignores += _ignores_of(folder)
        except OSError as error:
            self._cannot_read(folder, error)
            return
        around |= {folder.resolve()}
        for entry in entries:
            path = Path(entry.path)
            if entry.name in NEVER_SENT or self._is_secret(entry, path) or any(ignored(path) for ignored in ignores):
                continue
            if entry.is_symlink() and (why := self._where_it_leads(path, around)):
                self._leave_out(path, why)
            elif entry.is_dir():
                self.look_through(path, ignores, around)
            else:
                self._add_file(path)

    def _is_secret(self, entry: os.DirEntry[str], path: Path) -> bool:
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link in a loop, or to where nobody may look: `_where_it_leads` names it
            is_folder = False
        if is_secret_path(entry.name, is_folder=is_folder):
            self._leave_out(path, "it holds secrets by its name")
            return True
        return False

    def _where_it_leads(self, link: Path, around: frozenset[Path]) -> str | None:
        """Why a link is not followed; None where it is."""
        try:
            target = link.resolve(strict=True)
        except (OSError, RuntimeError):
            return "a link that leads nowhere"
        if not target.is_relative_to(self.root):
            return "a link that leads out of the folder"
        parts = target.relative_to(self.root).parts
        if any(part in NEVER_SENT or is_secret_path(part, is_folder=part != parts[-1]) for part in parts):
            return "a link to what is never sent"
        return "a link to a folder that it is in" if target in around else None

    def _add_file(self, path: Path) -> None:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                self._leave_out(path, _kind_of(status.st_mode))
                return
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError as error:
            self._cannot_read(path, error)
            return
        name = self._name(path)
        if holds_private_key(path.name, head):
            self._leave_out(path, "it holds a private key")
        elif not name.isprintable():  # bytes that are no text, and line ends, which no table can show
            self.faults.append(
                f"{name!r}: no package can hold such a name; rename it, or name its folder in .rayignore"
            )
        else:
            self.files.append(PackedFile(name, status.st_size, bool(status.st_mode & stat.S_IXUSR)))

    def _leave_out(self, path: Path, why: str) -> None:
        self.left_out.append(LeftOut(self._name(path), why))

    def _cannot_read(self, path: Path, error: OSError) -> None:
        name = self._name(path)
        self.faults.append(
            f"{name}: cannot be read: {error.strerror or error}; where the job does not need it, name it in .rayignore"
        )

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _ignores_of(folder: Path) -> tuple[Ignored, ...]:
    """What the ignore files of a folder leave out: of Ray itself, so that both ways of submitting send the same."""
    if not any((folder / name).is_file() for name in IGNORE_FILES):
        return ()
    # pathspec is no dependency of Ray: it carries a copy, which only this function of its uses
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    try:
        return tuple(get_excludes_from_ignore_files(folder, True, logging.getLogger(__name__)))
    except ValueError as error:  # bytes that are no text, a pattern that is none
        names = " or ".join(name for name in IGNORE_FILES if (folder / name).is_file())
        raise SpecError(f"{folder / names}: not a file of patterns: {error}") from error


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFSOCK: "a socket",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFBLK: "a device",
        stat.S_IFCHR: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "not a file")


def size_fault(package: Package, needed: Iterable[str] = (), limit: int = LIMIT_BYTES) -> str | None:
    """Why a package is too large to be sent, and what to leave out; None where it is not."""
    if package.size <= limit:
        return None
    named = to_ignore(package, frozenset(needed), package.size - limit)
    fix = f"put {', '.join(named)} into .rayignore" if named else "send a smaller folder"
    return (
        f"{package.folder}: {package.size / MIB:,.0f} MiB to send, and a cluster takes {limit / MIB:,.0f}; {fix}, and "
        f"keep data and weights on storage that the cluster sees"
    )


def to_ignore(package: Package, needed: frozenset[str], excess: int) -> list[str]:
    """The fewest folders and files whose absence makes up for `excess` bytes, none of which holds what is needed."""
    around = {parent for path in needed for parent in PurePosixPath(path).parents}
    sizes: Counter[str] = Counter()
    for file in package.files:
        place = _outermost_without(file.path, needed, around)
        if place is not None:
            sizes[place] += file.size
    chosen: list[str] = []
    for place, size in sizes.most_common():
        if excess <= 0:
            break
        chosen.append(place)
        excess -= size
    return chosen if excess <= 0 else []


def _outermost_without(path: str, needed: frozenset[str], around: Set[PurePosixPath]) -> str | None:
    """The largest folder around a file that holds nothing needed, with a slash behind it; else the file itself."""
    if path in needed:
        return None
    for folder in reversed(PurePosixPath(path).parents[:-1]):
        if folder not in around and folder.as_posix() not in needed:
            return f"/{folder.as_posix()}/"
    return f"/{path}"


def relative_to_folder(package_folder: Path, place: str, path: str) -> str:
    """A file of the command as the job will find it.

    Raises:
        SpecError: it is outside of the folder that is sent.
    """
    full = Path(os.path.abspath(Path(path).expanduser()))
    for folder, file in ((package_folder, full), (package_folder, full.resolve())):
        if file.is_relative_to(folder):
            return file.relative_to(folder).as_posix()
    raise SpecError(
        f"{place}: {path} is outside of {package_folder}, which is what the job gets; run the command in a folder that "
        f"holds it"
    )


def missing_faults(package: Package, needed: Iterable[tuple[str, str]]) -> list[str]:
    """What the job reads, by the place that says so, and would not find."""
    sent = {file.path for file in package.files}
    folders = {parent.as_posix() for path in sent for parent in PurePosixPath(path).parents}
    reasons = {left.path: left.why for left in package.left_out}
    missing: dict[str, list[str]] = {}
    for place, path in needed:
        if path not in sent and path not in folders:
            missing.setdefault(place, []).append(path)
    return [_missing_fault(place, paths, reasons.get(paths[0])) for place, paths in missing.items()]


def _missing_fault(place: str, paths: Sequence[str], reason: str | None) -> str:
    first, *more = paths
    what = f"{first} and {len(more):,} more are" if more else f"{first} is"
    them = "them" if more else "it"
    why = reason or f"an ignore file names {them}"
    return f"{place}: {what} not sent: {why}; keep {them} where the cluster sees {them}, or have {them} sent"


def files_of_job(job: JobSpec, folder: Path) -> list[tuple[str, str]]:
    """What a job reads from the folder: its data, its weights and its own code, each with the key that names it."""
    found: list[tuple[str, str]] = []
    for key in ("source", "train", "test"):
        source = getattr(job.data, key)
        if source is not None:
            found += [(f"data.{key}", path) for path in _data_of(source, folder)]
    for name, model in job.models.items():
        found += [(f"models.{name}.factory", path) for path in _paths_of(model.factory, folder)]
        if model.weights is not None:
            found += [(f"models.{name}.weights", path) for path in _paths_of(model.weights, folder)]
    for key in ("task", "loop"):
        if (own := getattr(job.training, key)) is not None and ":" in own:
            found += [(f"training.{key}", path) for path in _paths_of(own, folder)]
    return found


def _data_of(source: str, folder: Path) -> list[str]:
    """Of a folder of data each file that is read, since rows that are not sent would be missed by nobody."""
    paths = _paths_of(source, folder)
    if not any((folder / path).is_dir() for path in paths):
        return paths
    found = (Path(file.path) for file in find_files(str(folder / Path(source).expanduser())) if file.kind in KINDS)
    return [path.relative_to(folder).as_posix() for path in found if path.is_relative_to(folder)]


def _paths_of(reference: str, folder: Path) -> list[str]:
    """Files and folders below `folder` that a path, a glob or `package.module:name` means; none where it is a URI."""
    if "://" in reference:
        return []
    module, separator, name = reference.partition(":")
    if separator and name.isidentifier():
        file = getattr(sys.modules.get(module), "__file__", None)
        paths = [file] if file is not None else []
    else:
        paths = glob.glob(str(folder / Path(reference).expanduser()))
    inside = [Path(os.path.abspath(path)) for path in paths]
    return [path.relative_to(folder).as_posix() for path in inside if path.is_relative_to(folder)]


def write_zip(package: Package, target: Path) -> str:
    """Write what is sent as a zip file; returns a hash of what it holds, the same on every machine.

    Raises:
        SpecError: with all files in it, it is larger than a cluster takes.
        StorageError: a file has gone, or there is no space for the zip file.
    """
    hashed = hashlib.sha256()
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for file in package.files:
                data = (package.folder / file.path).read_bytes()
                entry = zipfile.ZipInfo(file.path)  # with zip's first day for a date: equal folders make equal files
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (0o100755 if file.is_executable else 0o100644) << 16
                archive.writestr(entry, data)
                line = f"{file.path}\0{file.is_executable}\0{hashlib.sha256(data).hexdigest()}\n"
                hashed.update(line.encode())
    except OSError as error:
        raise StorageError(f"{package.folder}: cannot be packed: {error}") from error
    if (size := target.stat().st_size) > LIMIT_BYTES:
        raise SpecError(
            f"{package.folder}: {len(package.files):,} files are {size / MIB:,.0f} MiB as a package, and a cluster "
            f"takes {LIMIT_BYTES / MIB:,.0f}; name folders in .rayignore that the job does not need"
        )
    return hashed.hexdigest()[:12]


def read_pins(path: Path) -> tuple[str, ...]:
    """The packages of a file of constraints, for Ray to install; Ray itself is there already.

    Raises:
        SpecError: there is no such file, or a line is something else than `name==version`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise SpecError(f"--install: {path}: {reason}; it holds what to install, a line name==version each") from error
    pins = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, start=1)]
    faults = [
        f"--install: {path}:{number}: not of the form name==version" for number, pin in pins if pin and not _is_pin(pin)
    ]
    if faults:
        raise SpecError(faults)
    return tuple(pin for _, pin in pins if pin and _name_of(pin) != "ray")


def _is_pin(text: str) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return False
    return requirement.url is None and [each.operator for each in requirement.specifier] == ["=="]


def _name_of(pin: str) -> str:
    from packaging.requirements import Requirement

    return Requirement(pin).name.lower()
