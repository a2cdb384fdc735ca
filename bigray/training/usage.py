"""What a worker process uses of its machine during a command: processor time and memory (Linux, /proc)."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Usage:
    """Of one rank, since a `Meter` was reset."""

    cpu_s: float
    peak_rss_bytes: int
    peak_gpu_bytes: int
    rss_bytes: int
    """Resident now, without what it shares with other processes of the node: the training data."""

    @staticmethod
    def of_group(ranks: list[Usage]) -> Usage:
        """Processor time of all; of memory, the largest rank's."""
        return Usage(
            cpu_s=sum(rank.cpu_s for rank in ranks),
            peak_rss_bytes=max(rank.peak_rss_bytes for rank in ranks),
            peak_gpu_bytes=max(rank.peak_gpu_bytes for rank in ranks),
            rss_bytes=max(rank.rss_bytes for rank in ranks),
        )


class Meter:
    """Measures one command after another in this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """A command begins. Where the kernel does not let the peak be set back, it is the process's so far."""
        self._cpu_before_s = time.process_time()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> Usage:
        status = _status()
        peak_gpu = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        cpu_s = time.process_time() - self._cpu_before_s
        return Usage(cpu_s, status.get("VmHWM", 0), peak_gpu, _private(status))


def private_rss_bytes() -> int:
    """Resident memory of this process that is its own."""
    return _private(_status())


def _private(status: dict[str, int]) -> int:
    return max(0, status.get("VmRSS", 0) - status.get("RssShmem", 0))


def _status() -> dict[str, int]:
    """Sizes in bytes; nothing where there is no /proc."""
    with suppress(OSError):
        text = Path("/proc/self/status").read_text()
        return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return {}
