"""A Ray cluster whose autoscaler brings its hosts up and down: a head, and a cloud that makes namespaced hosts of ours.

with AutoscaledHosts.start(network, most=2) as cluster:
    cluster.cloud.fail_next(1)
    ...
    cluster.cloud.history
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.hosts import node_provider as asked
from tests.hosts.hosts import Host, Network
from tests.hosts.node_provider import HEAD
from tests.hosts.ray_hosts import RayHosts
from tests.waiting import wait_until

WORKER = "worker"
"""The one kind of node that is launched."""
CLUSTER = "hosts"
IDLE_S = 12.0
"""After which a node that does nothing is taken down."""
EVERY_S = 0.1
AUTOSCALER_EVERY_S = 1
"""Ray: 5."""

Kind = Literal["launched", "refused", "failed", "terminated"]


@dataclass(frozen=True)
class Happening:
    """What became of a request of the autoscaler."""

    kind: Kind
    """`launched`: Ray is up on the host. `refused`: the cloud had none. `failed`: it came, and Ray did not start."""
    node: str
    """"" where there was none."""
    at_s: float
    """On the clock of `time.monotonic`."""


@dataclass
class Cloud:
    """Serves the requests of a `HostProvider`, one after another, in a thread of the test's process.

    Only this thread adds and removes hosts of the network while it runs.
    """

    ray: RayHosts
    folder: Path
    cpus: int
    history: list[Happening] = field(default_factory=list)
    error: BaseException | None = None
    """What the thread ended with, where it was no end that was asked for."""
    _nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    _count: int = 0
    _failures_left: int = 0
    _is_over: threading.Event = field(default_factory=threading.Event)

    def fail_next(self, launches: int) -> None:
        """Have so many of the launches that are asked for next fail, whatever they ask for."""
        self._failures_left = launches

    def count(self, kind: Kind) -> int:
        return sum(happening.kind == kind for happening in self.history)

    @property
    def workers(self) -> list[str]:
        """Nodes that are launched and not terminated, also those that are still coming up."""
        return [node for node in self._nodes if node != HEAD]

    def prepare(self, head: Host) -> None:
        """Before Ray starts on the head."""
        asked.make_folders(self.folder)
        self._nodes[HEAD] = asked.head_entry(head.address)
        asked.write_nodes(self.folder, self._nodes)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        thread = threading.Thread(target=self._serve, name="cloud", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    def _serve(self) -> None:
        try:
            while not self._is_over.wait(EVERY_S):
                if (found := asked.take_request(self.folder)) is not None:
                    self._do(*found)
        except BaseException as error:  # the test asks for it: a thread cannot fail it
            self.error = error
            raise

    def _do(self, name: str, request: dict[str, Any]) -> None:
        if request["do"] == "terminate":
            for node in request["nodes"]:
                self._terminate(node)
            asked.answer(self.folder, name, None)
        elif self._failures_left > 0:
            self._failures_left -= 1
            self._note("refused", "")
            asked.answer(self.folder, name, "no host is left of this kind (a failure that was planned)")
        else:
            nodes = [self._list(request["tags"]) for _ in range(request["count"])]
            asked.answer(self.folder, name, None)
            for node in nodes:
                self._boot(node, asked.kind_of(request["tags"]))

    def _list(self, tags: dict[str, str]) -> str:
        self._count += 1
        node = f"worker{self._count}"
        self._nodes[node] = {"tags": tags, "address": None, "is_running": False}
        asked.write_nodes(self.folder, self._nodes)
        return node

    def _boot(self, node: str, kind: str) -> None:
        """Bring the host up, with Ray on it; where that fails, the node is gone, as from a cloud that takes it back."""
        try:
            host = self.ray.network.add(node)
            self.ray.join_as(host, node, kind, cpus=self.cpus)
        except (RuntimeError, TimeoutError):
            self._terminate(node, "failed")
            return
        self._nodes[node] |= {"address": host.address, "is_running": True}
        asked.write_nodes(self.folder, self._nodes)
        self._note("launched", node)

    def _terminate(self, node: str, kind: Kind = "terminated") -> None:
        if self._nodes.pop(node, None) is None:
            return  # asked for again
        if (host := self.ray.network.hosts.get(node)) is not None:
            self.ray.network.remove(host)
        asked.write_nodes(self.folder, self._nodes)
        self._note(kind, node)

    def _note(self, kind: Kind, node: str) -> None:
        self.history.append(Happening(kind, node, time.monotonic()))


@dataclass
class AutoscaledHosts(RayHosts):
    """As `RayHosts`, with an autoscaler on the head."""

    cloud: Cloud = field(init=False)

    @classmethod
    @contextlib.contextmanager
    def start(cls, network: Network, *, head_cpus: int = 0, cpus: int = 1, most: int = 2) -> Iterator[AutoscaledHosts]:
        """Bring up the head, whose autoscaler may launch up to `most` hosts of `cpus` CPUs each."""
        settings = {
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": str(AUTOSCALER_EVERY_S),
        }
        cluster = cls(network, settings=settings)
        cluster.cloud = Cloud(cluster, network.folder / "cloud", cpus)
        cluster.cloud.prepare(network.add("head"))
        file = network.folder / "autoscaler.yaml"
        file.write_text(json.dumps(autoscaler_config(cluster.cloud.folder, head_cpus, cpus, most)))  # YAML holds JSON
        with cluster.cloud.open():
            cluster.start_head(
                cpus=head_cpus, options=[f"--autoscaling-config={file}"], program=_ray_as(HEAD, kind=HEAD)
            )
            yield cluster

    def join_as(self, host: Host, node: str, kind: str, *, cpus: int) -> None:
        """Start a worker node that tells the autoscaler which of those that it has launched it is."""
        self._start(host, [f"--address={self.address}"], cpus, _ray_as(node, kind=kind))

    def wait_for(self, kind: Kind, count: int, timeout_s: float) -> None:
        """Until so many things of a kind have happened in the cloud."""

        def have_happened() -> bool:
            if self.cloud.error is not None:
                raise RuntimeError("the cloud has ended") from self.cloud.error
            return self.cloud.count(kind) >= count

        try:
            wait_until(have_happened, f"{count} x {kind}", timeout_s)
        except TimeoutError as late:
            raise TimeoutError(f"{late}: {self.cloud.history}\n{self.autoscaler_log()[-5000:]}") from None


def _ray_as(node: str, *, kind: str) -> Sequence[str]:
    """The command `ray` of a node that the autoscaler knows by this id, of this kind."""
    return ("env", f"RAY_CLOUD_INSTANCE_ID={node}", f"RAY_NODE_TYPE_NAME={kind}", "ray")


def autoscaler_config(folder: Path, head_cpus: int, cpus: int, most: int) -> dict[str, Any]:
    """The whole of the autoscaler's file: nothing completes one that is not read by `ray up`.

    Its hosts start their own Ray, so that the autoscaler has no reason to reach one by ssh.
    """
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": CLUSTER,
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "external",
            "module": asked.MODULE,
            "folder": str(folder),
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "docker": {},
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": head_cpus}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            WORKER: {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }
