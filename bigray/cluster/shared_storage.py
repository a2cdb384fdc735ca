"""Whether every node sees what is written to a folder: asked before a job is planned or started (driver).

A folder that each host has for itself would be found out when a worker on another host looks for a checkpoint, which
may be after an hour.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a node that is asked imports no more than it needs
    from bigray.storage import Storage

ANSWER_TIMEOUT_S = 10.0
"""For a process on the node and its answer. One that is later has not been asked: its workers would be late, too."""
SHOWN_AFTER_S = 2.0
"""How long a file that another node wrote may stay unseen: an NFS client asks again after about as long."""
LOOK_AGAIN_S = 0.25
MOST_NAMED = 3


def check_shared(storage: Storage) -> None:
    """Write a file here, look for it from every other node, and remove it with the folders that were not there.

    Nothing is done where there is one node, or for an object store, which is the same for all.

    Raises:
        ClusterError: a node does not see it.
        StorageError: it cannot be written.
    """
    from bigray.errors import ClusterError

    others = _other_nodes() if storage.is_local else {}
    if not others:
        return
    with _mark(storage) as path:
        blind = [name for name, sees in _look(path, others).items() if not sees]
    if blind:
        named = ", ".join(blind[:MOST_NAMED])
        more = f" and {len(blind) - MOST_NAMED:,} more" if len(blind) > MOST_NAMED else ""
        raise ClusterError(
            f"storage: {storage.uri}: what is written here is not seen from {named}{more}; name a folder that all "
            f"nodes mount at the same path, or s3://bucket/prefix"
        )


@contextmanager
def _mark(storage: Storage) -> Iterator[str]:
    """The path of a file that is there for as long as the block takes."""
    made, name = missing_folders(storage), f".bigray-shared-{uuid.uuid4().hex}"
    try:
        storage.write_bytes(name, b"")
        yield os.path.join(storage.root, name)
    finally:
        with suppress(FileNotFoundError):
            os.remove(os.path.join(storage.root, name))
        remove_folders(made)


def _other_nodes() -> dict[str, str]:
    """Name -> id of the nodes that this process is not on."""
    import ray

    from bigray.cluster.capacity import name_of

    here = ray.get_runtime_context().get_node_id()
    return {name_of(node): node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}


def _look(path: str, nodes: Mapping[str, str]) -> dict[str, bool]:
    """Whether each node sees a file; without those that do not answer. They hold no CPU: a busy node is asked, too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(sees)
    calls: dict[str, Any] = {
        name: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(path)
        for name, node_id in nodes.items()
    }
    ready, late = ray.wait([*calls.values()], num_returns=len(calls), timeout=ANSWER_TIMEOUT_S)
    for call in late:
        ray.cancel(call, force=True)
    answers: dict[str, bool] = {}
    for name, call in calls.items():
        if call in ready:
            with suppress(ray.exceptions.RayError):  # the node has gone meanwhile
                answers[name] = ray.get(call)
    return answers


def sees(path: str) -> bool:
    """Whether a file that another node wrote is there, at once or soon (node)."""
    return shows(lambda: os.path.exists(path))


def shows(is_there: Callable[[], bool]) -> bool:
    """Whether something that another node wrote is there, at once or soon."""
    deadline = time.monotonic() + SHOWN_AFTER_S
    while not is_there():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True


def missing_folders(storage: Storage) -> list[Path]:
    """Of a local root and those above it, the deepest first."""
    if not storage.is_local:
        return []
    root = Path(storage.root)
    return [folder for folder in (root, *root.parents) if not folder.exists()]


def remove_folders(folders: Sequence[Path]) -> None:
    """The deepest first; one that is no longer empty is someone else's now."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
