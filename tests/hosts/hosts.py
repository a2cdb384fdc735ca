"""Real hosts on one machine: own address, hostname, processes, `/tmp`, `/dev/shm`, home and token.

    with Network(tmp_path) as network:
        head, other = network.add("head"), network.add("other")
        print(other.run(["ping-something", head.address]).stdout)
        other.link.cut()
        network.kill(head)

What hosts do not have of their own is the machine's: its files, so that every folder is shared unless a host is given a
disk at that place, its clock, its CPUs and its memory. Hosts reach one another and nothing else. All names are of this
package (`links.PREFIX`) and everything is ended by pid; what a killed test left behind goes when the next one starts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from tests.hosts import links, processes
from tests.hosts.first_process import Setup
from tests.hosts.links import Link
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
TMP = Path("/tmp")
"""Every host's own, where Ray and Serve keep theirs; but the test's folder, the checkout and Python are seen there."""
SHARED_MEMORY_MB = 512
NUMBERS = range(1, 250)
"""Of networks: the third part of their addresses, 10.77.NUMBER.HOST."""
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "umount")
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Host:
    """What is known of a host from its start to its end."""

    name: str
    """Its hostname, which the others know too."""
    address: str
    link: Link
    folder: Path
    """On the machine: the host's home, its `/tmp` and the logs of what was started on it."""
    init_pid: int
    """Of its first process, as the machine counts."""
    pid_namespace: str
    shared_memory_mb: int
    environment: Mapping[str, str] = field(repr=False)
    """Of what is run there: without Ray's variables, the home its own."""

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def token_file(self) -> Path:
        return self.home / ".ray" / "auth_token"

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
        folder: Path = REPOSITORY,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host, to its end.

        Raises:
            subprocess.TimeoutExpired: with what it had printed; it and its process group are ended.
        """
        inside = processes.enter(self.init_pid, command, folder)
        return processes.run(inside, {**self.environment, **(environment or {})}, timeout_s)

    def start(
        self,
        log: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path = REPOSITORY,
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host, in the background; `self.log(log)` is what it has printed so far."""
        inside = processes.enter(self.init_pid, command, folder)
        with self._file(log, "out").open("ab") as output, self._file(log, "err").open("ab") as errors:
            return processes.start(inside, {**self.environment, **(environment or {})}, output, errors)

    def output(self, log: str) -> str:
        """What was printed on standard output."""
        return self._read(log, "out")

    def log(self, log: str) -> str:
        """Standard output, and after that standard error."""
        return self._read(log, "out") + self._read(log, "err")

    def _read(self, log: str, kind: str) -> str:
        file = self._file(log, kind)
        return file.read_text(errors="replace") if file.exists() else ""

    def _file(self, log: str, kind: str) -> Path:
        return self.folder / f"{log}.{kind}"

    def processes(self) -> dict[int, str]:
        """Pid, as the machine counts, and command line of what runs on the host."""
        return processes.alive_in(self.pid_namespace)

    def signal(self, started: subprocess.Popen[bytes], signal_: signal.Signals) -> None:
        """Send a signal to what `start` started: the process returned is `nsenter`, which passes none on."""
        processes.send([processes.only_child(started.pid)], signal_)

    def pause(self) -> None:
        """Freeze every process on the host; its kernel still answers for it."""
        processes.pause(self.pid_namespace)

    def go_on(self) -> None:
        """Undo `pause`."""
        processes.go_on(self.pid_namespace)

    def path(self, path: str | Path) -> Path:
        """A path of the host, from the machine, for what lies on a disk of its own; gone with the host."""
        return Path(f"/proc/{self.init_pid}/root") / Path(path).relative_to("/")

    def add_disk(self, path: Path, size_mb: float) -> None:
        """Mount an empty disk of the host's own, in memory, at a folder, which is made where it is missing."""
        path.mkdir(parents=True, exist_ok=True)
        size = f"size={int(size_mb * 2**20)}"
        _checked(self.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(path)]))

    def fill_disk(self, path: Path, leave_bytes: int = 0) -> Path:
        """Use up what is free where a folder lies; returns the file that does, to be removed with `run`."""
        file = path / "filling"
        free = os.statvfs(self.path(path))
        num_bytes = free.f_bavail * free.f_frsize - leave_bytes
        _checked(self.run(["fallocate", f"--length={num_bytes}", str(file)]))
        return file


