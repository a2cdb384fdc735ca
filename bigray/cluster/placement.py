"""Where the groups of a plan and the endpoint's replicas may go, node by node: pure functions.

One placement that works, of those Ray may choose: each group is packed on the nodes with the most room, so that
different groups are spread. `capacity` has counted no more than fit in whatever order; this shows one order.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bigray.cluster.capacity import UNITS, Bundle, Capacity, Node, free_shares, units


@dataclass(frozen=True)
class NodePlan:
    """What one node would hold."""

    name: str
    """As Ray names it; a number where it has no name."""
    cpus: float
    gpus: float
    accelerator: str
    """Type of its GPUs, "" where it has none or does not tell."""
    workers: dict[str, int]
    """Number of a group, from 1 -> its workers here."""
    free_cpus: float
    """Beside the groups, and what runs there now."""
    free_gpus: float
    object_store_bytes: float | None
    """None where it is not known."""
    replicas: int
    """Of the endpoint's floor, once the groups have ended: those that run here now, and new ones."""


@dataclass
class _Room:
    """What is left of a node, in Ray's steps; each GPU by itself."""

    cpus: int
    gpus: list[int]
    accelerator: str

    @classmethod
    def of(cls, node: Node) -> _Room:
        return cls(round(node.free_cpus * UNITS), free_shares(node), node.accelerator)

    def fits(self, bundle: Bundle) -> int:
        """Bundles of this size that find a place, one after another."""
        if not bundle.may_use(self.accelerator):
            return 0
        cpus, gpus = units(bundle.cpus), units(bundle.gpus)
        by_cpu = self.cpus // cpus if cpus else sys.maxsize
        if not gpus:
            return by_cpu
        if gpus < UNITS:
            return min(by_cpu, sum(share // gpus for share in self.gpus))
        return 0 if gpus % UNITS else min(by_cpu, self.gpus.count(UNITS) // (gpus // UNITS))

    def take(self, bundle: Bundle) -> bool:
        """Hold one more, as a node does: whole GPUs, or a part of the one with the least that is enough."""
        cpus, gpus = units(bundle.cpus), units(bundle.gpus)
        if self.cpus < cpus or not bundle.may_use(self.accelerator):
            return False
        if gpus >= UNITS:
            chosen = [index for index, free in enumerate(self.gpus) if free == UNITS][: gpus // UNITS]
            if gpus % UNITS or len(chosen) < gpus // UNITS:
                return False
            for index in chosen:
                self.gpus[index] = 0
        elif gpus:
            enough = [(free, index) for index, free in enumerate(self.gpus) if free >= gpus]
            if not enough:
                return False
            self.gpus[min(enough)[1]] -= gpus
        self.cpus -= cpus
        return True


def place(
    capacity: Capacity, worker: Bundle, groups: int, workers_per_group: int, replica: Bundle | None, replicas: int
) -> tuple[NodePlan, ...]:
    """Every node in the order of the cluster. `replicas` is the endpoint's floor, with those that run already."""
    rooms = [_Room.of(node) for node in capacity.nodes]
    workers: list[Counter[str]] = [Counter() for _ in capacity.nodes]
    roomiest = [(-room.fits(worker), index) for index, room in enumerate(rooms)]
    heapq.heapify(roomiest)
    for group in range(1, groups + 1):
        _pack(rooms, roomiest, worker, workers_per_group, workers, str(group))
    endpoint = [node.replicas for node in capacity.nodes]
    if replica is not None:  # the groups have ended by then
        empty = [_Room.of(node) for node in capacity.nodes]
        for index in _spread(empty, replica, replicas - capacity.replicas, endpoint):
            endpoint[index] += 1
    return tuple(
        NodePlan(
            name=node.name or str(number),
            cpus=node.cpus,
            gpus=node.gpus,
            accelerator=node.accelerator,
            workers=dict(placed),
            free_cpus=room.cpus / UNITS,
            free_gpus=sum(room.gpus) / UNITS,
            object_store_bytes=node.object_store_bytes if node.object_store_bytes != float("inf") else None,
            replicas=count if replica is not None else node.replicas,
        )
        for number, (node, placed, room, count) in enumerate(
            zip(capacity.nodes, workers, rooms, endpoint, strict=True), start=1
        )
    )


def replicas_beside(capacity: Capacity, worker: Bundle, placed: Sequence[NodePlan], replica: Bundle, most: int) -> int:
    """Replicas, up to `most`, that find a place while all groups of `placed` train."""
    rooms = [_Room.of(node) for node in capacity.nodes]
    for room, node in zip(rooms, placed, strict=True):
        for _ in range(sum(node.workers.values())):
            room.take(worker)
    return capacity.replicas + len(
        _spread(rooms, replica, most - capacity.replicas, [node.replicas for node in capacity.nodes])
    )


def _pack(
    rooms: Sequence[_Room],
    roomiest: list[tuple[int, int]],
    bundle: Bundle,
    count: int,
    workers: Sequence[Counter[str]],
    group: str,
) -> None:
    """One group on as few nodes as may be, the roomiest first. `roomiest` is a heap of what fits on each, negative."""
    while count and roomiest and roomiest[0][0]:
        _, index = heapq.heappop(roomiest)
        while count and rooms[index].take(bundle):
            workers[index][group] += 1
            count -= 1
        heapq.heappush(roomiest, (-rooms[index].fits(bundle), index))


def _spread(rooms: Sequence[_Room], bundle: Bundle, count: int, held: Sequence[int]) -> list[int]:
    """Nodes of so many bundles, each on one of those that have the fewest, counting what is `held` already."""
    emptiest = [(held[index], -fits, index) for index, room in enumerate(rooms) if (fits := room.fits(bundle))]
    heapq.heapify(emptiest)
    placed: list[int] = []
    while emptiest and len(placed) < count:
        have, _, index = heapq.heappop(emptiest)
        rooms[index].take(bundle)
        placed.append(index)
        if fits := rooms[index].fits(bundle):
            heapq.heappush(emptiest, (have + 1, -fits, index))
    return placed
