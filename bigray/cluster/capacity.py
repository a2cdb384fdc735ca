"""How many worker groups fit a cluster: pure functions of its nodes and of what a group holds."""

from __future__ import annotations

import glob
import math
import os
from dataclasses import dataclass
from pathlib import Path

from bigray.specs import ScalingSpec

_SLACK = 1e-6
"""Resources are fractions such as 0.1; Ray counts them in steps of 1e-4, floats do not."""


@dataclass(frozen=True)
class Node:
    """One machine: what it has, and what of it nobody holds."""

    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class Capacity:
    """A cluster's nodes."""

    nodes: tuple[Node, ...]

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


def workers_that_fit(capacity: Capacity, scaling: ScalingSpec, *, free_only: bool) -> int:
    """Workers of this size over all nodes; a worker never spans two nodes. `free_only`: beside what runs there now."""
    total = 0
    for node in capacity.nodes:
        cpus, gpus = (node.free_cpus, node.free_gpus) if free_only else (node.cpus, node.gpus)
        by_cpu = math.floor(cpus / scaling.cpus_per_worker + _SLACK)
        by_gpu = _fit_on_gpus(gpus, scaling.gpus_per_worker) if scaling.gpus_per_worker else by_cpu
        total += min(by_cpu, by_gpu)
    return total


def groups_that_fit(capacity: Capacity, scaling: ScalingSpec, wanted: int) -> int:
    """Groups to open for `wanted` trials: as many as fit beside what runs there now.

    All bundles of all groups are equal, so counting them is exact: whatever order Ray places them in, this many find
    a place. Nothing else that bigray starts holds a CPU, so a sweep cannot wait for itself.
    """
    workers = workers_that_fit(capacity, scaling, free_only=True)
    # an elastic group takes up to its most; where not even one has room for that, one goes with less
    return min(wanted, workers // scaling.max_workers or int(workers >= scaling.min_workers))


def _fit_on_gpus(gpus: float, per_worker: float) -> int:
    """A share of a GPU is a share of one GPU: of three workers with 0.6 each, two GPUs hold two."""
    if per_worker >= 1:
        return math.floor(gpus / per_worker + _SLACK)
    whole = math.floor(gpus + _SLACK)
    return whole * math.floor(1 / per_worker + _SLACK) + math.floor((gpus - whole) / per_worker + _SLACK)


def local_capacity() -> Capacity:
    """What an embedded Ray on this machine will have; starts nothing."""
    cpus, gpus = float(_usable_cpus()), float(_visible_gpus())
    return Capacity((Node(cpus, gpus, cpus, gpus),))


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


def connected_capacity() -> Capacity:
    """The nodes of the cluster this process is connected to (driver)."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return Capacity(tuple(_node(node["Resources"], free.get(node["NodeID"], {})) for node in nodes))


def _node(resources: dict[str, float], free: dict[str, float]) -> Node:
    return Node(
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        free_cpus=free.get("CPU", 0.0),
        free_gpus=free.get("GPU", 0.0),
    )
