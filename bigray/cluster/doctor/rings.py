"""Rings of two nodes: in which order all pairs are tried, and how one is timed (on the nodes)."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroupGloo, ProcessGroupNCCL, Store, TCPStore  # type: ignore[attr-defined]

SIZE_BYTES = 4 << 20
REPEATS = 5
RING_TIMEOUT_S = 2.5
"""Of all that one of the two waits for the other."""

SOURCE = re.compile(r"\[[^\]]*\.(?:cc|cpp|h):\d+\]\s*")


@dataclass(frozen=True)
class Seat:
    """One side of a ring."""

    key: str
    """The same on both sides, and of no other ring."""
    rank: int
    host: str
    """Of the store, which rank 0 holds."""
    port: int
    backend: str
    interface: str = ""
    """To bind to; empty: what the backend chooses by itself, as training does."""


def rounds(names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """All pairs, in rounds in which no name comes twice: those of a round can be timed at once (the circle method).

    One round after another: a thousand nodes have half a million pairs, and there is time for a few rounds.
    """
    places: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(first, second) for first, second in pairs if first is not None and second is not None]
        places = [places[0], places[-1], *places[1:-1]]


def num_pairs(count: int) -> int:
    """That so many nodes make."""
    return count * (count - 1) // 2


def open_store(host: str) -> TCPStore:
    """The store at which the rings of this node meet (node)."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=RING_TIMEOUT_S)
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def time_ring(seat: Seat, own_store: TCPStore | None) -> float:
    """Median seconds of an all-reduce of 4 MB among the two (node).

    Raises:
        RuntimeError: the other one was not reached in time; the message is the backend's.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=RING_TIMEOUT_S)
    store = own_store if seat.rank == 0 and own_store is not None else None
    if store is None:
        _check_reachable(seat.host, seat.port)
        store = TCPStore(seat.host, seat.port, is_master=False, wait_for_workers=False, timeout=timeout)
    meeting = PrefixStore(seat.key, store)
    meeting.set_timeout(timeout)
    with _bound_to(seat):
        group = _nccl(meeting, seat.rank) if seat.backend == "nccl" else _gloo(meeting, seat.rank)
    return _median_s(group, "cuda:0" if seat.backend == "nccl" else "cpu")


def _check_reachable(host: str, port: int) -> None:
    """Before the store's client is, which takes long and says little."""
    try:
        socket.create_connection((host, port), timeout=RING_TIMEOUT_S).close()
    except OSError as error:
        raise RuntimeError(f"{host}:{port} cannot be reached: {error.strerror or error}") from error


def without_source(text: str) -> str:
    """The first line of a backend's error, without the place in its own source."""
    return SOURCE.sub("", text.strip().partition("\n")[0])


@contextlib.contextmanager
def _bound_to(seat: Seat) -> Iterator[None]:
    """With the variable that a user would set."""
    name = "NCCL_SOCKET_IFNAME" if seat.backend == "nccl" else "GLOO_SOCKET_IFNAME"
    before = os.environ.get(name)
    if seat.interface:
        os.environ[name] = seat.interface
    try:
        yield
    finally:
        if seat.interface:
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before


def _gloo(store: Store, rank: int) -> ProcessGroupGloo:
    """Not the process's default group: a node is in several rings, one after another."""
    from torch.distributed import ProcessGroupGloo

    return ProcessGroupGloo(store, rank, 2, timedelta(seconds=RING_TIMEOUT_S))


def _nccl(store: Store, rank: int) -> ProcessGroupNCCL:
    """Not run on a GPU."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    group = ProcessGroupNCCL(store, rank, 2, options)
    group._set_default_timeout(timedelta(seconds=RING_TIMEOUT_S))
    return group


def _median_s(group: ProcessGroupGloo | ProcessGroupNCCL, device: str) -> float:
    import torch

    values = torch.ones(SIZE_BYTES // 4, dtype=torch.float32, device=device)
    _all_reduce(group, values)  # opens the connections
    if values[0].item() != 2 or values[-1].item() != 2:
        raise RuntimeError(f"an all-reduce of ones gave {values[0].item():g}, not 2")
    times = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        _all_reduce(group, values)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def _all_reduce(group: Any, values: torch.Tensor) -> None:
    import torch

    group.allreduce([values]).wait()
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
