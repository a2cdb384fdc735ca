"""A dry run of a cluster: real Ray nodes on this machine, of which one can be lost, added or preempted.

Each node is a `ray start --block` in a session of its own, and everything that it starts. It outlives the command that
started it: what is where stands in a record (`dry_run.state`). Nodes are ended by the pids of their own processes, and
never by `ray stop`, which ends every Ray of this machine. Runs in the command's own process, connected to no cluster.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bigray.cluster.capacity import local_capacity
from bigray.cluster.dry_run import raylets
from bigray.cluster.dry_run.processes import (
    Process,
    Row,
    ancestors_of,
    family,
    kill_all,
    send,
    snapshot,
    spawn,
    wait_until_gone,
)
from bigray.cluster.dry_run.spec import (
    FAKE_GPU_LABEL,
    MOST_NODES,
    LocalClusterSpec,
    NodeGroup,
    NodeShape,
    check_shared_memory,
    load_local_spec,
    machine_memory_mib,
    shapes_of,
    validate_options,
)
from bigray.cluster.dry_run.state import LocalCluster, LocalNode, StateFolder, boot_id
from bigray.errors import ClusterError, SpecError
from bigray.termination import terminated_by_signal

__all__ = [
    "Ended",
    "LocalClusterSpec",
    "LocalStatus",
    "NodeStatus",
    "TakenDown",
    "add_node",
    "kill_node",
    "load_local_spec",
    "local_status",
    "preempt_node",
    "start_local",
    "take_down",
]

START_TIMEOUT_S = 90.0
GRACE_S = 5.0
"""What a node has to end in order, before its processes are killed."""
NOTICE_S = 30
_POLL_S = 0.2
_TEMP_PREFIX = "bigray-dry-"
_TEMP_ROOT = "/tmp"
_SOCKET_PATIENCE_S = 20.0
"""A socket's path has at most 107 bytes, and Ray adds 70 of them."""
_PATIENCE_AFTER_NOTICE_S = 2 * START_TIMEOUT_S
"""For another command, such as one that adds a node: a node whose time is up must be ended."""

NodeState = Literal["starting", "up", "draining", "lost", "ended"]


@dataclass(frozen=True)
class NodeStatus:
    """A node, and how it is now."""

    node: LocalNode
    state: NodeState
    processes: int
    """Those alive."""


@dataclass(frozen=True)
class LocalStatus:
    """The cluster on this machine, as the kernel sees it."""

    cluster: LocalCluster
    nodes: tuple[NodeStatus, ...]

    def to_json(self) -> dict[str, Any]:
        nodes = [{**asdict(one.node), "state": one.state, "alive_processes": one.processes} for one in self.nodes]
        return {**asdict(self.cluster), "nodes": nodes, "exports": self.cluster.exports}


@dataclass(frozen=True)
class Ended:
    """A node that is no more."""

    node: str
    how: Literal["killed", "left before its time was up", "killed when its time was up"]
    processes: int
    """Those that were killed."""


@dataclass(frozen=True)
class TakenDown:
    """What `take_down` ended; nothing where nothing was there."""

    nodes: tuple[str, ...]
    processes: int


def start_local(spec: LocalClusterSpec, on_step: Callable[[str], None] = lambda text: None) -> LocalCluster:
    """Start the head, then the other nodes; they go on when this process has ended. `on_step` hears what goes on.

    Raises:
        CapacityError: the object stores do not fit into /dev/shm.
        ClusterError: a cluster of this user's is there already, or a node did not start; then only its log is left.
    """
    if sys.platform != "linux":
        raise ClusterError("several Ray nodes on one machine need Linux: use a container, or a cluster")
    shapes = shapes_of(spec, int(local_capacity().cpus), machine_memory_mib())
    check_shared_memory(shapes, _free_shared_memory())
    folder = StateFolder.of_user()
    with folder.locked(), terminated_by_signal():
        _refuse_second(folder)
        _clear(folder)
        try:
            return _start(folder, spec.name, shapes, on_step)
        except BaseException:  # also Ctrl-C and SIGTERM
            _end_all(folder, grace_s=0.0, keep_logs=True)
            raise


