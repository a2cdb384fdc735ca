from __future__ import annotations

import numpy as np
import pytest

from bigray.cluster.capacity import Capacity, Node, groups_that_fit, local_capacity, workers_that_fit
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


class _Machine:
    """Resources in whole steps of 1e-4, and each GPU by itself, as Ray counts them."""

    def __init__(self, node: Node) -> None:
        self.cpus = round(node.free_cpus * 10_000)
        self.gpus = [10_000] * int(node.free_gpus)

    def place(self, scaling: ScalingSpec) -> bool:
        cpus, gpus = round(scaling.cpus_per_worker * 10_000), round(scaling.gpus_per_worker * 10_000)
        chosen = self._choose_gpus(gpus)
        if self.cpus < cpus or chosen is None:
            return False
        self.cpus -= cpus
        for index in chosen:
            self.gpus[index] -= min(gpus, 10_000)
        return True

    def _choose_gpus(self, gpus: int) -> list[int] | None:
        count, each = max(1, gpus // 10_000), min(gpus, 10_000)
        if gpus == 0:
            return []
        fitting = [index for index, free in enumerate(self.gpus) if free >= each]
        return fitting[:count] if len(fitting) >= count else None


def _random_case(generator: np.random.Generator) -> tuple[Capacity, ScalingSpec]:
    nodes = [
        (float(generator.choice([0, 1, 2.5, 4, 7, 16])), float(generator.choice([0, 0, 1, 2, 8])))
        for _ in range(generator.integers(1, 5))
    ]
    scaling = _workers(
        num_workers=int(generator.integers(1, 5)),
        cpus=float(generator.choice([0.1, 0.3, 0.5, 1, 1.5, 2, 3])),
        gpus=float(generator.choice([0, 0, 0.1, 0.3, 0.5, 0.6, 1, 2])),
    )
    return _idle(*nodes), scaling


def test_as_many_groups_as_are_counted_find_a_place_and_no_more() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        capacity, scaling = _random_case(generator)
        machines = [_Machine(node) for node in capacity.nodes]
        placed = 0
        while any(machine.place(scaling) for machine in machines):
            placed += 1

        assert groups_that_fit(capacity, scaling, wanted=1000) == placed // scaling.num_workers, (capacity, scaling)


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2)])
def test_cuda_visible_devices_says_how_many_gpus_this_machine_lends(
    visible: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_capacity().gpus == count
