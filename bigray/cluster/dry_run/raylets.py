"""Ray's own commands for a node on this machine: their words, their environment, and waiting until a node is up."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigray.cluster.connect import RAY_SETTINGS
from bigray.cluster.dry_run.processes import MARK, Process, Row, is_alive, reap
from bigray.cluster.dry_run.spec import NodeShape
from bigray.cluster.dry_run.state import LocalNode
from bigray.errors import ClusterError, last_line

RAY = (sys.executable, "-P", "-m", "ray.scripts.scripts")
"""The `ray` of this very Python, whatever PATH finds, and whatever modules are in the current folder."""

UP = "This command will now block forever"
"""`ray start --block` prints it when the control plane knows the node, and the address is written down."""

_LOOPBACK = "127.0.0.1"
_PORTS = range(20_000, 30_000)
"""Below those that the kernel hands out by itself, and not where Ray puts workers (10002) or Serve's replicas."""
_NOT_INHERITED = (
    # of another cluster, or of this machine's real GPUs
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR"),
    *("RAY_TMPDIR", "RAY_GCS_SERVER_PORT", "RAY_REDIS_ADDRESS", "RAY_OVERRIDE_RESOURCES", "CUDA_VISIBLE_DEVICES"),
)
_DRAIN_TIMEOUT_S = 30.0
_POLL_S = 0.1
_MOST_OF_LOG = 20_000
"""Bytes of a log's end that are read for the cause."""


@dataclass(frozen=True)
class Ports:
    """Those of the head that a person or a client must know."""

    control: int
    client: int
    """Of Ray Client. Ray 2.60 has no way to leave it out, and its usual one may be another cluster's."""
    dashboard: int


def free_ports() -> Ports:
    """Three ports that nobody listens on now.

    Raises:
        ClusterError: there are none.
    """
    found: list[socket.socket] = []
    try:
        for port in random.sample(_PORTS, 200):
            one = socket.socket()
            found.append(one)  # open until all are chosen, so that they differ
            try:
                one.bind(("", port))
            except OSError:
                found.remove(one)
                one.close()
            if len(found) == 3:
                return Ports(*(one.getsockname()[1] for one in found))
    finally:
        for one in found:
            one.close()
    raise ClusterError(f"no three free ports between {_PORTS.start} and {_PORTS.stop} for the head")


def mark_of(folder: Path, name: str = "") -> str:
    """What the environment of a node's processes says: whose cluster, and which node. No name: how each begins."""
    return f"{folder.absolute()}#{name}"


def environment_of(inherited: Mapping[str, str], *, token: str, temp_dir: str, mark: str) -> dict[str, str]:
    """The environment of a node and of all that runs on it."""
    kept = {name: value for name, value in inherited.items() if name not in _NOT_INHERITED}
    # one machine may have HAProxies of several clusters, and Ray's default is one folder for all
    haproxy = f"{temp_dir}/haproxy"
    ours = {
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # a node is drained by its own command, which knows the notice; SIGTERM ends it at once
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{haproxy}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{haproxy}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": haproxy,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{haproxy}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{haproxy}/metrics.sock",
    }
    return {**RAY_SETTINGS, **kept, **ours}


def head_command(shape: NodeShape, ports: Ports, temp_dir: str) -> list[str]:
    """Starts the control plane, the dashboard and the first node."""
    return [
        *(*RAY, "start", "--head", "--block"),
        f"--port={ports.control}",
        f"--ray-client-server-port={ports.client}",
        "--include-dashboard=true",
        f"--dashboard-host={_LOOPBACK}",
        f"--dashboard-port={ports.dashboard}",
        f"--temp-dir={temp_dir}",
        *_node_words(shape),
    ]


def node_command(shape: NodeShape, address: str) -> list[str]:
    """Starts a node that joins a head."""
    return [*RAY, "start", "--block", f"--address={address}", *_node_words(shape)]


def _node_words(shape: NodeShape) -> Iterator[str]:
    yield f"--node-name={shape.name}"
    yield f"--num-cpus={shape.cpus}"
    yield f"--num-gpus={shape.gpus}"
    yield f"--memory={shape.memory_mib * 2**20}"
    yield f"--object-store-memory={shape.object_store_mib * 2**20}"
    # raylets of one machine must not share the range that Ray gives each of them
    yield from ("--min-worker-port=0", "--max-worker-port=0")
    if shape.all_labels:
        yield "--labels=" + ",".join(f"{key}={value}" for key, value in shape.all_labels.items())


def drain_command(address: str, node_id: str, notice_s: int) -> list[str]:
    """Tells the cluster that a node is about to be taken away, as a cloud's notice does."""
    return [
        *(*RAY, "drain-node", f"--address={address}", f"--node-id={node_id}"),
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=bigray cluster preempt-node",
        f"--deadline-remaining-seconds={notice_s}",
    ]


def drain(address: str, node_id: str, notice_s: int, environment: Mapping[str, str]) -> None:
    """Give the notice.

    Raises:
        ClusterError: nothing answers, or the cluster refuses.
    """
    command = drain_command(address, node_id, notice_s)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_DRAIN_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{address}: the head did not take the notice within {_DRAIN_TIMEOUT_S:g} s") from error
    if done.returncode:
        raise ClusterError(f"{address}: the head refuses the notice: {_cause(done.stderr or done.stdout)}")


def wait_until_up(nodes: Iterable[LocalNode], timeout_s: float) -> None:
    """Until the control plane knows every one of them.

    Raises:
        ClusterError: one has ended, or is not up in time; with the cause from its log.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(nodes)
    while waiting := [node for node in waiting if UP not in _end_of(node.log)]:
        reap()
        for node in waiting:
            if node.root is not None and not is_alive(node.root) and UP not in _end_of(node.log):
                raise ClusterError(
                    f"{node.name}: Ray did not start: {_cause(_end_of(node.log))}; its log is {node.log}"
                )
        if time.monotonic() >= deadline:
            names = ", ".join(node.name for node in waiting)
            raise ClusterError(f"{names}: not up after {timeout_s:g} s; the log is {waiting[0].log}")
        time.sleep(_POLL_S)


def _end_of(log: str) -> str:
    try:
        with Path(log).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _MOST_OF_LOG))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _cause(output: str) -> str:
    """The last line that tells something, without Ray's colours."""
    return last_line(Exception(re.sub(r"\x1b\[[0-9;]*m", "", output) or "it said nothing"))


def raylet_of(rows: Sequence[Row]) -> tuple[Process, str] | None:
    """The raylet among a node's processes, and the node's id in Ray (pure)."""
    for row in rows:
        if row.command and row.command[0].endswith("/raylet"):
            for word in row.command:
                if word.startswith("--node_id="):
                    return row.process, word.partition("=")[2]
    return None


def address_in(temp_dir: str) -> str:
    """Where the head that was started with this folder listens: Ray writes it down there."""
    return (Path(temp_dir) / "ray_current_cluster").read_text().strip()
