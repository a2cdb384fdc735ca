"""Plans against Ray's own placement, on a cluster of raylets with CPUs and GPUs that this machine does not have."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from bigray.cluster.capacity import connected_capacity
from bigray.cluster.plan import LEG_ACTOR_BYTES, Plan, make_plan
from bigray.errors import CapacityError
from bigray.specs import JobSpec
from tests.full_size import IS_FULL
from tests.integration.raylets import ray_cluster
from tests.waiting import wait_until

EXAMPLES = 30 if IS_FULL else 6
ROWS = {"train": 70, "validation": 15, "holdout": 15}
READY_TIMEOUT_S = 30.0
REFUSED_FOR_S = 1.0
"""What fits is placed within hundredths of a second."""


@dataclass(frozen=True)
class Machine:
    cpus: int
    gpus: int
    memory_bytes: int


MACHINES = (Machine(4, 2, 3 * LEG_ACTOR_BYTES), Machine(2, 1, LEG_ACTOR_BYTES), Machine(3, 2, 2**30))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that only has the driver, and three nodes."""
    nodes = [{"num_cpus": node.cpus, "num_gpus": node.gpus, "memory": node.memory_bytes} for node in MACHINES]
    with ray_cluster({"num_cpus": 0, "memory": 0}, *nodes) as started:
        yield started


def make_job(workers: int, cpus: float, gpus: float) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "digits",
            "data": {"source": "rows.csv", "target": "label"},
            "models": {"mlp": {"factory": "bigray.models:mlp"}},
            "training": {"task": "classification"},
            "scaling": {"num_workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus},
        }
    )


def plan_of(job: JobSpec, trials: int) -> Plan | None:
    try:
        return make_plan(job, trials, ROWS, connected_capacity(), trial_actor_bytes=LEG_ACTOR_BYTES)
    except CapacityError:
        return None


def start(job: JobSpec) -> Any:
    """One group's places."""
    from ray.util.placement_group import placement_group

    scaling = job.scaling
    bundle = {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {})
    return placement_group([bundle] * scaling.min_workers, strategy="PACK")


def run(plan: Plan, job: JobSpec) -> None:
    """All groups with their workers, the switchboard, and every trial on its own actor's memory. Gives all back."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=0)
    class Switchboard:
        def ask(self) -> bool:
            return True

    @ray.remote
    def work() -> bool:
        return True

    switchboard = Switchboard.remote()
    groups = [start(job) for _ in range(plan.groups)]
    actors = [placement_group([{"memory": LEG_ACTOR_BYTES}]) for _ in range(plan.groups)]
    assert all(place.wait(READY_TIMEOUT_S) for place in [*groups, *actors]), "a place never becomes ready"
    scaling = job.scaling
    trials = [
        work.options(
            num_cpus=scaling.cpus_per_worker,
            num_gpus=scaling.gpus_per_worker,
            scheduling_strategy=PlacementGroupSchedulingStrategy(groups[trial % len(groups)], bundle),
        ).remote()
        for trial in range(plan.trials)
        for bundle in range(scaling.min_workers)
    ]
    assert all(ray.get([switchboard.ask.remote(), *trials], timeout=READY_TIMEOUT_S))
    ray.kill(switchboard)
    for place in (*groups, *actors):
        remove_placement_group(place)


def jobs(seed: int) -> list[tuple[JobSpec, int]]:
    """Named ones first, then drawn ones."""
    draw = random.Random(seed)
    named = [
        (make_job(3, 0.1, 0.6), 2),  # refused: Ray puts all three on a node of two GPUs, for ever
        (make_job(2, 0.3334, 0.25), 6),
        (make_job(1, 0.50009, 0.0), 18),  # in Ray's steps 0.5
    ]
    drawn = [
        (
            make_job(
                draw.choice([1, 1, 2, 3, 4]),
                draw.choice([0.1, 0.3, 0.57, 1.0, 1.5, 2.0]),
                draw.choice([0.0, 0.0, 0.3, 0.5, 0.6, 1.0, 2.0]),
            ),
            draw.randint(1, 8),
        )
        for _ in range(EXAMPLES - len(named))
    ]
    return [*named, *drawn]


def test_ray_places_what_is_planned_and_has_no_place_for_what_is_refused(cluster: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    idle = connected_capacity()
    found = sorted((node.cpus, node.gpus) for node in idle.nodes if not node.has_driver)
    assert found == sorted((machine.cpus, machine.gpus) for machine in MACHINES)
    outcomes = []
    for job, trials in jobs(seed=0):
        if (plan := plan_of(job, trials)) is not None:
            run(plan, job)
        else:
            place = start(job)
            assert not place.wait(REFUSED_FOR_S), f"{job.scaling} was refused, but has a place"
            remove_placement_group(place)
        outcomes.append("refused" if plan is None else "run")
        wait_until(lambda: connected_capacity() == idle, "places are not given back", timeout_s=READY_TIMEOUT_S)

    assert {"refused", "run"} <= set(outcomes)


def test_what_serve_or_anybody_holds_now_is_seen(cluster: Any) -> None:
    import ray

    class Replica:
        def ready(self) -> bool:
            return True

    idle = connected_capacity("default")
    name = "SERVE_REPLICA::default#Model#abc"
    held = ray.remote(Replica).options(num_cpus=1.5, name=name, namespace="serve", lifetime="detached").remote()
    assert ray.get(held.ready.remote())
    busy = connected_capacity("default")
    of_another = connected_capacity("default2")

    assert (busy.replicas, idle.replicas) == (1, 0)
    assert connected_capacity().replicas == 1
    assert (of_another.replicas, of_another.free_cpus) == (0, busy.free_cpus)  # it has to find places of its own
    assert busy.free_cpus == idle.free_cpus - 1.5
    assert [node.has_driver for node in busy.nodes].count(True) == 1
    ray.kill(held)
    wait_until(lambda: connected_capacity() == idle, "places are not given back", timeout_s=READY_TIMEOUT_S)
