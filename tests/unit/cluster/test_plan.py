from __future__ import annotations

import json
from typing import Any

import pytest

from bigray.cluster.capacity import Capacity, Node
from bigray.cluster.plan import Plan, ServeNeeds, make_plan
from bigray.errors import CapacityError
from bigray.specs import JobSpec

ROWS = {"train": 70, "validation": 15, "holdout": 15}
FOUR_CPUS = Capacity((Node(4, 0, 4, 0),))


def _plan(
    scaling: dict[str, Any],
    capacity: Capacity = FOUR_CPUS,
    num_trials: int = 24,
    serve: ServeNeeds | None = None,
    **sizes: int,
) -> Plan:
    job = JobSpec.model_validate(
        {
            "name": "digits",
            "data": {"source": "rows.csv", "target": "label"},
            "models": {"mlp": {"factory": "bigray.models:mlp"}, "cnn": {"factory": "bigray.models:cnn"}},
            "training": {"task": "classification"},
            "scaling": scaling,
        }
    )
    return make_plan(job, num_trials, ROWS, capacity, serve, **sizes)


def _faults(
    scaling: dict[str, Any], capacity: Capacity = FOUR_CPUS, serve: ServeNeeds | None = None, **sizes: int
) -> tuple[str, ...]:
    with pytest.raises(CapacityError) as caught:
        _plan(scaling, capacity, serve=serve, **sizes)
    return caught.value.faults


def test_a_plan_holds_what_would_run() -> None:
    plan = _plan({"num_workers": 2})

    assert (plan.groups, plan.workers_per_group, plan.trials, plan.trials_at_once) == (2, 2, 24, 2)
    assert (plan.cpus, plan.gpus, plan.backend) == (4, 0, "gloo")
    assert (plan.models, plan.rows) == (("mlp", "cnn"), ROWS)
    assert (plan.cluster_cpus, plan.cluster_gpus, plan.cluster_nodes) == (4, 0, 1)


def test_no_more_is_held_than_the_trials_need() -> None:
    assert _plan({"num_workers": 1}, num_trials=1).cpus == 1


def test_gpu_workers_talk_over_nccl() -> None:
    plan = _plan({"num_workers": 2, "gpus_per_worker": 1}, Capacity((Node(8, 2, 8, 2),)))

    assert (plan.backend, plan.groups, plan.gpus) == ("nccl", 1, 2)


def test_a_plan_is_a_json_document() -> None:
    plan = _plan({}, serve=ServeNeeds(1, 2, 0.5, 0))

    assert json.loads(json.dumps(plan.to_json()))["serve"]["max_replicas"] == 2


def test_what_can_never_fit_is_told_with_both_numbers_and_the_nearest_fit() -> None:
    assert _faults({"num_workers": 5}) == (
        "scaling.num_workers: 5 workers x 1 CPU need 5 CPUs, but the cluster has 4 CPUs and 0 GPUs on 1 node; "
        "the most that fits is num_workers = 4",
    )


def test_gpus_that_are_not_there_are_told() -> None:
    (fault,) = _faults({"num_workers": 2, "gpus_per_worker": 1})

    assert "2 workers x 1 CPU + 1 GPU need 2 CPUs and 2 GPUs, but the cluster has 4 CPUs and 0 GPUs" in fault
    assert fault.endswith("not one worker of this size fits on any node")


def test_a_busy_cluster_is_told_apart_from_a_small_one() -> None:
    (fault,) = _faults({"num_workers": 3}, Capacity((Node(4, 0, 1, 0), Node(4, 0, 1, 0))))

    assert "need 3 CPUs, but only 2 CPUs and 0 GPUs are free of 8 CPUs and 0 GPUs on 2 nodes" in fault
    assert "num_workers = 2 would start now" in fault


def test_a_full_cluster_says_to_wait() -> None:
    (fault,) = _faults({"num_workers": 1}, Capacity((Node(4, 0, 0, 0),)))

    assert fault.endswith("num_workers = 0 would start now (none): wait, or end what runs there")


def test_an_endpoint_that_cannot_fit_is_told_before_training() -> None:
    (fault,) = _faults({}, serve=ServeNeeds(min_replicas=5, max_replicas=8, cpus_per_replica=1, gpus_per_replica=0))

    assert fault == (
        "serve: 5 replicas x 1 CPU, 0 GPU, but the cluster has 4 CPUs and 0 GPUs on 1 node; "
        "the most that fits is 4 replicas"
    )


def test_an_endpoint_only_has_to_fit_by_itself_and_at_its_floor() -> None:
    needs = ServeNeeds(min_replicas=4, max_replicas=100, cpus_per_replica=1, gpus_per_replica=0)

    assert _plan({"num_workers": 4}, serve=needs).serve == needs


def test_the_faults_of_training_and_serving_are_told_together() -> None:
    assert len(_faults({"num_workers": 9}, serve=ServeNeeds(9, 9, 1, 0))) == 2


MIB = 2**20


def _with_memory(cpus: float, memory_mib: float, store_mib: float = 1000, *, has_driver: bool = False) -> Node:
    return Node(
        cpus, 0, cpus, 0, free_memory_bytes=memory_mib * MIB, object_store_bytes=store_mib * MIB, has_driver=has_driver
    )


def test_a_sweep_whose_trial_actors_find_no_memory_is_refused() -> None:
    (fault,) = _faults({}, Capacity((_with_memory(4, 63), _with_memory(4, 10))), trial_actor_bytes=64 * MIB)

    assert fault == (
        "memory: a Tune trial's actor asks Ray for 64.0 MiB, but no node has more than 63.0 MiB of its memory resource "
        "free: wait, or end what runs there"
    )


