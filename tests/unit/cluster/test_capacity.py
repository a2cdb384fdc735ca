from __future__ import annotations

import pytest

from bigray.cluster.capacity import (
    REPLICA_PREFIX,
    Bundle,
    Capacity,
    Node,
    bundles_that_fit,
    groups_that_fit,
    local_capacity,
    workers_that_fit,
)
from bigray.specs import ScalingSpec


def _idle(*nodes: tuple[float, float]) -> Capacity:
    return Capacity(tuple(Node(cpus, gpus, cpus, gpus) for cpus, gpus in nodes))


def _workers(num_workers: int = 1, cpus: float = 1.0, gpus: float = 0.0) -> ScalingSpec:
    return ScalingSpec(num_workers=num_workers, cpus_per_worker=cpus, gpus_per_worker=gpus)


@pytest.mark.parametrize(
    ("nodes", "scaling", "expected"),
    [
        ([(4, 0)], _workers(), 4),
        ([(3, 0), (3, 0)], _workers(cpus=2), 2),  # not 3: the last CPU of each node cannot be put together
        ([(8, 2)], _workers(gpus=1), 2),
        ([(2, 8)], _workers(gpus=1), 2),
        ([(8, 0), (1, 4)], _workers(gpus=1), 1),  # the CPUs are on another node than the GPUs
        ([(8, 0)], _workers(gpus=1), 0),
        ([(1, 0)], _workers(cpus=0.1), 10),
        ([(0.3, 0)], _workers(cpus=0.1), 3),
        ([(16, 1)], _workers(gpus=0.1), 10),
        ([(16, 2)], _workers(gpus=0.6), 2),  # not 3: a worker never has parts of two GPUs
        ([(16, 4)], _workers(gpus=2), 2),
        ([], _workers(), 0),
    ],
)
def test_workers_are_counted_node_by_node(
    nodes: list[tuple[float, float]], scaling: ScalingSpec, expected: int
) -> None:
    assert workers_that_fit(_idle(*nodes), scaling, free_only=False) == expected


def test_what_is_held_by_others_is_not_free() -> None:
    capacity = Capacity((Node(cpus=8, gpus=0, free_cpus=3, free_gpus=0),))

    assert workers_that_fit(capacity, _workers(), free_only=False) == 8
    assert workers_that_fit(capacity, _workers(), free_only=True) == 3


@pytest.mark.parametrize(("wanted", "expected"), [(1, 1), (3, 3), (100, 3)])
def test_no_more_groups_are_opened_than_there_are_trials(wanted: int, expected: int) -> None:
    assert groups_that_fit(_idle((4, 0), (3, 0)), _workers(num_workers=2), wanted) == expected


def test_the_totals_are_over_all_nodes() -> None:
    capacity = Capacity((Node(8, 2, 3, 1), Node(4, 0, 4, 0)))

    assert (capacity.cpus, capacity.gpus, capacity.free_cpus, capacity.free_gpus) == (12, 2, 7, 1)


def test_this_machine_has_a_cpu() -> None:
    (node,) = local_capacity().nodes

    assert node.cpus == node.free_cpus >= 1


def test_a_share_that_leaves_a_rest_of_each_gpu_is_not_placed_over_several_nodes() -> None:
    """Ray would choose a node with 2 GPUs for 3 workers of 0.6, which the node refuses, again and again."""
    assert workers_that_fit(_idle((8, 2), (8, 2)), _workers(gpus=0.6), free_only=True) == 2
    assert workers_that_fit(_idle((8, 2), (8, 2)), _workers(gpus=0.5), free_only=True) == 8
    assert workers_that_fit(_idle((8, 1), (8, 1)), _workers(gpus=0.6), free_only=True) == 2
    assert workers_that_fit(_idle((2, 2), (2, 2)), _workers(gpus=0.6), free_only=True) == 4  # the CPUs say no first


def test_two_halves_of_two_gpus_are_not_one() -> None:
    halves = Node(8, 2, 8, 1.0, free_gpu_shares=(0.5, 0.5))

    assert workers_that_fit(Capacity((halves,)), _workers(gpus=1), free_only=True) == 0
    assert workers_that_fit(Capacity((halves,)), _workers(gpus=0.5), free_only=True) == 2


def test_resources_are_cut_to_the_steps_that_ray_counts() -> None:
    assert workers_that_fit(_idle((1, 0)), _workers(cpus=0.50009), free_only=True) == 2
    assert workers_that_fit(_idle((1, 0)), _workers(cpus=1 / 3), free_only=True) == 3
    assert workers_that_fit(_idle((1, 0)), _workers(cpus=0.3335), free_only=True) == 2


def test_there_is_no_worker_with_one_gpu_and_a_half() -> None:
    assert workers_that_fit(_idle((8, 8)), _workers(gpus=1.5), free_only=False) == 0


def test_an_elastic_group_that_ray_would_start_too_large_is_not_opened() -> None:
    elastic = ScalingSpec(num_workers=(2, 6), gpus_per_worker=0.6)

    assert groups_that_fit(_idle((8, 2), (8, 2)), elastic, wanted=4) == 0
    assert groups_that_fit(_idle((8, 1), (8, 1)), elastic, wanted=4) == 1


def test_no_more_groups_are_opened_than_trial_actors_find_memory() -> None:
    nodes = Capacity(tuple(Node(4, 0, 4, 0, free_memory_bytes=free) for free in (99, 100, 250)))

    assert groups_that_fit(nodes, _workers(), wanted=100) == 12
    assert groups_that_fit(nodes, _workers(), wanted=100, trial_actor_bytes=100) == 3
    assert groups_that_fit(nodes, _workers(), wanted=100, trial_actor_bytes=251) == 0


def test_a_bundle_of_nothing_fits_any_number_of_times() -> None:
    assert bundles_that_fit(_idle((0, 0)), Bundle(0, 0), free_only=True) > 10**6


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2)])
def test_cuda_visible_devices_says_how_many_gpus_this_machine_lends(
    visible: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_capacity().gpus == count


def test_replicas_are_named_as_ray_names_them() -> None:
    from ray.serve._private.common import REPLICA_ID_FULL_ID_STR_PREFIX

    assert REPLICA_PREFIX == REPLICA_ID_FULL_ID_STR_PREFIX
