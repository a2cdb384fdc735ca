"""How many worker groups fit a cluster: pure functions of its nodes and of what a group holds."""

from __future__ import annotations

import glob
import math
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigray.specs import ScalingSpec

UNITS = 10_000
"""Ray counts every resource in whole steps of 1e-4."""
REPLICA_PREFIX = "SERVE_REPLICA::"
"""Of the names of Serve's replicas, Ray's `REPLICA_ID_FULL_ID_STR_PREFIX`: to import Serve takes more than a second."""
ACCELERATOR_LABEL, ACCELERATOR_RESOURCE = "ray.io/accelerator-type", "accelerator_type:"


@dataclass(frozen=True)
class Node:
    """One machine: what it has, and what of it nobody holds."""

    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    free_gpu_shares: tuple[float, ...] | None = None
    """What is free of each GPU. None where only the sum is known: then the held shares are taken to lie close."""
    free_memory_bytes: float = math.inf
    """Of Ray's `memory` resource; infinite where it is not known, before Ray starts."""
    object_store_bytes: float = math.inf
    replicas: int = 0
    """Of Ray Serve, that run here now; what they hold is not free."""
    has_driver: bool = False
    name: str = ""
    """Of the host; for tables."""
    accelerator: str = ""
    """Type of its GPUs, as its label tells."""
    is_new: bool = False
    """Not there yet: the autoscaler may add it."""


@dataclass(frozen=True)
class Capacity:
    """A cluster's nodes."""

    nodes: tuple[Node, ...]
    can_grow: bool = False
    """An autoscaler starts nodes for what finds no place, and what has a place may wait for one again."""

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @property
    def free_cpus(self) -> float:
        return sum(node.free_cpus for node in self.nodes)

    @property
    def free_gpus(self) -> float:
        return sum(node.free_gpus for node in self.nodes)

    @property
    def replicas(self) -> int:
        return sum(node.replicas for node in self.nodes)

    @property
    def gpus_by_type(self) -> dict[str, float]:
        """Accelerator type -> GPUs, those of an unknown type under ""."""
        found: Counter[str] = Counter()
        for node in self.nodes:
            if node.gpus:
                found[node.accelerator] += node.gpus  # type: ignore[assignment]  # a Counter counts floats too
        return dict(found)


@dataclass(frozen=True)
class Bundle:
    """What one worker or one replica holds, on one node."""

    cpus: float
    gpus: float
    accelerator: str | None = None
    """Type of GPU that it has to be on; None: any."""

    @classmethod
    def of_worker(cls, scaling: ScalingSpec) -> Bundle:
        return cls(scaling.cpus_per_worker, scaling.gpus_per_worker, scaling.accelerator)

    def may_use(self, accelerator: str) -> bool:
        """Whether it may be placed on a node with GPUs of this type."""
        return self.accelerator in (None, accelerator)


def workers_that_fit(capacity: Capacity, scaling: ScalingSpec, *, free_only: bool) -> int:
    """Workers of this size over all nodes; a worker never spans two nodes. `free_only`: beside what runs there now."""
    return bundles_that_fit(capacity, Bundle.of_worker(scaling), free_only=free_only)


def bundles_that_fit(capacity: Capacity, bundle: Bundle, *, free_only: bool) -> int:
    """Equal bundles that find a place in whatever order, and on whatever nodes, Ray places them.

    Ray chooses a node by the sum of its GPUs, and only the node itself looks at each of them. A node of two GPUs is
    chosen for a third bundle of 0.6, refuses it, and is chosen again, for ever. So where a node looks larger than it
    is, no more are counted than it holds: all of them may come to it.
    """
    if not units(bundle.cpus) and not units(bundle.gpus):
        return sys.maxsize if capacity.nodes else 0
    places = [_places_on(node, bundle, free_only=free_only) for node in capacity.nodes]
    total = sum(place.real for place in places)
    return min([total, *(place.real for place in places if place.seen > place.real)])


def groups_that_fit(capacity: Capacity, scaling: ScalingSpec, wanted: int, *, trial_actor_bytes: int = 0) -> int:
    """Groups to open for `wanted` trials: as many as fit beside what runs there now.

    All bundles of all groups are equal, so counting them is exact: whatever order Ray places them in, this many find
    a place. Nothing else that bigray starts holds a CPU, so a sweep cannot wait for itself. An actor of a Tune trial
    holds memory (`trial_actor_bytes`), and a group without one would have nothing to do.
    """
    size = workers_of_a_group(capacity, scaling)
    # an elastic group takes up to its most; where not even one has room for that, one goes with less
    fit = workers_that_fit(capacity, scaling, free_only=True) // size if size else 0
    return min(wanted, fit, trial_actors_that_fit(capacity, trial_actor_bytes))


def workers_of_a_group(capacity: Capacity, scaling: ScalingSpec) -> int:
    """Workers that one group starts with beside what runs there now; 0 where it might wait for ever.

    An elastic group asks for all that Ray sees a place for, up to its most, and gets no fewer where Ray sees too many.
    """
    asked = min(scaling.max_workers, workers_that_seem_to_fit(capacity, scaling))
    fits = scaling.min_workers <= asked <= workers_that_fit(capacity, scaling, free_only=True)
    return asked if fits else 0


def workers_that_seem_to_fit(capacity: Capacity, scaling: ScalingSpec) -> int:
    """Workers for which Ray's control plane sees a place now: it adds up the GPUs of a node."""
    return sum(_places_on(node, Bundle.of_worker(scaling), free_only=True).seen for node in capacity.nodes)


