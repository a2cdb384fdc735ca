"""Which ends of a worker group's Ray Train run are survived."""

from __future__ import annotations

import pickle

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2.api.exceptions import WorkerGroupError

from bigray.cluster.capacity import Capacity, Node
from bigray.specs import ScalingSpec
from bigray.training.groups import _are_back, _max_starts, is_a_death


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        ControllerError(ActorDiedError()),
        ControllerError(WorkerGroupStartupFailedError("at least one replacement worker failed to initialize")),
    ],
)
def test_a_group_survives_the_death_of_its_controller_or_of_a_worker_while_another_is_placed(error: Exception) -> None:
    assert is_a_death(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize(
    "error",
    [
        ControllerError(WorkerGroupStartupTimeoutError(num_workers=2)),
        ControllerError(InsufficientClusterResourcesError("no GPU")),
        ControllerError(ValueError("a fault of ours")),
        WorkerGroupError("a fault of ours", {0: ValueError()}),
        RuntimeError("a fault of ours"),
    ],
)
def test_a_group_that_cannot_be_placed_or_fails_by_itself_ends(error: Exception) -> None:
    assert not is_a_death(pickle.loads(pickle.dumps(error)))


def test_a_group_on_a_cluster_that_can_grow_waits_as_long_as_a_node_takes_to_boot() -> None:
    fixed, elastic = ScalingSpec(num_workers=2), ScalingSpec(num_workers=(1, 2))

    assert _max_starts(fixed, can_grow=False) < 10 < _max_starts(fixed, can_grow=True)
    assert _max_starts(elastic, can_grow=False) == _max_starts(elastic, can_grow=True)


def test_the_end_of_a_run_waits_for_no_cpus_of_a_node_that_is_lost() -> None:
    def cluster(*free: float) -> Capacity:
        return Capacity(tuple(Node(cpus=2.0, gpus=0.0, free_cpus=it, free_gpus=0.0) for it in free))

    assert not _are_back(4.0, cluster(2.0, 1.0))
    assert _are_back(4.0, cluster(2.0, 2.0))
    assert _are_back(4.0, cluster(2.0)), "the other node is gone"
    assert _are_back(3.0, cluster(2.0, 1.0)), "somebody else held one before, too"
