"""What the cluster's autoscaler may add to the nodes that are up: counted like nodes that are there and idle.

No service of Ray 2.60 tells it: only the autoscaler has the file that says so, which is on the head. Where the
autoscaler runs beside the head, as KubeRay's does, nothing is found, and the nodes that are up are all there is.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from bigray.cluster.capacity import Capacity, Node, accelerator_of, connected_capacity
from bigray.cluster.connect import is_embedded

TIMEOUT_S = 30.0
"""For a process of Ray's to start on the head and to read the file."""
MOST_NODES = 1000
"""Counted of those that may be added."""
GROUP_LABEL = "ray.io/node-group"
"""Ray sets it to the type of a node that the autoscaler started."""
HEAD_RESOURCE = "node:__internal_head__"
SETTINGS = ("available_node_types", "head_node_type", "max_workers")
CONFIG_OPTION, ADDRESS_OPTION = "--autoscaling-config=", "--gcs-address="


@dataclass(frozen=True)
class NodeType:
    """A kind of node that the autoscaler starts."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    most: int
    """Nodes of this kind at once."""


@dataclass(frozen=True)
class Growth:
    """How far the autoscaler may go."""

    node_types: tuple[NodeType, ...]
    most: int
    """Nodes beside the head, of all kinds together."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Growth:
        """Of the autoscaler's file; what it leaves out is as Ray completes it."""
        most, head = int(config.get("max_workers", 0)), config.get("head_node_type")

        def node_type(name: str, kind: Mapping[str, Any]) -> NodeType:
            of_kind = kind.get("max_workers", 0 if name == head else most)
            return NodeType(name, kind.get("resources") or {}, kind.get("labels") or {}, int(of_kind))

        kinds = config.get("available_node_types") or {}
        return cls(tuple(node_type(name, kind) for name, kind in kinds.items()), most)


def growing_capacity(application: str | None = None) -> Capacity:
    """`connected_capacity`, and the nodes that the cluster's autoscaler may add (driver)."""
    capacity = connected_capacity(application)
    growth = None if is_embedded() else _growth()
    return capacity if growth is None else grown(capacity, growth, _workers_up())


def grown(capacity: Capacity, growth: Growth, up: Mapping[str, int]) -> Capacity:
    """`up`: nodes beside the head by their kind; "" where it is not known, which only counts for all kinds together.

    The largest kind is added first: which one the autoscaler takes depends on what is asked of it.
    """
    room = min(growth.most - sum(up.values()), MOST_NODES)
    added = islice(_addable(growth, up), max(0, room))
    return replace(capacity, nodes=(*capacity.nodes, *added), can_grow=True)


def _addable(growth: Growth, up: Mapping[str, int]) -> Iterator[Node]:
    largest = sorted(growth.node_types, key=lambda kind: (-kind.resources.get("GPU", 0), -kind.resources.get("CPU", 0)))
    for kind in largest:
        if kind.resources.get("CPU") or kind.resources.get("GPU"):  # else it does not say how large it is
            for _ in range(kind.most - up.get(kind.name, 0)):
                yield _node(kind)


def _node(kind: NodeType) -> Node:
    cpus, gpus = float(kind.resources.get("CPU", 0)), float(kind.resources.get("GPU", 0))
    return Node(
        cpus,
        gpus,
        free_cpus=cpus,
        free_gpus=gpus,
        free_memory_bytes=float(kind.resources.get("memory", 0)),  # the autoscaler counts what it is told, too
        object_store_bytes=float(kind.resources.get("object_store_memory", math.inf)),
        name=f"{kind.name} (to be added)",
        accelerator=accelerator_of(kind.labels, kind.resources),
        is_new=True,
    )


def _workers_up() -> Counter[str]:
    import ray

    return Counter(
        (node.get("Labels") or {}).get(GROUP_LABEL, "")
        for node in ray.nodes()
        if node["Alive"] and HEAD_RESOURCE not in node["Resources"]
    )


def _growth() -> Growth | None:
    """Asked on the head, by a task where this process is on another node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD_RESOURCE in node["Resources"]]
    if not heads:
        return None
    if ray.get_runtime_context().get_node_id() == heads[0]:
        config = autoscaler_settings()
    else:
        there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
        ask = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(autoscaler_settings)
        try:
            config = ray.get(ask.remote(), timeout=TIMEOUT_S)
        except ray.exceptions.RayError:  # it only makes the plan smaller
            return None
    return None if config is None else Growth.from_config(config)


def autoscaler_settings() -> dict[str, Any] | None:
    """What `Growth.from_config` needs of the file of this cluster's autoscaler (head), which may hold secrets, too.

    None where no autoscaler that starts nodes runs on this machine.
    """
    import ray

    file = find_config(commands(), ray.get_runtime_context().gcs_address)
    return None if file is None else read_settings(Path(file).expanduser())


def read_settings(file: Path) -> dict[str, Any] | None:
    """None where the file cannot be read: it is another user's, or gone."""
    import yaml

    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError):
        return None
    return {name: config[name] for name in SETTINGS if name in config} if isinstance(config, dict) else None


def find_config(running: Iterable[Sequence[str]], gcs_address: str) -> str | None:
    """The file of the autoscaler that serves a cluster, from the command lines of what runs on its head."""
    for command in running:
        options = [word for word in command if word.startswith((CONFIG_OPTION, ADDRESS_OPTION))]
        files = [word.removeprefix(CONFIG_OPTION) for word in options if word.startswith(CONFIG_OPTION)]
        if files and f"{ADDRESS_OPTION}{gcs_address}" in options:
            return files[0]
    return None


def commands() -> Iterator[list[str]]:
    """The command line of every process of this machine that may be looked at."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended while we looked
            yield file.read_bytes().decode(errors="replace").split("\0")
