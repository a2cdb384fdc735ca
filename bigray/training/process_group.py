"""The process group of one generation of a worker group: formed in milliseconds among live processes, left at once.

Ray Train's own setup of `torch.distributed` lasts as long as its workers; ours is formed anew, among the survivors and
a replacement, each time a worker is lost.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _set_pg_timeout

from bigray.training.answers import Address
from bigray.training.membership import Place

FORMING_TIMEOUT_S = 20.0
"""A member that dies while the group forms holds up the others for this long."""
COLLECTIVE_TIMEOUT_S = 1800.0
"""Of a collective in training, where ranks may wait for the slowest; who hangs is found by other means long before."""


@contextlib.contextmanager
def process_group(
    place: Place, backend: str, publish: Callable[[Address], None], look_up: Callable[[], Address]
) -> Iterator[Callable[[], None]]:
    """Hold the default process group of a generation (worker).

    Rank 0 opens the store and publishes its address; the others look it up. On the way out, whatever the reason, the
    connections are shut down, so that no peer goes on waiting for this rank in a collective. The value does the same
    from another thread: a collective that this rank waits in then raises, also where a peer's node has just vanished.
    """
    timeout = timedelta(seconds=FORMING_TIMEOUT_S)
    if place.rank == 0:
        store = TCPStore(place.members[0].node_ip, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        address = Address(store.host, store.port)
        publish(address)
    else:
        address = look_up()
        store = TCPStore(address.host, address.port, is_master=False, timeout=timeout)
    _set_environment(place, address)
    if backend == "nccl":
        # torch's watchdog would end this process with the lost one; here the survivors break off and go on (`_abort`)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    before = open_sockets()  # as late as can be: what other threads open from here on is taken for the group's
    try:
        # no `device_id`, which would have NCCL connect here, where no heartbeat runs yet that could break it off
        backends = backends_by_device(backend)
        dist.init_process_group(backends, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
        opened = {fd: inode for fd, inode in open_sockets().items() if before.get(fd) != inode}
        _set_pg_timeout(timedelta(seconds=COLLECTIVE_TIMEOUT_S))
        yield lambda: _abort(backend, opened)
    finally:
        if dist.is_initialized():
            _abort(backend, opened)
            if dist.is_initialized():  # aborting nccl's ends them as well
                dist.destroy_process_group()


def backends_by_device(backend: str) -> str:
    """What `init_process_group` is asked for. Control messages are on the CPU, so that NCCL has gloo beside it."""
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend


def _abort(backend: str, opened: dict[int, int]) -> None:
    if backend == "nccl" and dist.is_initialized():
        dist.distributed_c10d._abort_process_group()  # not run on a GPU
    _hang_up(opened)  # gloo's connections outlast an abort


def _set_environment(place: Place, address: Address) -> None:
    """What torchrun sets, which Accelerate, Lightning and others read."""
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(len(place.neighbours)),
        "NODE_RANK": str(place.node_rank),
        "MASTER_ADDR": address.host,
        "MASTER_PORT": str(address.port),
    }


def open_sockets() -> dict[int, int]:
    """Open sockets of this process: file descriptor -> inode, which tells a descriptor used again from the first."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed while we looked, as is the folder's own descriptor
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found


def _hang_up(sockets: dict[int, int]) -> None:
    """Shut down the connections the group opened.

    Gloo closes them only when the last reference to the group is gone, which a traceback or a DDP wrapper may hold; a
    peer inside a collective would wait for as long. Once shut down, it raises within milliseconds.
    """
    current = open_sockets()
    for descriptor, inode in sockets.items():
        if current.get(descriptor) != inode:
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            is_listening = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if not is_listening and connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.shutdown(socket.SHUT_RDWR)


def broadcast_object(value: Any, source: int, world_size: int, group: dist.ProcessGroup | None) -> Any:
    """`value` of rank `source` on every rank, over gloo."""
    box = [value]
    if world_size > 1:
        dist.broadcast_object_list(box, src=source, group=group)
    return box[0]
