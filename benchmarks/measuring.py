"""What the benchmarks share: processes with a clean environment, stamps written by models, tables."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TUNED = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""The settings that make a `TorchTrainer` quickest."""
TUNE_TUNED = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
"""No CSV, JSON and TensorBoard files of each trial: what makes plain Tune quickest."""
DEADLINE_S = 400.0
LONGEST_RUN_S = 3600.0
"""Of one peer in a process of its own."""


@dataclass(frozen=True)
class Stamp:
    """One training step that a model told of (`training_peers.networks`)."""

    pid: int
    rank: int
    step: int
    """From 1, as the model counts."""
    at_s: float
    """`time.monotonic()` at the beginning of its forward pass, which all processes of a machine share."""


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without settings of Ray's, so that each peer runs with its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join(filter(None, (str(HERE), kept.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "RAY_AUTH_MODE": "token", **more}


def run_in_own_process(script: str, *arguments: str, **environment: str) -> Any:
    """Run a script of this folder with the Python of this process; returns the JSON document in its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(
        command,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_RUN_S,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def torchrun(document: Mapping[str, Any], *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`torchrun --nproc-per-node 2` on the plain DDP script, with its arguments; ended with the block."""
    script = HERE / "training_peers" / "torchrun_ddp.py"
    # not --standalone: the workers it restarts find the addresses of those before them, and fail in their turn
    place = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *place]
    process = subprocess.Popen(
        [*command, *options, str(script), json.dumps(document)],
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        is_cut_short = process.poll() is None
        if is_cut_short:
            process.send_signal(signal.SIGTERM)  # which it passes on to its workers
        _, errors = process.communicate()
        if process.returncode and not is_cut_short:
            print(errors.decode()[-3000:], file=sys.stderr)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stamps:
    """What models have told in a file; a line that is being written is left for the next time."""

    def __init__(self, path: Path) -> None:
        self._path, self._read_bytes = path, 0

    def new(self) -> list[Stamp]:
        """Those since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            whole_lines = file.read().rpartition(b"\n")[0]
        self._read_bytes += len(whole_lines) + 1 if whole_lines else 0
        return [Stamp(*json.loads(line)) for line in whole_lines.splitlines()]


def read_stamps(path: Path) -> list[Stamp]:
    """All of them."""
    return Stamps(path).new()


def wait_for(found: Callable[[], Any], what: str, is_alive: Callable[[], bool] = lambda: True) -> Any:
    """Ask every few milliseconds until there is an answer; returns it."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := found()):
        if time.monotonic() > deadline or not is_alive():
            raise RuntimeError(f"waited for {what} in vain")
        time.sleep(0.02)
    return answer


def tell(text: str) -> None:
    """A line about the progress of the measurement."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float], unit: str = "{:.3f}") -> tuple[str, str, str]:
    """Median, least and most."""
    return tuple(unit.format(value) for value in (statistics.median(values), min(values), max(values)))  # type: ignore[return-value]


def versions_of(packages: Sequence[str]) -> str:
    """Of those that are installed."""
    found = []
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str = "",
    packages: Sequence[str] = ("bigray", "ray", "torch", "numpy"),
    width: int = 120,
) -> None:
    """The figures, and what they were measured on."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=width)
    console.print(table)
    if note:
        console.print(note)
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    console.print(f"{versions_of(packages)}, Python {platform.python_version()}")
    console.print(f"{os.cpu_count()} CPUs, {platform.platform()}; load over the last 1, 5 and 15 minutes {load}")
