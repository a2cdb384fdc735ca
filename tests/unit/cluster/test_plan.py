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
    scaling: dict[str, Any], capacity: Capacity = FOUR_CPUS, num_trials: int = 24, serve: ServeNeeds | None = None
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
    return make_plan(job, num_trials, ROWS, capacity, serve)


def _faults(
    scaling: dict[str, Any], capacity: Capacity = FOUR_CPUS, serve: ServeNeeds | None = None
) -> tuple[str, ...]:
    with pytest.raises(CapacityError) as caught:
        _plan(scaling, capacity, serve=serve)
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
