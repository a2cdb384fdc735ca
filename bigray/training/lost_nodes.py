"""Nodes that are gone before Ray has noticed (in Ray Train's controller).

Ray counts a node as alive until it has missed several health checks, 15 s and more by default, and places workers on it
meanwhile, for which Ray Train waits in vain. A host that is off refuses a connection at once, or does not answer one.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ANSWER_TIMEOUT_S = 1.0
"""The kernel of a host takes the connection, however busy its Ray is."""
MOST_AT_ONCE = 64
NODE_LABEL = "ray.io/node-id"


def unreachable_nodes() -> frozenset[str]:
    """Ids of the nodes that Ray counts as alive and whose raylet cannot be reached from here; takes `ANSWER_TIMEOUT_S`
    for each 64 that do not answer. One node alone is this one."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return lost_among(nodes) if len(nodes) > 1 else frozenset()


def gone_among(node_ids: Collection[str]) -> frozenset[str]:
    """Of these nodes those that are gone: Ray says so, or they cannot be reached."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] in node_ids]
    reachable = {node["NodeID"] for node in alive} - lost_among(alive)
    return frozenset(node_ids) - reachable


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are about to be taken away."""
    from ray._private import state

    return frozenset(state.state.get_draining_nodes())


def lost_among(nodes: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Of nodes as `ray.nodes()` tells of them, the ids of those that take no connection."""
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:  # it starts no more threads than there are nodes
        answers = list(pool.map(_takes_connections, nodes))
    return frozenset(node["NodeID"] for node, answers_here in zip(nodes, answers, strict=True) if not answers_here)


def selector_without(lost: frozenset[str], usual: Mapping[str, str]) -> dict[str, str] | None:
    """Ray's label selector of a worker: the usual one, and none of these nodes; None where it is the usual one."""
    return {**usual, NODE_LABEL: f"!in({','.join(sorted(lost))})"} if lost else None


def _takes_connections(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True