def test_no_group_is_opened_that_no_trial_actor_could_use() -> None:
    assert _plan({}, Capacity((_with_memory(4, 130),)), trial_actor_bytes=64 * MIB).groups == 2


def test_a_run_without_tune_needs_no_memory_for_it() -> None:
    assert _plan({}, Capacity((_with_memory(4, 0),))).groups == 4


def test_data_larger_than_an_object_store_is_refused_with_both_numbers() -> None:
    capacity = Capacity((_with_memory(4, 100), _with_memory(4, 100, store_mib=300), _with_memory(0, 100, store_mib=1)))
    (fault,) = _faults({}, capacity, data_bytes=400 * MIB)

    assert fault == (
        "data: the training arrays have 400.0 MiB, but the object store of 1 of 3 nodes holds less, the smallest "
        f"300.0 MiB; start Ray there with --object-store-memory={400 * MIB} or more, or use fewer rows"
    )
    assert _plan({}, capacity, data_bytes=300 * MIB).groups == 8


def test_the_driver_s_node_holds_the_data_also_where_it_has_no_worker() -> None:
    head = _with_memory(0, 100, store_mib=100, has_driver=True)

    assert len(_faults({}, Capacity((head, _with_memory(4, 100))), data_bytes=200 * MIB)) == 1


def test_what_others_hold_is_not_counted_on_for_the_endpoint() -> None:
    busy = Capacity((Node(4, 0, 2, 0),))
    (fault,) = _faults({}, busy, serve=ServeNeeds(3, 3, 1, 0))

    assert fault == (
        "serve: 3 replicas x 1 CPU, 0 GPU, but only 2 CPUs and 0 GPUs are free of 4 CPUs and 0 GPUs on 1 node; "
        "2 replicas would start: wait, or end what runs there"
    )
    assert _plan({}, busy, serve=ServeNeeds(2, 3, 1, 0)).groups == 2


def test_the_replicas_that_run_already_are_taken_over_by_the_new_endpoint() -> None:
    serving = Capacity((Node(4, 0, 2, 0, replicas=2),))

    assert _plan({}, serving, serve=ServeNeeds(4, 4, 1, 0)).groups == 2
    assert (
        "and 2 replicas run already"
        in _faults({}, Capacity((Node(4, 0, 1, 0, replicas=2),)), ServeNeeds(4, 4, 1, 0))[0]
    )


def test_replicas_without_cpus_fit_anywhere() -> None:
    assert _plan({}, serve=ServeNeeds(1000, 1000, 0, 0)).groups == 4


@pytest.mark.parametrize(
    ("scaling", "fault"),
    [
        ({"gpus_per_worker": 1.5}, "scaling.gpus_per_worker: 1.5: more than one GPU must be whole ones; use 2"),
        ({"gpus_per_worker": 0.00005}, "scaling.gpus_per_worker: 5e-05 is too small, Ray counts steps of 0.0001"),
        ({"cpus_per_worker": 0.00005}, "scaling.cpus_per_worker: 5e-05 is too small, Ray counts steps of 0.0001"),
    ],
)
def test_what_ray_cannot_count_is_refused_on_any_cluster(scaling: dict[str, Any], fault: str) -> None:
    assert _faults(scaling, Capacity((Node(64, 8, 64, 8),))) == (fault,)


def test_a_share_that_ray_would_place_for_ever_comes_with_one_that_fits() -> None:
    two_and_two = Capacity((Node(8, 2, 8, 2), Node(8, 2, 8, 2)))
    (fault,) = _faults({"num_workers": 3, "gpus_per_worker": 0.4}, Capacity((Node(8, 1, 8, 1),)))
    assert "safely" not in fault  # of three with 0.4 or 0.5 one GPU holds two
    (fault,) = _faults({"num_workers": 4, "gpus_per_worker": 0.3}, Capacity((Node(1, 0, 1, 0), Node(1, 1, 1, 1))))
    assert "safely" not in fault
    (fault,) = _faults({"num_workers": 4, "gpus_per_worker": 0.6}, two_and_two)

    assert fault.endswith("Ray cannot place shares of 0.6 over several GPUs safely, gpus_per_worker = 1 would fit")
    assert _plan({"num_workers": 4, "gpus_per_worker": 1}, two_and_two).groups == 1


def test_an_elastic_group_that_ray_would_start_too_large_is_refused() -> None:
    two_and_two = Capacity((Node(8, 2, 8, 2), Node(8, 2, 8, 2)))
    (fault,) = _faults({"num_workers": [1, 6], "gpus_per_worker": 0.6}, two_and_two)

    assert fault == (
        "scaling.num_workers: an elastic group would ask Ray for 6 workers, but only 2 surely find a place; "
        "num_workers = [1, 2] would"
    )
    assert _plan({"num_workers": [1, 2], "gpus_per_worker": 0.6}, two_and_two).groups == 1


def test_what_surely_fits_now_is_not_refused_for_what_ray_would_do_on_an_empty_cluster() -> None:
    """Empty, the second node looks as if it had room for 3 workers of 0.6; now its CPUs end at the 2 that it holds."""
    busy = Capacity((Node(8, 1, 8, 1), Node(2, 2, 1.5, 2)))

    assert _plan({"num_workers": 3, "cpus_per_worker": 0.57, "gpus_per_worker": 0.6}, busy).groups == 1
