"""The peak of memory that a piece of work takes (Linux, /proc)."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

from bigray.host_memory import fields_of
from bigray.training.allocator import blocks_from_the_system, give_back_free_memory

_MOST_COLLECTIONS = 5
_SAMPLE_EVERY_S = 0.002
_STATUS = Path("/proc/self/status")


def peak_growth_bytes(work: Callable[[], None]) -> int:
    """Do `work` and return how far this process's resident memory rose meanwhile above where it was before.

    The kernel's own high-water mark is set back before, where that is permitted; elsewhere a thread looks every 2 ms
    and can miss a short peak. Pages of mapped files that the kernel takes back meanwhile are counted as a rise: where
    memory is short, the libraries' own would hide one.
    """
    _collect_garbage()  # what is freed meanwhile would hide a rise
    give_back_free_memory()  # and what is used again would not show as one
    before, files_before = _status_bytes("VmRSS"), _file_bytes()
    with blocks_from_the_system():
        peak = _peak_bytes(work)
    taken_back = max(0, files_before - _file_bytes())
    return max(0, peak + taken_back - before)


def _collect_garbage() -> None:
    """Also what the finalizers of garbage make garbage of."""
    for _ in range(_MOST_COLLECTIONS):
        if gc.collect() == 0:
            return


def _peak_bytes(work: Callable[[], None]) -> int:
    if _reset_high_water_mark():
        work()
        return _status_bytes("VmHWM")
    with _Sampler() as sampler:
        work()
    return sampler.peak_bytes


class _Sampler:
    """Largest resident memory seen by a thread inside a `with` block."""

    def __init__(self) -> None:
        self.peak_bytes = _status_bytes("VmRSS")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_SAMPLE_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, _status_bytes("VmRSS"))


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _file_bytes() -> int:
    """Resident pages of mapped files; 0 where the kernel does not tell (before Linux 4.5, some sandboxes)."""
    return fields_of(_STATUS).get("RssFile", 0) * 1024


def _status_bytes(field: str) -> int:
    return fields_of(_STATUS)[field] * 1024
