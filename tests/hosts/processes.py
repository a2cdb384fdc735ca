"""Processes of a host, seen from the machine: started, counted, paused and ended by their pids, and nothing else is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.waiting import wait_until

PATIENCE_S = 15.0


def enter(init_pid: int, command: Sequence[str], folder: Path) -> list[str]:
    """The command line that runs a command on the host whose first process is given, in a folder of it."""
    kinds = ("--net", "--pid", "--mount", "--uts")
    return ["nsenter", f"--target={init_pid}", *kinds, "--", "env", f"--chdir={folder}", *command]


def run(command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run to the end; its output is in files, so that what it leaves running in the background holds nobody up.

    Raises:
        subprocess.TimeoutExpired: with what it had printed; it and its process group are ended.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = start(command, environment, output, errors)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired as late:
            raise subprocess.TimeoutExpired(late.cmd, timeout_s, _read(output), _read(errors)) from None
        finally:
            if process.poll() is None:
                end(process)
        return subprocess.CompletedProcess(list(command), process.returncode, _read(output), _read(errors))


def start(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes], errors: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start in a process group of its own."""
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE_S)


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def only_child(pid: int) -> int:
    """The one child of a process that has one, such as `nsenter` or `unshare`, once it is there."""
    children: list[int] = []

    def has_one() -> bool:
        children[:] = [child for child in _all_pids() if _parent(child) == pid]
        return len(children) == 1

    wait_until(has_one, f"process {pid} has no child")
    return children[0]


def pid_namespace(pid: int) -> str:
    """The kernel's name for the pid namespace that a process is in."""
    return os.readlink(f"/proc/{pid}/ns/pid")


def alive_in(namespace: str) -> dict[int, str]:
    """Pid, as the machine counts, and command line of each live process in a pid namespace."""
    found = {}
    for pid in _all_pids():
        with contextlib.suppress(OSError):  # ended while we looked
            if pid_namespace(pid) == namespace and _state(pid) not in ("Z", "X"):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def send(pids: Sequence[int], signal_: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_)


def pause(namespace: str) -> None:
    """Stop every process in a pid namespace, also those that are being started meanwhile."""

    def all_stand() -> bool:
        pids = list(alive_in(namespace))
        send(pids, signal.SIGSTOP)
        # one that waits in the kernel ("D"), as for a child of its that stands, gets no further than its signal
        return not any(_state(pid) in ("R", "S") for pid in pids)

    wait_until(all_stand, f"{namespace}: some process cannot be stopped")


def go_on(namespace: str) -> None:
    """Undo `pause`; `nsenter` and `unshare`, which are outside, stop themselves when their child is stopped."""
    stopped = list(alive_in(namespace))
    send(sorted({*stopped, *(parent for pid in stopped if (parent := _parent(pid)))}), signal.SIGCONT)


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name, which may hold anything; none where the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    return next(iter(_stat(pid)), "X")


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0
