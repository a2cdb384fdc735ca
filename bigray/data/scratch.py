"""Folders on a local disk for rows that do not fit in memory: made, held, and removed with whoever holds them.

A lock tells whether a folder is in use, not a process number: it is let go of by the kernel when a process ends in any
way, and it works between containers that share the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from bigray.errors import SpecError, StorageError
from bigray.host_memory import shown

LOCK = "in-use"
_SPARE_BYTES = 64 * 2**20
"""Left free on the disk, for others."""


class Scratch:
    """A folder of this process, removed when this object is no more, at the latest at the process's end."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._remove = weakref.finalize(self, _remove_own, path, lock, os.getpid())

    def remove(self) -> None:
        """Now; a second time does nothing."""
        self._remove()


def new_scratch(num_bytes: int, root: Path | None = None) -> Scratch:
    """A folder on a disk that has room for so many bytes; what dead processes left there is removed first.

    Raises:
        SpecError: there is no room, or the place belongs to somebody else.
    """
    root = scratch_root() if root is None else root
    remove_abandoned(root)
    check_room(root, num_bytes)
    name = secrets.token_hex(8)
    hidden = root / f".{name}"
    hidden.mkdir(mode=0o700)
    lock = _open_lock(hidden)
    fcntl.flock(lock, fcntl.LOCK_EX)
    hidden.rename(root / name)  # whoever clears up sees it from here on, and it is locked
    return Scratch(root / name, lock)


def shared_scratch(name: str, fill: Callable[[Path], None], root: Path | None = None) -> Scratch:
    """A folder that several processes of this machine use: the first one fills it, the others wait for that.

    The last one that lets go of it removes it. Where filling fails, the next one tries.
    """
    root = scratch_root() if root is None else root
    scratch = _held_with_others(root / name)
    try:
        filling = os.open(scratch.path / "filling", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(filling, fcntl.LOCK_EX)
            if not (scratch.path / "complete").exists():
                fill(scratch.path)
                (scratch.path / "complete").touch()
        finally:
            os.close(filling)
    except BaseException:
        scratch.remove()
        raise
    return scratch


def _held_with_others(path: Path) -> Scratch:
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed by the one that just let go of it
            lock = _open_lock(path)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_there(path, lock):
                return Scratch(path, lock)
            os.close(lock)


def remove_abandoned(root: Path) -> None:
    """Remove folders that no process holds any more."""
    for path in root.iterdir():
        if path.name.startswith(".") or not path.is_dir():
            continue
        with contextlib.suppress(OSError):  # in use, or another process was faster
            lock = _open_lock(path)
            _remove_own(path, lock, os.getpid())


def check_room(root: Path, num_bytes: int) -> None:
    """Raise `SpecError` unless the disk has room for so many bytes."""
    free = shutil.disk_usage(root).free
    if num_bytes + _SPARE_BYTES > free:
        raise SpecError(
            f"data.memory_gb: the rows need {shown(num_bytes)} on the disk of {root}, which has {shown(free)} free; "
            f"set TMPDIR to a folder with room"
        )


def scratch_root() -> Path:
    """This user's folder for rows: in TMPDIR, else in /var/tmp, since /tmp is memory on many machines.

    Raises:
        StorageError: it cannot be made, or another user has it.
    """
    place = os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())
    root = Path(place) / f"bigray-rows-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        raise StorageError(f"{root}: no folder for rows can be made there ({error.strerror}); set TMPDIR") from None
    if root.is_symlink() or found.st_uid != os.getuid():
        raise StorageError(f"{root}: belongs to another user; remove it, or set TMPDIR to a folder of your own")
    return root


def _open_lock(folder: Path) -> int:
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)


def _is_there(folder: Path, lock: int) -> bool:
    """Whether the locked file is still the one in the folder."""
    try:
        return os.path.samestat(os.stat(folder / LOCK), os.fstat(lock))
    except FileNotFoundError:
        return False


def _remove_own(folder: Path, lock: int, pid: int) -> None:
    """Remove the folder unless another process holds it; a forked process leaves its parent's alone."""
    if pid != os.getpid():
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = folder.rename(folder.with_name(f".{secrets.token_hex(8)}"))  # at once: nobody finds half of it
        shutil.rmtree(gone, ignore_errors=True)
    except OSError:  # in use
        return
    finally:
        os.close(lock)
