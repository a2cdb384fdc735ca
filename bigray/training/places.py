"""A place for each worker of an elastic group, that can be given back alone (in Ray Train's controller).

Ray Train places a group in one placement group, and Ray gives no part of one back. Where a part is lost with its node
and finds no other place, Ray's control plane (2.60) looks for one without a pause until the whole is removed, on a core
of its own, and everything that asks it waits. So each worker has a placement group to itself here, on a node that is
chosen beforehand.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Collection, Mapping
from typing import Any

from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bigray.cluster.capacity import UNITS, units
from bigray.training.lost_nodes import NODE_LABEL, draining_nodes, selector_without, unreachable_nodes

logger = logging.getLogger(__name__)
ATTEMPT_S, ATTEMPT_S_FOR_EACH = 2.0, 0.1
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
    placement_group: Mapping[int, PlacementGroup], placement_group_bundle_index: int
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
        try:
            while not self._take():
                if time.monotonic() > deadline:
                    return False
                time.sleep(random.uniform(0.1, MOST_PAUSE_S))
        except Exception:  # Ray Train asks again, as it does where its own places fail
            logger.exception("no places for a worker group")
            return False
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
        if (nodes := self._nodes()) is None:
            return False
        is_taken = False
        try:
            for number, (bundle, node) in enumerate(zip(self._bundles, nodes, strict=True)):
                self._places[number] = placement_group([bundle], bundle_label_selector=[{NODE_LABEL: node}])
            is_taken = _are_ready(self._places.values())
        finally:
            if not is_taken:
                self.shutdown()
        return is_taken

    def _nodes(self) -> list[str] | None:
        """A node for each worker. Where no room is seen, Ray looks for one as it does for Ray Train, so that an
        autoscaler sees what is wanted."""
        avoided = unreachable_nodes() | draining_nodes()
        chosen = choose_nodes(_room_for(self._bundles[0], avoided), len(self._bundles))
        if chosen is not None:
            return chosen
        selector = selector_without(avoided, {})
        whole = placement_group(
            self._bundles, strategy="PACK", bundle_label_selector=[selector] * len(self._bundles) if selector else None
        )
        try:
            if not _are_ready([whole]):
                return None
            found = placement_group_table(whole)["bundles_to_node_id"]
            return [found[number] for number in range(len(self._bundles))]
        finally:
            remove_placement_group(whole)


def _are_ready(places: Collection[PlacementGroup]) -> bool:
    """Whether Ray has found them all, within a time that grows with their number: it places one after another."""
    deadline = time.monotonic() + ATTEMPT_S + ATTEMPT_S_FOR_EACH * len(places)
    # Ray takes whole seconds, and of none it takes no answer
    return all(place.wait(max(1, math.ceil(deadline - time.monotonic()))) for place in places)


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


def without_what_others_hold(
    reserved: Mapping[str, Mapping[str, float]],
    free: Mapping[str, Mapping[str, float]],
    own: Mapping[str, int],
    each: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    """What a running group can have of each node: what its `own` workers hold, of `each` so much, and what is free.

    Ray's coordinator counts all that a node has (`reserved`): a group would be ended to be larger, and find no place.
    """
    return {
        node: {
            name: min(amount, round(free.get(node, {}).get(name, 0.0) + own.get(node, 0) * each.get(name, 0.0), 4))
            for name, amount in resources.items()
        }
        for node, resources in reserved.items()
    }


def _room_for(bundle: Mapping[str, float], avoided: Collection[str]) -> dict[str, int]:
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return {node: places_on(free[node], bundle) for node in free if node not in avoided}