def add_node(*, cpus: int | None = None, gpus: int | None = None) -> LocalNode:
    """Start one more node, with what the plain nodes have where nothing else is said.

    Raises:
        SpecError: a number out of its range.
        ClusterError: no cluster is there, or the node did not start; then nothing of it is left behind.
    """
    given = {key: value for key, value in {"cpus": cpus, "gpus": gpus}.items() if value is not None}
    validate_options(NodeGroup, {"name": "added", **given})
    folder = StateFolder.of_user()
    with folder.locked(), terminated_by_signal():
        cluster = _with_live_head(folder)
        if len([node for node in cluster.nodes if not node.ended_by]) >= MOST_NODES:
            raise ClusterError(f"{MOST_NODES} nodes are what one machine takes: end one with bigray cluster kill-node")
        like = next_shape(cluster)
        shape = replace(like, cpus=given.get("cpus", like.cpus), gpus=given.get("gpus", like.gpus))
        check_shared_memory([shape], _free_shared_memory())
        try:
            cluster = _spawn(folder, cluster, shape, raylets.node_command(shape, cluster.address))
            cluster = _settle(folder, cluster, [shape.name])
        except BaseException:
            kill_all(lambda: _processes(folder, cluster, shape.name))
            folder.write(cluster.without_node(shape.name))
            raise
        return cluster.node(shape.name)


def kill_node(name: str) -> Ended:
    """Kill every process of a node at once, as when a host loses its power.

    Raises:
        SpecError: no such node, or it has ended.
        ClusterError: no cluster is there.
    """
    folder = StateFolder.of_user()
    with folder.locked():
        cluster = _on_record(folder)
        node = _not_ended(cluster, name)
        killed = kill_all(lambda: _processes(folder, cluster, name))
        folder.write(cluster.with_node(replace(node, ended_by="kill-node")))
    return Ended(name, "killed", killed)


def preempt_node(name: str, notice_s: int = NOTICE_S) -> Ended:
    """Tell the cluster that a node will be taken away, and kill it after `notice_s`; it may leave before. Blocks.

    When this process ends before, the node stays as it is: draining, and alive.

    Raises:
        SpecError: no such node, or it has ended, or it is the head, which no cloud takes away with a notice.
        ClusterError: no cluster is there, or it refuses the notice.
    """
    if not 0 < notice_s <= 86_400:
        raise SpecError(f"--notice: {notice_s} is no notice, give 1 to 86400 seconds")
    folder = StateFolder.of_user()
    with folder.locked():
        cluster = _with_live_head(folder)
        node = _not_ended(cluster, name)
        if node.is_head:
            raise SpecError(f"{name}: the cluster ends with its head: try it with bigray cluster kill-node {name}")
        if node.raylet is None or not _is_member(folder, cluster, node, node.raylet):
            raise SpecError(f"{name}: is lost already, there is nobody to tell: bigray cluster kill-node {name}")
        raylets.drain(cluster.address, node.node_id, notice_s, _environment(folder, cluster, mark=""))
        # the time runs from when the notice is given, so that the node is never promised more than it gets
        node = replace(node, leaves_at=time.time() + notice_s)
        folder.write(cluster.with_node(node))
    left = _wait_until_left(folder, cluster, node)
    with folder.locked(_PATIENCE_AFTER_NOTICE_S):
        now = folder.read()
        if now is None or now.started_at != cluster.started_at:  # taken down meanwhile; another may have this name
            return Ended(name, "left before its time was up", 0)
        killed = kill_all(lambda: _processes(folder, now, name))
        folder.write(now.with_node(replace(node, ended_by="preempt-node")))
    return Ended(name, "left before its time was up" if left else "killed when its time was up", killed)


def take_down() -> TakenDown:
    """End the cluster, or what is left of one, and remove its files. Where nothing is there, nothing happens.

    Raises:
        ClusterError: a process does not end.
    """
    folder = StateFolder.of_user()
    with folder.locked():
        return _end_all(folder, grace_s=GRACE_S, keep_logs=False)


def local_status() -> LocalStatus:
    """The nodes as they are now, those that have ended among them.

    Raises:
        ClusterError: no cluster is there.
    """
    folder = StateFolder.of_user()
    cluster = _on_record(folder)
    rows = snapshot()
    return LocalStatus(cluster, tuple(_status_of(folder, cluster, node, rows) for node in cluster.nodes))


def state_of(node: LocalNode, alive: Sequence[Process]) -> NodeState:
    """How a node is that has these processes (pure)."""
    if node.ended_by:
        return "ended"
    if node.raylet is None:
        return "starting" if alive else "lost"
    # `ray start` stays when its raylet has ended in order, and the cluster does not have the node any more
    if node.raylet not in alive:
        return "lost"
    return "up" if node.leaves_at is None else "draining"


