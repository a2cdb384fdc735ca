"""A place for each worker of an elastic group, that can be given back alone (in Ray Train's controller).

Ray Train places a group in one placement group, and Ray gives no part of one back. Where a part is lost with its node
and finds no other place, Ray's control plane (2.60) looks for one without a pause until the whole is removed, on a core
of its own, and everything that asks it waits. So each worker has a placement group to itself here, on a node that is
chosen beforehand.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bigray.cluster.capacity import UNITS, units
from bigray.training.lost_nodes import NODE_LABEL, draining_nodes, unreachable_nodes

ATTEMPT_S = 2.0
"""For places that seemed to be free; another group may have taken them at the same moment."""
MOST_PAUSE_S = 0.5
"""Between two attempts, drawn by chance: of two groups that got in each other's way one is first."""


def give_each_worker_its_own() -> None:
    """From now on Ray Train's worker groups in this process are placed by `SeparatePlaces`.

    Ray Train 2.60 lets nobody choose how a group is placed; these are the names by which it does.
    """
    worker_group.placement_group = _bundles
    worker_group.DefaultPlacementGroupHandle = SeparatePlaces
    worker_group.PlacementGroupSchedulingStrategy = _strategy


def _bundles(
    bundles: list[dict[str, float]], strategy: str, bundle_label_selector: list[dict[str, str]] | None = None
) -> list[dict[str, float]]:
    """What Ray Train asks for: always to PACK, and without a selector, since an elastic group has no accelerator."""
    return bundles


def _strategy(
    placement_group: Sequence[PlacementGroup], placement_group_bundle_index: int
) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(placement_group[placement_group_bundle_index], 0)


class SeparatePlaces(PlacementGroupHandle):  # type: ignore[misc]
    """The places of one group's workers, one for each bundle."""

    def __init__(self, bundles: list[dict[str, float]]) -> None:
        self._bundles = bundles
        self._places: dict[int, PlacementGroup] = {}

    @property
    def placement_group(self) -> dict[int, PlacementGroup]:
        """Number of the bundle -> its own placement group; only `_strategy` asks."""
        return self._places

    def ready(self) -> Any:
        raise NotImplementedError("Ray Train waits for the places of a worker group with `wait`")

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Whether all places are found within this time; none is held where not."""
        deadline = time.monotonic() + timeout_seconds
        while not self._take():
            if time.monotonic() > deadline:
                return False
            time.sleep(random.uniform(0.1, MOST_PAUSE_S))
        return True

    def let_go(self, bundle: int) -> None:
        """Give one place back."""
        if (place := self._places.pop(bundle, None)) is not None:
            remove_placement_group(place)

    def shutdown(self) -> None:
        """Give all places back."""
        for bundle in list(self._places):
            self.let_go(bundle)

    def _take(self) -> bool:
        nodes = choose_nodes(_room_for(self._bundles[0]), len(self._bundles))
        if nodes is None:
            return False
        for number, (bundle, node) in enumerate(zip(self._bundles, nodes, strict=True)):
            self._places[number] = placement_group([bundle], bundle_label_selector=[{NODE_LABEL: node}])
        deadline = time.monotonic() + ATTEMPT_S
        if all(place.wait(max(0.0, deadline - time.monotonic())) for place in self._places.values()):
            return True
        self.shutdown()
        return False


def choose_nodes(room: Mapping[str, int], num_workers: int) -> list[str] | None:
    """A node for each worker, as few nodes as hold them and those with the most room first; None where they do not fit.

    `room`: node -> how many workers it has a place for.
    """
    chosen: list[str] = []
    for node in sorted(room, key=lambda name: (-room[name], name)):
        chosen += [node] * min(room[node], num_workers - len(chosen))
    return chosen if len(chosen) == num_workers else None


def places_on(free: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """For how many such bundles a node has free resources."""
    return min(round(free.get(name, 0.0) * UNITS) // units(asked) for name, asked in bundle.items() if units(asked))


def _room_for(bundle: Mapping[str, float]) -> dict[str, int]:
    from ray._private.state import available_resources_per_node

    avoided = unreachable_nodes() | draining_nodes()
    free = available_resources_per_node()
    return {node: places_on(free[node], bundle) for node in free if node not in avoided}
