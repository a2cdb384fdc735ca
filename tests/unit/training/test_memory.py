from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from bigray.host_memory import HostMemory, host_memory, shown
from bigray.training import memory
from bigray.training.memory import peak_growth_bytes
from tests.unit.training.own_process import number_printed_by

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 16 GiB, 12 of them free, whose processes are in no group."""
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {12 * GIB // 1024} kB\n")
    write(tmp_path / "proc/self/cgroup", "")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_limit_the_machine_counts(root: Path) -> None:
    assert host_memory(root) == HostMemory(16 * GIB, 12 * GIB)


def test_a_containers_limit_counts_and_its_file_cache_is_free(root: Path) -> None:
    group = root / "sys/fs/cgroup"
    write(root / "proc/self/cgroup", "0::/\n")
    write(group / "memory.max", f"{4 * GIB}\n")
    write(group / "memory.current", f"{3 * GIB}\n")
    write(group / "memory.stat", f"anon {2 * GIB}\ninactive_file {1 * GIB}\n")

    assert host_memory(root) == HostMemory(4 * GIB, 2 * GIB)


def test_the_tightest_of_nested_groups_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/user/job\n")
    for name, limit in (("user", 2 * GIB), ("user/job", "max")):
        write(root / "sys/fs/cgroup" / name / "memory.max", f"{limit}\n")
        write(root / "sys/fs/cgroup" / name / "memory.current", f"{1 * GIB}\n")
        write(root / "sys/fs/cgroup" / name / "memory.stat", "inactive_file 0\n")

    assert host_memory(root) == HostMemory(2 * GIB, 1 * GIB)


@pytest.mark.parametrize(("limit", "expected"), [(2 * GIB, 2 * GIB), (9223372036854771712, 16 * GIB)])
def test_version_1_of_cgroups_is_read_too_and_its_word_for_no_limit_known(
    root: Path, limit: int, expected: int
) -> None:
    group = root / "sys/fs/cgroup/memory/job"
    write(root / "proc/self/cgroup", "4:memory:/job\n1:cpu:/job\n")
    write(group / "memory.limit_in_bytes", f"{limit}\n")
    write(group / "memory.usage_in_bytes", "0\n")
    write(group / "memory.stat", "total_inactive_file 0\n")

    assert host_memory(root).limit_bytes == expected


@pytest.mark.parametrize("may_reset", [True, False])
@pytest.mark.parametrize("megabytes", [0, 64])
def test_the_peak_of_a_piece_of_work_is_seen_also_when_it_is_over(megabytes: int, may_reset: bool) -> None:
    growth = number_printed_by(f"""
import torch
from bigray.training import memory

if not {may_reset}:
    memory._reset_high_water_mark = lambda: False

def work():
    for _ in range(5):  # long enough for a thread that looks now and then
        torch.ones({megabytes} * 2**20, dtype=torch.uint8)

print(memory.peak_growth_bytes(work))
""")

    assert (megabytes - 4) * MIB < growth < (megabytes + 8) * MIB


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (-5.0, "0 B"), (999, "999 B"), (1_500_000, "1.5 MB"), (2.5e10, "25 GB")],
)
def test_bytes_are_shown_short(num_bytes: float, text: str) -> None:
    assert shown(num_bytes) == text


@pytest.mark.parametrize("garbage", ["Cycle()", "Late()"], ids=["at once", "after a finalizer"])
def test_garbage_that_is_collected_meanwhile_hides_nothing(garbage: str) -> None:
    assert (
        number_printed_by(f"""
import gc
import numpy as np
from bigray.training.memory import peak_growth_bytes

class Cycle:
    def __init__(self):
        self.itself, self.memory = self, np.ones(60 * 2**20, np.uint8)

class Late:
    def __init__(self):
        self.itself = self

    def __del__(self):
        Cycle()

def work():
    gc.collect()
    np.ones(30 * 2**20, np.uint8)

{garbage}
print(peak_growth_bytes(work))
""")
        > 28 * MIB
    )


@pytest.mark.parametrize("megabytes", [20, 40])
def test_a_free_end_of_the_heap_that_cannot_be_cut_off_hides_no_block(megabytes: int) -> None:
    """One that fits into the end, and one that is larger."""
    assert (
        number_printed_by(f"""
import ctypes
import numpy as np
from bigray.training import allocator
from bigray.training.memory import peak_growth_bytes

library = ctypes.CDLL(None)
library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
allocator.keep_freed_memory()
np.ones(25 * 2**20, np.uint8).fill(0)
library.sbrk(4096)  # as another library may do: malloc cannot move the break back now
print(peak_growth_bytes(lambda: np.ones({megabytes} * 2**20, np.uint8).fill(0)))
""")
        > (megabytes - 2) * MIB
    )


def test_a_system_that_tells_no_pages_of_files_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fields_of = memory.fields_of

    def without(path: Path) -> dict[str, int]:
        return {name: value for name, value in fields_of(path).items() if name != "RssFile"}

    monkeypatch.setattr(memory, "fields_of", without)

    assert peak_growth_bytes(lambda: np.ones(64 * MIB, np.uint8).fill(0)) > 60 * MIB


def test_pages_of_files_that_the_kernel_takes_back_meanwhile_hide_nothing(tmp_path: Path) -> None:
    file = tmp_path / "library"
    file.write_bytes(b"0" * (60 * MIB))
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert sum(pages[:: mmap.PAGESIZE]) > 0, "every page has been looked at, and counts as resident"

        def work() -> None:
            pages.madvise(mmap.MADV_DONTNEED)
            np.ones(30 * MIB, np.uint8)

        assert peak_growth_bytes(work) > 28 * MIB
