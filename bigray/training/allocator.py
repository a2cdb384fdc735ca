"""glibc's allocator, told to keep the memory that a training step frees for the next one, or not to (worker)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD_BYTES = 32 * 2**20
MEASURED_BLOCK_BYTES = 64 * 2**10
KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Up to 1 GiB of freed memory stays with the process, in blocks of up to 32 MiB (mallopt(3)).

    By default glibc hands an activation's memory back to the kernel when it is freed, and each step takes a page fault
    for every 4 KiB of it again: 3,000 a step of a small convolutional network, and a third of the step's time
    (docs/how_it_works.md). Nothing changes where the C library is another one.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_free_memory() -> None:
    """Return what was freed to the system, also the free end of the heap (glibc 2.33 and newer).

    `malloc_trim` empties the holes of the heap, and cuts its end off, which it cannot where somebody else has moved the
    break since. The pages of such an end are given back one by one: a block is made of it and its content dropped.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.mallinfo2.restype = _Mallinfo2
        library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        size = int(library.mallinfo2().keepcost) - MEASURED_BLOCK_BYTES
        if size <= 0 or not (block := library.malloc(size)):
            return
        begin = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (block + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0:
            library.madvise(begin, whole, mmap.MADV_DONTNEED)
        library.free(block)


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3); of its ten fields the last one, the size of the heap's free end."""

    _fields_ = (*((f"_{number}", ctypes.c_size_t) for number in range(9)), ("keepcost", ctypes.c_size_t))


@contextlib.contextmanager
def blocks_from_the_system() -> Iterator[None]:
    """For the length of a `with`, blocks above 64 KiB for which no free memory is large enough are mapped by the kernel
    and go back to it when they are freed.

    Else the heap grows for them by what its free end lacks, and a block would show as less than it is. Afterwards
    blocks of up to 32 MiB are kept again.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MEASURED_BLOCK_BYTES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD_BYTES)
