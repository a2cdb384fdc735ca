"""Which processes a test has started, by what the kernel says: nothing else may be killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def descendants() -> Iterator[tuple[int, bytes]]:
    """Pid and command line of every live process that this one has started, or its children have."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended while we looked
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and pid != above:
            with contextlib.suppress(OSError):
                yield pid, Path(f"/proc/{pid}/cmdline").read_bytes()


def worker_pids() -> list[int]:
    """The live Ray Train workers among them, by the name Ray gives the process."""
    titles = (b"ray::RayTrainWorker", b"ray::_RayTrainWorker")
    return sorted(pid for pid, title in descendants() if title.startswith(titles))