def next_shape(cluster: LocalCluster) -> NodeShape:
    """What a further plain node is like: as the first beside the head, with a name that none has had (pure)."""
    plain = [node for node in cluster.nodes if re.fullmatch(r"node-\d+", node.name)]
    like = plain[0] if plain else cluster.nodes[0]
    number = 1 + max((int(node.name.removeprefix("node-")) for node in plain), default=0)
    labels = {key: value for key, value in like.labels.items() if key != FAKE_GPU_LABEL}  # it may get no GPUs
    cpus = max(1, like.cpus)
    return NodeShape(f"node-{number}", cpus, like.gpus, like.object_store_mib, like.memory_mib, labels)


def _start(folder: StateFolder, name: str, shapes: Sequence[NodeShape], on_step: Callable[[str], None]) -> LocalCluster:
    head, *others = shapes
    ports = raylets.free_ports()
    temp_dir = tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=_TEMP_ROOT)
    cluster = LocalCluster(name, boot_id(), time.time(), temp_dir, str(folder.new_token()))
    folder.write(cluster)
    on_step("starting the head")
    cluster = _spawn(folder, cluster, head, raylets.head_command(head, ports, temp_dir))
    cluster = _settle(folder, cluster, [head.name])
    cluster = replace(
        cluster,
        address=raylets.address_in(temp_dir),
        session_dir=os.path.realpath(f"{temp_dir}/session_latest"),
        dashboard_url=f"http://127.0.0.1:{ports.dashboard}",
    )
    folder.write(cluster)
    if not others:
        return cluster
    on_step(f"starting {len(others)} more nodes")
    for shape in others:
        taken = _sockets(cluster)
        cluster = _spawn(folder, cluster, shape, raylets.node_command(shape, cluster.address))
        _wait_for_socket(cluster, taken)
    return _settle(folder, cluster, [shape.name for shape in others])


def _sockets(cluster: LocalCluster) -> set[Path]:
    return set(Path(cluster.session_dir, "sockets").glob("raylet*"))


def _wait_for_socket(cluster: LocalCluster, taken: set[Path]) -> None:
    """Ray gives a raylet's socket the first name that no file has yet: two nodes that start at once may take the same,
    and one of them is never heard of. Not for long: whether the node is up is seen later."""
    deadline = time.monotonic() + _SOCKET_PATIENCE_S
    while not _sockets(cluster) - taken and time.monotonic() < deadline:
        time.sleep(0.1)


def _spawn(folder: StateFolder, cluster: LocalCluster, shape: NodeShape, command: list[str]) -> LocalCluster:
    log = folder.logs / f"{shape.name}.log"
    log.unlink(missing_ok=True)
    process = spawn(command, _environment(folder, cluster, raylets.mark_of(folder.path, shape.name)), log)
    node = LocalNode(
        shape.name,
        shape.cpus,
        shape.gpus,
        shape.object_store_mib,
        shape.memory_mib,
        dict(shape.all_labels),
        str(log),
        root=process,
    )
    cluster = cluster.with_node(node)
    folder.write(cluster)
    return cluster


def _settle(folder: StateFolder, cluster: LocalCluster, names: Sequence[str]) -> LocalCluster:
    """Wait until these nodes are up, and note their raylets."""
    raylets.wait_until_up([cluster.node(name) for name in names], START_TIMEOUT_S)
    rows = snapshot()
    for name in names:
        found = raylets.raylet_of(_members(folder, cluster, name, rows))
        if found is None:
            raise ClusterError(f"{name}: its raylet ended at once; its log is {cluster.node(name).log}")
        cluster = cluster.with_node(replace(cluster.node(name), raylet=found[0], node_id=found[1]))
    folder.write(cluster)
    return cluster


def _environment(folder: StateFolder, cluster: LocalCluster, mark: str) -> dict[str, str]:
    return raylets.environment_of(os.environ, token=str(folder.token), temp_dir=cluster.temp_dir, mark=mark)


def _members(folder: StateFolder, cluster: LocalCluster | None, name: str, rows: Sequence[Row]) -> list[Row]:
    """A node's processes; with an empty name those of all. This process and those above it are left out."""
    nodes = [node for node in cluster.nodes if name in ("", node.name)] if cluster is not None else []
    is_of_this_boot = cluster is not None and cluster.boot_id == boot_id()
    known = [process for node in nodes for process in node.known] if is_of_this_boot else []
    mark = raylets.mark_of(folder.path, name)
    found = family(rows, known, (lambda text: text == mark) if name else (lambda text: text.startswith(mark)))
    spared = ancestors_of(os.getpid(), rows)
    return [row for row in found if row.process.pid not in spared]


