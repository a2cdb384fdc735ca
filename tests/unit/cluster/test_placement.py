from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bigray.cluster.capacity import (
    Bundle,
    Capacity,
    Node,
    accelerator_of,
    groups_that_fit,
    units,
    workers_of_a_group,
)
from bigray.cluster.placement import NodePlan, place, replicas_beside
from bigray.cluster.plan import Footprint, Plan, ServeNeeds, make_plan
from bigray.errors import CapacityError
from bigray.plan_view import facts, nodes_table, workers_text
from bigray.specs import JobSpec, ScalingSpec

MIB = 2**20


def _node(cpus: float, gpus: float = 0, accelerator: str = "", replicas: int = 0, name: str = "") -> Node:
    return Node(cpus, gpus, cpus, gpus, replicas=replicas, name=name, accelerator=accelerator)


def _job(training: dict[str, Any] | None = None, **scaling: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "digits",
            "data": {"source": "rows.csv", "target": "label"},
            "models": {"mlp": {"factory": "bigray.models:mlp"}},
            "training": {"task": "classification", **(training or {})},
            "scaling": scaling,
        }
    )


def _plan(
    job: JobSpec,
    *nodes: Node,
    trials: int = 8,
    serve: ServeNeeds | None = None,
    footprint: Footprint | None = None,
    trial_actor_bytes: int = 0,
) -> Plan:
    rows = {"train": 70, "validation": 15, "holdout": 15}
    return make_plan(
        job, trials, rows, Capacity(nodes), serve, footprint=footprint, trial_actor_bytes=trial_actor_bytes
    )


def _workers(nodes: tuple[NodePlan, ...]) -> list[dict[str, int]]:
    return [node.workers for node in nodes]


def test_a_group_is_packed_and_groups_are_spread() -> None:
    plan = _plan(_job(num_workers=2), _node(4), _node(4), _node(1), trials=2)

    assert _workers(plan.nodes) == [{"1": 2}, {"2": 2}, {}]
    assert [node.free_cpus for node in plan.nodes] == [2, 2, 1]


def test_a_group_that_no_node_holds_alone_is_on_the_fewest() -> None:
    plan = _plan(_job(num_workers=5), _node(2), _node(3), _node(2), trials=1)

    assert _workers(plan.nodes) == [{"1": 2}, {"1": 3}, {}]


def test_shares_of_a_gpu_are_taken_where_the_least_is_left() -> None:
    node = Node(8, 2, 8, 1.5, free_gpu_shares=(1.0, 0.5))
    (placed,) = place(Capacity((node,)), Bundle(1, 0.5), 1, 2, None, 0)

    assert placed.workers == {"1": 2}
    assert placed.free_gpus == 0.5


def test_the_endpoint_s_floor_is_placed_as_if_the_groups_had_ended() -> None:
    serve = ServeNeeds(3, 5, 1, 0)
    plan = _plan(_job(num_workers=4), _node(2), _node(2, replicas=0), trials=1, serve=serve)

    assert [node.replicas for node in plan.nodes] == [2, 1]
    assert plan.replicas_beside_training == 0


def test_replicas_that_run_already_are_kept_where_they_are() -> None:
    serving = Node(4, 0, 3, 0, replicas=1)
    plan = _plan(_job(num_workers=2), _node(2), serving, trials=1, serve=ServeNeeds(2, 2, 1, 0))

    assert [node.replicas for node in plan.nodes] == [1, 1]
    assert plan.replicas_beside_training == 2


def test_gpus_are_counted_by_their_type_and_a_mixed_group_is_told() -> None:
    job = _job(num_workers=3, gpus_per_worker=1)
    plan = _plan(job, _node(8, 2, "A100"), _node(8, 2, "T4"), _node(8), trials=1)

    assert plan.gpus_by_type == {"A100": 2, "T4": 2}
    assert plan.notes == ("group 1 would have GPUs of several types, A100, T4: the slowest sets its pace",)
    assert ("GPUs", "2 A100, 2 T4") in facts(plan)


@pytest.mark.parametrize(
    ("labels", "resources", "expected"),
    [
        ({"ray.io/accelerator-type": "A100"}, {"GPU": 1.0, "accelerator_type:T4": 1.0}, "A100"),
        ({}, {"GPU": 1.0, "accelerator_type:T4": 1.0}, "T4"),
        ({"ray.io/node-id": "x"}, {"CPU": 1.0}, ""),
    ],
)
def test_the_type_of_a_gpu_is_that_of_its_label(
    labels: dict[str, str], resources: dict[str, float], expected: str
) -> None:
    assert accelerator_of(labels, resources) == expected


def test_checkpoints_that_the_disk_cannot_hold_are_refused_with_what_would() -> None:
    footprint = Footprint(checkpoint_bytes=100 * MIB, storage_free_bytes=1050 * MIB)
    with pytest.raises(CapacityError) as caught:
        _plan(_job(), _node(2), footprint=footprint)

    (fault,) = caught.value.faults
    assert fault == (
        "storage: 18 checkpoints of 100.0 MiB take up to 1,800.0 MiB, but runs has 1,050.0 MiB free; "
        "training.keep.last = 1 would fit"
    )
    assert _plan(_job({"keep": {"last": 1}}), _node(2), footprint=footprint).checkpoints_bytes == 1000 * MIB


