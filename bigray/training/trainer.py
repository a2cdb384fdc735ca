"""Ray Train's trainer without the helper processes that bigray has no use for: each takes seconds of a core to start.

Imports Ray Train, and no torch: the driver's threads and Ray Train's controller use it, and train nothing themselves.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from bigray.cluster.connect import is_embedded
from bigray.training.barrier import NoBarrier
from bigray.training.lost_nodes import draining_nodes, selector_without, unreachable_nodes
from bigray.training.places import without_what_others_hold
from bigray.training.survivors import GoOnWithoutLost, without_given_up

logger = logging.getLogger(__name__)
COORDINATOR_TIMEOUT_S = 5.0
_NO_USE_FOR = (
    DatasetsCallback,  # the workers map one copy of the arrays
    PlacementGroupCleanerCallback,  # it asks the dashboard who is dead; `groups` and the end of the driver see to it
)


class _FixedSize(FixedScalingPolicy):  # type: ignore[misc]
    """Asks no autoscaler for nodes: one machine that was started for this run does not grow."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class _ElasticSize(ElasticScalingPolicy):  # type: ignore[misc]
    """Knows at once which nodes have gone and come.

    Ray's coordinator looks every 20 s, and answers from what it saw then: an elastic group that has lost a node would
    twice ask for as many workers as before, and wait ten seconds for them each time.
    """

    _own: Counter[str] | None = None
    """Workers of the running group by node: those nodes are given up by who watches them, not by a connection that is
    not made. None where it does not run."""

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._own = None
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        state_now = without_given_up(worker_group_state, worker_group_status)
        self._own = Counter(worker.metadata.node_id for worker in state_now.workers)
        return super().make_decision_for_running_worker_group(state_now, worker_group_status)

    def _get_reserved_resources(self) -> Any:
        try:
            answer = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            reserved = ray.get(answer, timeout=COORDINATOR_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            logger.warning("the size of the group stays as it is, Ray's coordinator does not answer: %s", error)
            return None
        gone = (unreachable_nodes() | draining_nodes()) - set(self._own or ())
        there = {node: resources for node, resources in reserved.items() if node not in gone}
        if self._own is None:  # what it held itself a moment ago may not count as free yet
            return there
        each = self.scaling_config._resources_per_worker_not_none
        return without_what_others_hold(there, available_resources_per_node(), self._own, each)


class _NotOnLostNodes(ControllerCallback):  # type: ignore[misc]
    """Keeps workers off nodes that are gone already, and that Ray would still choose."""

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        return selector_without(unreachable_nodes(), scaling_config.label_selector or {})


class _WithoutBarrier(WorkerGroupCallback):  # type: ignore[misc]
    """Ray Train 2.60 lets nobody choose the actor at which `ray.train.report` meets; here nobody calls it."""

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        worker_group.SynchronizationActor = ray.remote(num_cpus=0)(NoBarrier)  # in the controller's own process


class _OnlyWhileWanted(WorkerGroupCallback):  # type: ignore[misc]
    """Ends a controller that is still looking for places when the run is over, as one that waits for a node does.

    It gives back what it has asked the autoscaler for; nothing else tells it, for it has no worker yet.
    """

    def __init__(self, switchboard: Any) -> None:
        self._switchboard = switchboard

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if ray.get(self._switchboard.is_over.remote()):
            raise RuntimeError("the run is over")


class GroupTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Runs one worker group (driver thread)."""

    def _create_default_callbacks(self) -> list[Any]:
        setup = self.train_loop_config["setup"]
        usual = [it for it in super()._create_default_callbacks() if not isinstance(it, _NO_USE_FOR)]
        about_nodes = (
            GoOnWithoutLost(setup.switchboard, setup.group, self.scaling_config.min_workers)
            if self.scaling_config.elasticity_enabled
            else _NotOnLostNodes()
        )
        return [_WithoutBarrier(), _OnlyWhileWanted(setup.switchboard), about_nodes, *usual]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = _ElasticSize(self.scaling_config)
        elif is_embedded():
            parts["scaling_policy"] = _FixedSize(self.scaling_config)
        return super()._initialize_and_run_controller(**parts)
