from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bigray.cluster.capacity import Capacity, Node
from bigray.cluster.growth import Growth, find_config, grown, read_settings
from bigray.cluster.plan import Plan, make_plan
from bigray.errors import CapacityError
from bigray.specs import JobSpec

HEAD = Capacity((Node(0, 0, 0, 0, has_driver=True, name="head"),))
SMALL, LARGE = {"resources": {"CPU": 2}, "max_workers": 3}, {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 1}


def _growth(most: int, **kinds: Mapping[str, Any]) -> Growth:
    head = {"resources": {"CPU": 1}, "max_workers": 0}
    return Growth.from_config(
        {"max_workers": most, "head_node_type": "head", "available_node_types": {"head": head, **kinds}}
    )


def _added(growth: Growth, **up: int) -> list[tuple[float, float]]:
    return [(node.free_cpus, node.free_gpus) for node in grown(HEAD, growth, up).nodes if node.is_new]


def test_every_node_that_may_come_is_counted_beside_those_that_are_up() -> None:
    capacity = grown(HEAD, _growth(4, small=SMALL, large=LARGE), {})

    assert (len(capacity.nodes), capacity.free_cpus, capacity.free_gpus) == (5, 14, 4)
    assert capacity.nodes[0] == HEAD.nodes[0]
    assert capacity.can_grow and not HEAD.can_grow


@pytest.mark.parametrize(
    ("most", "up", "expected"),
    [
        (2, {}, [(8, 4), (2, 0)]),  # no more of all kinds than the file allows
        (4, {"small": 2}, [(8, 4), (2, 0)]),
        (4, {"small": 3, "large": 1}, []),
        (4, {"": 3}, [(8, 4)]),  # of a kind that is not known
        (2, {"": 5}, []),  # nodes that joined by themselves
        (0, {}, []),
    ],
)
def test_nodes_that_are_up_are_not_counted_again(
    most: int, up: dict[str, int], expected: list[tuple[float, float]]
) -> None:
    assert _added(_growth(most, small=SMALL, large=LARGE), **up) == expected


def test_what_the_file_leaves_out_is_as_ray_completes_it() -> None:
    growth = Growth.from_config(
        {
            "max_workers": 2,
            "head_node_type": "head",
            "available_node_types": {"head": {"resources": {"CPU": 4}}, "other": {"resources": {"CPU": 1}}},
        }
    )
    assert [kind.most for kind in growth.node_types] == [0, 2]


def test_a_kind_that_does_not_tell_its_size_adds_nothing() -> None:
    assert _added(_growth(3, unknown={"resources": {}, "max_workers": 3})) == []


def test_memory_that_the_autoscaler_is_not_told_of_is_not_counted() -> None:
    told = {"resources": {"CPU": 1, "memory": 2**30}, "max_workers": 1}
    silent = {"resources": {"CPU": 1}, "max_workers": 1}
    memory = [node.free_memory_bytes for node in grown(HEAD, _growth(2, told=told, silent=silent), {}).nodes[1:]]

    assert memory == [2**30, 0]


def test_the_type_of_the_gpus_is_known_before_they_are_there() -> None:
    kind = {**LARGE, "labels": {"ray.io/accelerator-type": "A100"}}

    assert grown(HEAD, _growth(1, large=kind), {}).gpus_by_type == {"A100": 4}


def _plan(num_workers: int, growth: Growth, num_trials: int = 24) -> Plan:
    job = JobSpec.model_validate(
        {
            "name": "digits",
            "data": {"source": "rows.csv", "target": "label"},
            "models": {"mlp": {"factory": "bigray.models:mlp"}},
            "training": {"task": "classification"},
            "scaling": {"num_workers": num_workers},
        }
    )
    return make_plan(job, num_trials, {"train": 1}, grown(HEAD, growth, {}))


def test_a_job_is_planned_on_nodes_that_are_not_there_yet() -> None:
    plan = _plan(2, _growth(3, small=SMALL))

    assert (plan.groups, plan.workers_per_group, plan.new_nodes, plan.can_grow) == (3, 2, 3, True)
    assert plan.nodes[1].name == "small (to be added)"
    assert plan.notes == ("3 of the 4 nodes are not there yet: the autoscaler adds those that are needed",)


def test_a_job_that_not_even_all_of_them_can_hold_is_refused() -> None:
    with pytest.raises(CapacityError) as caught:
        _plan(7, _growth(3, small=SMALL))

    (fault,) = caught.value.faults
    assert "but the cluster has 6 CPUs and 0 GPUs on 4 nodes, with the 3 that its autoscaler may add" in fault
    assert fault.endswith("the most that fits is num_workers = 6")


def test_the_file_of_this_cluster_s_autoscaler_is_found_among_what_runs() -> None:
    monitor = ["python", "-u", "autoscaler/v2/monitor.py", "--logs-dir=/tmp/logs"]
    running = [
        ["bash"],
        [*monitor, "--gcs-address=10.0.0.9:6379", "--autoscaling-config=other.yaml"],
        [*monitor, "--gcs-address=10.0.0.1:6379", "--autoscaling-config=~/mine.yaml"],
    ]
    assert find_config(running, "10.0.0.1:6379") == "~/mine.yaml"
    assert find_config(running, "10.0.0.2:6379") is None


def test_an_autoscaler_without_a_file_starts_no_nodes() -> None:
    assert find_config([["python", "monitor.py", "--gcs-address=10.0.0.1:6379"]], "10.0.0.1:6379") is None


def test_only_what_is_needed_is_read_of_a_file_that_may_hold_secrets(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("provider: {type: aws, key: hidden}\nmax_workers: 3\navailable_node_types: {small: {}}\n")

    assert read_settings(file) == {"max_workers": 3, "available_node_types": {"small": {}}}


@pytest.mark.parametrize("text", [None, "a: [", "just words"])
def test_a_file_that_cannot_be_read_tells_of_no_nodes(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text)

    assert read_settings(file) is None