def test_of_a_sweep_only_the_best_and_those_that_run_keep_checkpoints() -> None:
    footprint = Footprint(checkpoint_bytes=MIB, storage_free_bytes=None)
    plan = _plan(_job(), _node(2), trials=1000, footprint=footprint, trial_actor_bytes=1)

    assert plan.checkpoints_bytes == ((1 + 2) * 2 + 2) * MIB


def test_a_disk_too_small_for_one_checkpoint_is_told() -> None:
    with pytest.raises(CapacityError, match="not one fits there"):
        _plan(_job(), _node(1), trials=1, footprint=Footprint(100 * MIB, MIB))


def test_a_worker_with_more_cpus_than_a_node_comes_with_the_most_that_one_may_have() -> None:
    with pytest.raises(CapacityError) as caught:
        _plan(_job(num_workers=2, cpus_per_worker=8), _node(4), _node(4))

    assert caught.value.faults[0].endswith(
        "with cpus_per_worker = 4, num_workers = 2 would fit, but not one worker of this size fits on any node"
    )


def test_a_plan_of_a_thousand_nodes_has_a_line_for_each_of_the_first() -> None:
    plan = _plan(_job(num_workers=3), *(_node(4, name=f"host-{number}") for number in range(1000)), trials=5000)

    table = nodes_table(plan)
    assert plan.groups == 1333
    assert sum(sum(node.workers.values()) for node in plan.nodes) == 3999
    assert table.row_count == 40
    assert table.title == "one placement that works (the first 40 of 1000 nodes)"


def test_the_workers_of_many_groups_are_told_in_short() -> None:
    assert workers_text({}) == "none"
    assert workers_text({"1": 2, "3": 1}) == "2 of group 1, 1 of group 3"
    assert workers_text({str(n): 1 for n in range(1, 8)}).endswith("1 of group 4, 3 of 3 more")


SHARES = st.sampled_from([(), (), (1.0,), (1.0, 1.0), (0.5, 1.0), (0.3,), (1.0, 1.0, 1.0, 1.0)])
nodes = st.builds(
    lambda cpus, shares, replicas: Node(cpus, len(shares), cpus, sum(shares), shares, replicas=replicas),
    st.sampled_from([0.0, 0.5, 1.0, 2.5, 4.0, 16.0]),
    SHARES,
    st.integers(0, 2),
)
worker_sizes = st.builds(
    Bundle, st.sampled_from([0.1, 0.3, 1.0, 1.5, 3.0]), st.sampled_from([0.0, 0.0, 0.25, 0.3, 0.6, 1.0, 2.0])
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(nodes, min_size=1, max_size=6), worker_sizes, st.integers(1, 5), st.integers(1, 9))
def test_what_is_called_fitting_is_placed_one_bundle_at_a_time(
    given_nodes: list[Node], size: Bundle, workers: int, trials: int
) -> None:
    capacity = Capacity(tuple(given_nodes))
    scaling = ScalingSpec(num_workers=workers, cpus_per_worker=size.cpus, gpus_per_worker=size.gpus)
    groups = groups_that_fit(capacity, scaling, trials)
    assume(groups > 0)

    placed = place(capacity, size, groups, workers_of_a_group(capacity, scaling), None, 0)

    counts = {str(group): 0 for group in range(1, groups + 1)}
    for node, before in zip(placed, capacity.nodes, strict=True):
        held = sum(node.workers.values())
        for group, count in node.workers.items():
            counts[group] += count
        assert round((before.free_cpus - node.free_cpus) * 10_000) == held * units(size.cpus)
        assert round((before.free_gpus - node.free_gpus) * 10_000) == held * units(size.gpus)
        assert node.free_cpus >= 0
        assert node.free_gpus >= 0
    assert set(counts.values()) == {workers}
    beside = replicas_beside(capacity, size, placed, Bundle(0.5, 0), capacity.replicas + 2)
    assert capacity.replicas <= beside <= capacity.replicas + 2


def test_workers_go_to_the_nodes_whose_gpus_are_of_the_type_asked_for() -> None:
    nodes = _node(8, 2, "T4"), _node(8, 2, "A100"), _node(8, 0)
    plan = _plan(_job(num_workers=2, gpus_per_worker=1, accelerator="A100"), *nodes)
    assert plan.groups == 1, "the T4 are not counted"
    assert [sum(node.workers.values()) for node in plan.nodes] == [0, 2, 0]


def test_a_type_of_gpu_that_no_node_has_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(CapacityError, match=r"accelerator is 'H100', and its GPUs are 2 x T4, 1 x an unknown type"):
        _plan(_job(num_workers=1, gpus_per_worker=1, accelerator="H100"), _node(8, 2, "T4"), _node(8, 1))


def test_workers_that_may_share_a_gpu_are_told_to_go_over_gloo() -> None:
    (note,) = _plan(_job(num_workers=2, gpus_per_worker=0.5), _node(8, 1, "T4")).notes
    assert "gloo" in note