def _processes(folder: StateFolder, cluster: LocalCluster | None, name: str) -> list[Process]:
    return [row.process for row in _members(folder, cluster, name, snapshot())]


def _is_member(folder: StateFolder, cluster: LocalCluster, node: LocalNode, process: Process) -> bool:
    return process in _processes(folder, cluster, node.name)


def _status_of(folder: StateFolder, cluster: LocalCluster, node: LocalNode, rows: Sequence[Row]) -> NodeStatus:
    alive = [row.process for row in _members(folder, cluster, node.name, rows)]
    return NodeStatus(node, state_of(node, alive), len(alive))


def _on_record(folder: StateFolder) -> LocalCluster:
    cluster = folder.read()
    if cluster is None:
        raise ClusterError("no local cluster is there: start one with bigray cluster local")
    return cluster


def _with_live_head(folder: StateFolder) -> LocalCluster:
    cluster = _on_record(folder)
    heads = [node for node in cluster.nodes if node.is_head]
    if not cluster.address or not heads or state_of(heads[0], _processes(folder, cluster, heads[0].name)) != "up":
        raise ClusterError(
            "the head of the local cluster is gone: end the rest with bigray cluster down, and start again"
        )
    return cluster


def _not_ended(cluster: LocalCluster, name: str) -> LocalNode:
    node = cluster.node(name)
    if node.ended_by:
        raise SpecError(f"{name}: has ended already, by {node.ended_by}; bigray cluster status lists those that are up")
    return node


def _refuse_second(folder: StateFolder) -> None:
    if not (alive := _processes(folder, _readable(folder), "")):
        return
    raise ClusterError(
        f"a local cluster is there already, with {len(alive)} processes: go on with it (bigray cluster status), or end "
        "it with bigray cluster down"
    )


def _readable(folder: StateFolder) -> LocalCluster | None:
    """The record, as far as it can be read: what runs is found by its mark as well."""
    with contextlib.suppress(ClusterError):
        return folder.read()
    return None


def _wait_until_left(folder: StateFolder, cluster: LocalCluster, node: LocalNode) -> bool:
    """Whether the node left by itself before its time was up."""
    while node.leaves_at is not None and time.time() < node.leaves_at:
        if node.raylet not in _processes(folder, cluster, node.name):
            return True
        time.sleep(_POLL_S)
    return False


def _end_all(folder: StateFolder, *, grace_s: float, keep_logs: bool) -> TakenDown:
    cluster = _readable(folder)
    nodes = cluster.nodes if cluster is not None else ()
    num_alive = len(_processes(folder, cluster, ""))
    ended = tuple(node.name for node in nodes if _processes(folder, cluster, node.name))
    if grace_s > 0 and cluster is not None:
        # the head last: a node that cannot say goodbye waits for it
        _ask_to_end(folder, cluster, [node for node in nodes if not node.is_head], grace_s)
        _ask_to_end(folder, cluster, [node for node in nodes if node.is_head], grace_s)
    kill_all(lambda: _processes(folder, cluster, ""))
    _clear(folder, keep_logs=keep_logs)
    return TakenDown(ended, num_alive)


def _ask_to_end(folder: StateFolder, cluster: LocalCluster, nodes: Sequence[LocalNode], grace_s: float) -> None:
    if cluster.boot_id != boot_id():
        return
    asked = [node for node in nodes if node.root is not None and send(node.root, signal.SIGTERM)]
    roots = [node.root for node in asked if node.root is not None]
    wait_until_gone(lambda: [process for process in _processes(folder, cluster, "") if process in roots], grace_s)


def _clear(folder: StateFolder, *, keep_logs: bool = False) -> None:
    """Remove the files of a cluster that does not run any more."""
    cluster = _readable(folder)
    if cluster is not None and Path(cluster.temp_dir).match(f"{_TEMP_ROOT}/{_TEMP_PREFIX}*"):
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    folder.forget()
    if not keep_logs:
        for log in folder.logs.glob("*.log"):
            log.unlink(missing_ok=True)


def _free_shared_memory() -> int:
    try:
        shared = os.statvfs("/dev/shm")
    except OSError as error:
        raise ClusterError(f"/dev/shm: cannot be looked at: {error.strerror}; Ray's object stores need it") from error
    return shared.f_bavail * shared.f_frsize
