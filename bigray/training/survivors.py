"""An elastic group that has lost a node goes on at once with the workers that are left (in Ray Train's controller).

Ray Train would end those too and start the whole group again at the size that is left: the start of a process and its
imports, for a group that has all it needs in memory. It is told here that a worker lost with its node has finished.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

from bigray.training.lost_nodes import draining_nodes, gone_among
from bigray.training.places import give_each_worker_its_own

logger = logging.getLogger(__name__)
NODE_FOLLOWS_S = 0.5
"""The processes of a host do not end in one instant: a worker may be seen to go before its node is."""
LOOK_AGAIN_S = 0.2


@dataclass
class GivenUp(WorkerStatus):  # type: ignore[misc]
    """Of a worker that was lost with its node, without which its group goes on."""


class GoOnWithoutLost(WorkerGroupCallback):  # type: ignore[misc]
    """Has the switchboard seat who is left, as long as they are enough.

    Where a worker has failed on a node that stays, Ray Train does what it always does: it starts the group again.
    """

    def __init__(self, switchboard: Any, group: int, min_workers: int) -> None:
        self._switchboard, self._group, self._min_workers = switchboard, group, min_workers
        self._workers: list[Any] = []
        """By Ray Train's world rank, which is a worker's slot."""
        self._places: Any = None
        self._given_up: set[int] = set()

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        give_each_worker_its_own()

    def after_worker_group_start(self, worker_group: Any) -> None:
        state = worker_group.get_worker_group_state()
        self._workers, self._places, self._given_up = state.workers, state.placement_group_handle, set()
        ray.get(self._switchboard.starts_whole.remote(self._group))

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        failed = set(worker_group_status.errors)
        try:
            if failed - self._given_up:
                self._give_up_nodes_of(failed - self._given_up)
            for rank in failed & self._given_up:  # not before: who is being drained may still be saving
                self._places.let_go(self._workers[rank].placement_group_bundle_index)
        except Exception:  # to raise would end the group for good, and the cluster is in disorder just now
            logger.exception("workers %s are left to Ray Train", sorted(failed - self._given_up))
        for rank in self._given_up:
            worker_group_status.worker_statuses[rank] = GivenUp(running=False)

    def _give_up_nodes_of(self, failed: Collection[int]) -> None:
        """All workers there: the others will follow, and the size of the group is counted by nodes."""
        nodes = {self._node_of(rank) for rank in failed}
        lost = {rank for rank in range(len(self._workers)) if self._node_of(rank) in nodes}
        if len(self._workers) - len(self._given_up | lost) < self._min_workers:
            return
        gone = _gone_of(nodes - draining_nodes())
        if gone is not None:
            ray.get(self._switchboard.go_on_without.remote(self._group, sorted(lost), sorted(gone)))
            self._given_up |= lost

    def _node_of(self, rank: int) -> str:
        node_id: str = self._workers[rank].metadata.node_id
        return node_id


def _gone_of(nodes: Collection[str]) -> frozenset[str] | None:
    """These nodes where all of them are gone; None where one is there."""
    deadline = time.monotonic() + NODE_FOLLOWS_S
    while (gone := gone_among(nodes)) != frozenset(nodes):
        if time.monotonic() > deadline:
            return None
        time.sleep(LOOK_AGAIN_S)
    return gone


def without_given_up(worker_group_state: Any, worker_group_status: Any) -> Any:
    """The state of a worker group as it is without those that were given up."""
    statuses = worker_group_status.worker_statuses
    left = [it for rank, it in enumerate(worker_group_state.workers) if not isinstance(statuses.get(rank), GivenUp)]
    return replace(worker_group_state, workers=left)
