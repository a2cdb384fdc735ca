"""Processes of this machine by what the kernel says, and ending them. Read from /proc: Linux only.

A process is named by its pid and the moment it began, so that a pid that another process has got since is left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from bigray.errors import ClusterError

MARK = "BIGRAY_LOCAL_NODE"
"""An environment variable: the processes of a node inherit it, whatever session and parent they get."""

_POLL_S = 0.05
_PROC = Path("/proc")


@dataclass(frozen=True, order=True)
class Process:
    """One process of this boot of the machine."""

    pid: int
    start_ticks: int
    """Clock ticks from the machine's boot to its begin."""


@dataclass(frozen=True)
class Row:
    """What /proc tells of a process."""

    process: Process
    parent: int
    session: int
    mark: str | None
    """The value of `MARK` in its environment; None where there is none, or a process has written its title over it."""
    command: tuple[str, ...] = ()


def snapshot() -> list[Row]:
    """Every process of this machine that is not a zombie."""
    rows = (_row(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdigit())
    return [row for row in rows if row is not None]


def _row(pid: int) -> Row | None:
    """None where it has ended."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
        command = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    state, parent, _, session, *rest = stat.rpartition(")")[2].split()
    if state in "ZX":
        return None
    words = tuple(word.decode(errors="replace") for word in command.split(b"\0") if word)
    return Row(Process(pid, int(rest[15])), int(parent), int(session), _mark_of(pid), words)


def _mark_of(pid: int) -> str | None:
    try:
        variables = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or it has ended
        return None
    start = f"{MARK}=".encode()
    return next((value[len(start) :].decode(errors="replace") for value in variables if value.startswith(start)), None)


def process_of(pid: int) -> Process | None:
    """The process that has this pid now."""
    row = _row(pid)
    return row.process if row else None


def is_alive(process: Process) -> bool:
    return process_of(process.pid) == process


def family(rows: Collection[Row], known: Iterable[Process], has_mark: Callable[[str], bool]) -> list[Row]:
    """Those that are known or marked, the sessions that they lead, and what they have started (pure)."""
    mine = set(known)
    ours = {row.process.pid for row in rows if row.process in mine or (row.mark is not None and has_mark(row.mark))}
    while True:
        more = {row.process.pid for row in rows if row.parent in ours or row.session in ours} - ours
        if not more:
            return [row for row in rows if row.process.pid in ours]
        ours |= more


def ancestors_of(pid: int, rows: Iterable[Row]) -> set[int]:
    """This pid and the pids above it."""
    parents = {row.process.pid: row.parent for row in rows}
    found = set()
    while pid in parents and pid not in found:
        found.add(pid)
        pid = parents[pid]
    return found


def send(process: Process, number: signal.Signals) -> bool:
    """Signal this very process; False where it has ended, whoever has its pid now."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # the descriptor holds on to whatever had the pid when it was opened, so looking afterwards is safe
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_until_gone(find: Callable[[], Collection[Process]], timeout_s: float) -> bool:
    """Whether `find` finds none within this time."""
    deadline = time.monotonic() + timeout_s
    while find():
        if time.monotonic() >= deadline:
            return False
        reap()
        time.sleep(_POLL_S)
    return True


def kill_all(find: Callable[[], Collection[Process]], timeout_s: float = 10.0) -> int:
    """SIGKILL what `find` finds until it finds nothing: a process may start another between two looks.

    Returns how many there were.

    Raises:
        ClusterError: some are still there after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    killed: set[Process] = set()
    while found := find():
        if time.monotonic() >= deadline:
            pids = ", ".join(str(process.pid) for process in sorted(found))
            raise ClusterError(f"processes {pids} do not end, even by SIGKILL: look at them with `ps`, then try again")
        killed |= {process for process in found if send(process, signal.SIGKILL)}
        time.sleep(_POLL_S)
        reap()
    return len(killed)


_spawned: set[int] = set()


def spawn(command: list[str], environment: dict[str, str], log: Path) -> Process:
    """Start a command that outlives this process, in a session of its own; what it prints goes to `log`.

    Raises:
        ClusterError: it cannot be started.
    """
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    try:
        pid = os.posix_spawn(command[0], command, environment, file_actions=actions, setsid=True, setsigmask=[])
    except OSError as error:
        raise ClusterError(f"{command[0]}: cannot be started: {error.strerror}") from error
    _spawned.add(pid)
    # a child of this process that has ended keeps its pid until it is reaped, so this is the one just started
    return process_of(pid) or Process(pid, 0)


def reap() -> None:
    """Take note of children that have ended: until then the kernel keeps their entries."""
    for pid in tuple(_spawned):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _spawned.discard(pid)
