"""Memory of this machine or container (Linux, /proc and the cgroup file system)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 1 << 60
"""Version 1 of cgroups has no word for "no limit", only a number near 2**63."""


@dataclass(frozen=True)
class HostMemory:
    """What processes here may use: of the machine, or of the container where it has a limit."""

    limit_bytes: int
    free_bytes: int
    """Not in use now; caches that the kernel would give up count as free."""


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Read it from /proc and the cgroup file system below `root`.

    A container's limit may lie on any group above the process's own, so all of them count.
    """
    machine = fields_of(root / "proc/meminfo")
    found = [HostMemory(machine["MemTotal"] * 1024, machine["MemAvailable"] * 1024)]
    for folder, limit_file, usage_file, cache_field in _groups(root):
        with suppress(OSError, ValueError, KeyError):  # no such group seen from here, or "max": no limit
            limit = int((folder / limit_file).read_text())
            used = int((folder / usage_file).read_text()) - fields_of(folder / "memory.stat").get(cache_field, 0)
            if limit < _UNLIMITED_BYTES:
                found.append(HostMemory(limit, max(0, limit - used)))
    return HostMemory(min(memory.limit_bytes for memory in found), min(memory.free_bytes for memory in found))


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folder, limit file, usage file and field of the file cache, of each group this process is in, innermost first."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                mount = root / "sys/fs/cgroup/memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            parts = Path(path.lstrip("/")).parts
            for depth in range(len(parts), -1, -1):
                yield (mount.joinpath(*parts[:depth]), *names)


def fields_of(path: Path) -> dict[str, int]:
    """Numbers of a file of lines such as `VmRSS: 1740 kB` or `inactive_file 0`."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", path.read_text(), re.MULTILINE)}


def shown(num_bytes: float) -> str:
    """For messages: 1.5 GB."""
    if num_bytes < 1 or not math.isfinite(num_bytes):
        return "0 B" if num_bytes < 1 else "more than there is"
    power = min(int(math.log10(num_bytes)) // 3, 4)
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