def trial_actors_that_fit(capacity: Capacity, trial_actor_bytes: int) -> int:
    """Tune trials' actors over all nodes: each holds this much of one node's `memory` resource, and no CPU."""
    known = [node.free_memory_bytes for node in capacity.nodes]
    if not trial_actor_bytes or math.inf in known:
        return sys.maxsize
    return sum(int(free // trial_actor_bytes) for free in known)


def nodes_too_small_for(data_bytes: int, capacity: Capacity, scaling: ScalingSpec) -> list[Node]:
    """Nodes whose object store cannot hold the data, but that have to: the driver's, and any that may get a worker."""
    worker = Bundle.of_worker(scaling)
    return [
        node
        for node in capacity.nodes
        if node.object_store_bytes < data_bytes
        and (node.has_driver or _places_on(node, worker, free_only=True).seen > 0)
    ]


@dataclass(frozen=True)
class _Places:
    """Bundles on one node."""

    real: int
    seen: int
    """As Ray's control plane counts them."""


def _places_on(node: Node, bundle: Bundle, *, free_only: bool) -> _Places:
    """The CPUs come in any parts; a share of a GPU is a share of one GPU, and more than one are whole ones."""
    if not bundle.may_use(node.accelerator):
        return _Places(0, 0)
    free_cpus, gpus = (node.free_cpus, free_shares(node)) if free_only else (node.cpus, _shares(node.gpus))
    by_cpu = round(free_cpus * UNITS) // units(bundle.cpus) if units(bundle.cpus) else sys.maxsize
    wanted = units(bundle.gpus)
    if not wanted:
        return _Places(by_cpu, by_cpu)
    seen = sum(gpus) // wanted
    if wanted < UNITS:
        real = sum(share // wanted for share in gpus)
    elif wanted % UNITS:  # Ray has no worker with one GPU and a half
        return _Places(0, 0)
    else:
        real = gpus.count(UNITS) // (wanted // UNITS)
    return _Places(min(by_cpu, real), min(by_cpu, seen))


def free_shares(node: Node) -> list[int]:
    """What is free of each GPU, in Ray's steps."""
    if node.free_gpu_shares is None:
        return _shares(node.free_gpus)
    return [round(share * UNITS) for share in node.free_gpu_shares]


def _shares(gpus: float) -> list[int]:
    whole, rest = divmod(round(gpus * UNITS), UNITS)
    return [UNITS] * whole + ([rest] if rest else [])


def units(asked: float) -> int:
    """What is asked for, as Ray counts it: it cuts off what is finer, and adds nothing for a float's last digit."""
    return int(asked * UNITS)


def local_capacity() -> Capacity:
    """What an embedded Ray on this machine will have; starts nothing."""
    cpus, gpus = float(_usable_cpus()), float(_visible_gpus())
    return Capacity((Node(cpus, gpus, cpus, gpus, name=socket.gethostname()),))


def _usable_cpus() -> int:
    """Cores this process may run on, within a container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2: no quota to read
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _visible_gpus() -> int:
    """GPUs of this machine, or those that `CUDA_VISIBLE_DEVICES` leaves."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(glob.glob("/dev/nvidia[0-9]*"))
    return len([device for device in chosen.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])


def connected_capacity(application: str | None = None) -> Capacity:
    """The nodes of the cluster this process is connected to (driver).

    With the name of a Serve application only its replicas are counted as such: an endpoint takes over its own, and
    what those of others hold stays held.
    """
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    replicas = _replicas_by_node(application)
    here = ray.get_runtime_context().get_node_id()
    return Capacity(
        tuple(
            _node(node, free.get(node["NodeID"], {}), replicas[node["NodeID"]], node["NodeID"] == here)
            for node in ray.nodes()
            if node["Alive"]
        )
    )


def _replicas_by_node(application: str | None) -> Counter[str]:
    """Live replicas of an application of Ray Serve, or of all of them, by the node they run on."""
    from ray._private.state import actors

    prefix = REPLICA_PREFIX + (f"{application}#" if application is not None else "")
    alive: dict[str, dict[str, Any]] = actors(actor_state_name="ALIVE")
    return Counter(actor["Address"]["NodeID"] for actor in alive.values() if actor["Name"].startswith(prefix))


def _node(node: dict[str, Any], free: dict[str, float], replicas: int, has_driver: bool) -> Node:
    resources: dict[str, float] = node["Resources"]
    return Node(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        free_cpus=free.get("CPU", 0.0),
        free_gpus=free.get("GPU", 0.0),
        free_memory_bytes=free.get("memory", 0.0),
        object_store_bytes=resources.get("object_store_memory", math.inf),
        replicas=replicas,
        has_driver=has_driver,
        name=name_of(node),
        accelerator=accelerator_of(node.get("Labels") or {}, resources),
    )


def name_of(node: dict[str, Any]) -> str:
    """Hosts have names of their own, but several nodes may be on one, as in a dry run."""
    return f"{node.get('NodeManagerHostname') or node.get('NodeManagerAddress') or ''} ({node['NodeID'][:6]})".lstrip()


def accelerator_of(labels: Mapping[str, str], resources: Mapping[str, float]) -> str:
    """Type of a node's GPUs: its label, else the resource that older nodes have instead."""
    if label := labels.get(ACCELERATOR_LABEL):
        return label
    named = (
        name.removeprefix(ACCELERATOR_RESOURCE) for name in sorted(resources) if name.startswith(ACCELERATOR_RESOURCE)
    )
    return next(named, "")