def _checked(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise RuntimeError(f"{done.args}: {done.stderr.strip()}")


class Network:
    """Hosts on one switch, in a `with` block: when it ends, none of them is left, nor anything of theirs.

    Not for use by several threads.
    """

    def __init__(self, folder: Path, own: Sequence[str] = ()) -> None:
        """`folder`: keeps what the hosts write; it stays. `own`: more folders that each host has for itself."""
        self.folder = folder
        self._own = tuple(own)
        self.token = secrets.token_hex(32)
        """What every host has in its token file."""
        self.hosts: dict[str, Host] = {}
        """Those that are up."""
        self._links: dict[str, Link] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._claim: socket.socket | None = None
        self._number = 0
        self._num_added = 0

    def __enter__(self) -> Network:
        remove_leftovers()
        self._number, self._claim = _claim_a_number()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            links.make_switch(self._switch)
            _write_lines(self._names_file, ["127.0.0.1 localhost"])
            _write_lines(self._resolver_file, ["# no name server: who asks one is refused at once"])
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    @property
    def _switch(self) -> str:
        return f"{links.PREFIX}{self._number}-0"

    @property
    def _names_file(self) -> Path:
        return self.folder / "hosts"

    @property
    def _resolver_file(self) -> Path:
        return self.folder / "resolv.conf"

    def add(self, name: str, *, shared_memory_mb: int = SHARED_MEMORY_MB) -> Host:
        """Bring up one more host. Its name is at most 15 letters, and no other host's."""
        if not 0 < len(name) <= 15 or name in (*self._links, links.BRIDGE):
            raise ValueError(f"{name!r}: not a name of 1 to 15 letters that is still free")
        self._num_added += 1
        namespace, address = f"{links.PREFIX}{self._number}-{name}", f"10.77.{self._number}.{self._num_added}"
        self._links[name] = links.make_link(self._switch, name, namespace, address)
        _write_lines(self._names_file, [f"{address} {name}"])
        folder = self.folder / name
        self._make_folders(folder)
        return self._boot(
            Host(name, address, self._links[name], folder, 0, "", shared_memory_mb, self._environment(folder))
        )

    def kill(self, host: Host, *, in_silence: bool = False) -> None:
        """End a host: all its processes vanish together.

        The kernel then closes their connections, so that the others are told; `in_silence` they are not, as when the
        power fails: the link is dropped before, and stays so until the host is booted again.
        """
        if in_silence:
            host.link.drop()
        processes.send([host.init_pid], signal.SIGKILL)
        _end(self._processes.pop(host.name))
        _wait_for_the_end(host)
        del self.hosts[host.name]

    def boot(self, host: Host) -> Host:
        """A host that was killed comes up again: the same name, address and files on disk, nothing in memory."""
        if host.name in self.hosts:
            raise ValueError(f"{host.name}: is up")
        host.link.mend()
        return self._boot(host)

    def remove(self, host: Host) -> None:
        """End a host for good; its name and address are not used again."""
        if host.name in self.hosts:
            self.kill(host)
        links.unmake_link(self._links[host.name])

    def _boot(self, host: Host) -> Host:
        setup = Setup(host.name, tuple(self._mounts(host.folder, host.shared_memory_mb)))
        unshare = ["unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
        first = [sys.executable, "-I", "-S", str(Path(__file__).with_name("first_process.py")), setup.to_json()]
        said = host.folder / "first_process.err"
        with said.open("wb") as errors:
            process = subprocess.Popen(
                ["ip", "netns", "exec", host.link.namespace, *unshare, *first],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for the test, which then ends its hosts
            )
        self._processes[host.name] = process
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{host.name}: did not come up: {said.read_text()}")
        init_pid = processes.only_child(process.pid)
        up = replace(host, init_pid=init_pid, pid_namespace=processes.pid_namespace(init_pid))
        self.hosts[host.name] = up
        return up

    def _mounts(self, folder: Path, shared_memory_mb: int) -> Iterator[tuple[str, ...]]:
        for seen in _seen_in_tmp(self.folder):
            inside = folder / "tmp" / seen.relative_to(TMP)
            inside.mkdir(exist_ok=True)
            yield ("--bind", str(seen), str(inside))
        yield ("--bind", str(self._names_file), "/etc/hosts")
        if Path("/etc/resolv.conf").exists():
            yield ("--bind", str(self._resolver_file), "/etc/resolv.conf")
        for own in self._own:
            Path(own).mkdir(parents=True, exist_ok=True)
            yield ("--bind", str(folder / own.strip("/")), own)
        yield ("-t", "tmpfs", "-o", f"size={shared_memory_mb}m", "tmpfs", "/dev/shm")
        yield ("--rbind", str(folder / "tmp"), str(TMP))  # last: it hides what the others lie in

    def _make_folders(self, folder: Path) -> None:
        for own in ("tmp", *self._own):
            (folder / own.strip("/")).mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        token_file = folder / "home" / ".ray" / "auth_token"
        token_file.parent.mkdir(parents=True)
        token_file.touch(mode=0o600)
        token_file.write_text(self.token)

    @staticmethod
    def _environment(folder: Path) -> dict[str, str]:
        """The test's own without what is meant for its Ray; programs of this Python first, and this checkout."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
        path = f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}"
        return {**kept, "HOME": str(folder / "home"), "PATH": path, "PYTHONPATH": str(REPOSITORY)}

    def _remove(self) -> None:
        _remove_namespaces(self._number)
        for process in self._processes.values():
            _end(process)
        for host in self.hosts.values():
            _wait_for_the_end(host)
        self.hosts.clear()
        if self._claim is not None:
            self._claim.close()


def _seen_in_tmp(*folders: Path) -> list[Path]:
    """What lies in the machine's `/tmp` and is needed on a host."""
    needed = [path.resolve() for path in (*folders, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix))]
    return sorted({TMP / path.relative_to(TMP).parts[0] for path in needed if TMP in path.parents})


def _end(process: subprocess.Popen[bytes]) -> None:
    """A host's `unshare`, which was stopped with its child where that was paused."""
    process.kill()
    process.wait(processes.PATIENCE_S)
    for end_of_pipe in (process.stdin, process.stdout):
        assert end_of_pipe is not None
        end_of_pipe.close()


def _wait_for_the_end(host: Host) -> None:
    wait_until(lambda: not host.processes(), f"{host.name}: processes have not ended")


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    """Append: the hosts that are up have this very file mounted."""
    with file.open("a") as opened:
        opened.writelines(f"{line}\n" for line in lines)


def _claim_a_number() -> tuple[int, socket.socket]:
    """The first number of a network that no other process uses, and what holds it as long as this one lives."""
    for number in NUMBERS:
        if (claim := _claim(number)) is not None:
            return number, claim
    raise RuntimeError(f"all {len(NUMBERS)} networks of hosts are in use")


def _claim(number: int) -> socket.socket | None:
    """A name that only one process can have, and that the kernel frees however this one ends."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0{links.PREFIX}{number}")
    except OSError:
        claim.close()
        return None
    return claim


def remove_leftovers() -> None:
    """End and remove the networks whose processes were killed before they could."""
    for number in sorted({int(name.removeprefix(links.PREFIX).split("-")[0]) for name in links.namespaces()}):
        if (claim := _claim(number)) is not None:
            with contextlib.closing(claim):
                _remove_namespaces(number)


def _remove_namespaces(number: int) -> None:
    """Every network namespace of a network, and before that, by pid, whatever is in one of them."""
    names = links.namespaces(number)

    def nobody_is_left() -> bool:
        pids = [pid for name in names for pid in links.process_ids(name)]
        processes.send(pids, signal.SIGKILL)
        return not pids

    wait_until(nobody_is_left, f"{names}: processes do not end")
    for name in names:
        links.ip("netns", "del", name)


@functools.cache
def why_there_can_be_none() -> str | None:
    """What hosts are missing on this machine; None where they can be brought up."""
    if os.geteuid() != 0:
        return "network namespaces are made by root only"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    parts = (
        "ip link add one type veth peer name two",
        "ip link add switch type bridge",
        "tc qdisc add dev one root tbf rate 1mbit burst 32kb latency 100ms",
        "mount -t tmpfs tmpfs /tmp",
    )
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "sh", "-ec", "\n".join(parts)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"
