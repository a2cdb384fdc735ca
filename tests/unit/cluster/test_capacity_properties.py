"""Every plan against a small model of how Ray places what it starts: what is called feasible ends, in any order.

The model knows what a plan relies on: Ray's control plane chooses nodes by the sum of their resources, a placement
group goes to one node after another and takes from each what seems to fit, and a node then gives out whole steps of
1e-4 and each GPU by itself. Which node comes first is left to an adversary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from bigray.cluster.capacity import Capacity, Node
from bigray.cluster.plan import Plan, ServeNeeds, make_plan
from bigray.errors import CapacityError
from bigray.specs import JobSpec

STEPS = 10_000
TRIAL_BYTES = 64 * 2**20
ROWS = {"train": 70, "validation": 15, "holdout": 15}
Choose = Callable[[int], int]
"""The adversary: one of so many."""


@dataclass
class Machine:
    """A node that gives out resources."""

    cpus: int
    gpus: list[int]
    memory: float

    @classmethod
    def of(cls, node: Node) -> Machine:
        assert node.free_gpu_shares is not None
        gpus = [round(share * STEPS) for share in node.free_gpu_shares]
        return cls(round(node.free_cpus * STEPS), gpus, node.free_memory_bytes)

    def seems_to_fit(self, cpus: int, gpus: int) -> bool:
        return self.cpus >= cpus and sum(self.gpus) >= gpus

    def take(self, cpus: int, gpus: int) -> bool:
        """Whether the node itself could give it: whole GPUs, or a part of the one with the least that is enough."""
        if self.cpus < cpus:
            return False
        if gpus >= STEPS:
            whole = [index for index, free in enumerate(self.gpus) if free == STEPS][: gpus // STEPS]
            if len(whole) < gpus // STEPS:
                return False
            for index in whole:
                self.gpus[index] = 0
        elif gpus:
            enough = [(free, index) for index, free in enumerate(self.gpus) if free >= gpus]
            if not enough:
                return False
            self.gpus[min(enough)[1]] -= gpus
        self.cpus -= cpus
        return True


@dataclass
class Cluster:
    """Nodes, and the adversary that chooses among them."""

    machines: list[Machine]
    choose: Choose
    events: list[str] = field(default_factory=list)

    def place_group(self, workers: int, cpus: int, gpus: int) -> bool:
        """A placement group of equal bundles, PACK. False: it waits for ever, since Ray would choose the same again."""
        candidates, left = list(self.machines), workers
        while left:
            candidates = [machine for machine in candidates if machine.seems_to_fit(cpus, gpus)]
            if not candidates:
                return False
            machine = candidates.pop(self.choose(len(candidates)))
            seen = Machine(machine.cpus, [sum(machine.gpus)], 0)
            while left and seen.seems_to_fit(cpus, gpus):
                if not machine.take(cpus, gpus):
                    return False
                seen.cpus, seen.gpus = seen.cpus - cpus, [seen.gpus[0] - gpus]
                left -= 1
        return True

    def place_trial_actor(self) -> Machine | None:
        """A bundle of nothing but memory."""
        fitting = [machine for machine in self.machines if machine.memory >= TRIAL_BYTES]
        if not fitting:
            return None
        chosen = fitting[self.choose(len(fitting))]
        chosen.memory -= TRIAL_BYTES
        return chosen


def run(plan: Plan, job: JobSpec, capacity: Capacity, choose: Choose) -> None:
    """The whole job: groups, trials in any order on any free group, then the endpoint. Fails where something waits."""
    cluster = Cluster([Machine.of(node) for node in capacity.nodes], choose)
    cpus, gpus = int(job.scaling.cpus_per_worker * STEPS), int(job.scaling.gpus_per_worker * STEPS)
    worker = (job.scaling.cpus_per_worker, job.scaling.gpus_per_worker)
    assert plan.workers_per_group == min(job.scaling.max_workers, _seen(capacity, worker))
    for group in range(plan.groups):
        assert cluster.place_group(plan.workers_per_group, cpus, gpus), f"group {group} of {plan.groups} waits for ever"
    waiting, running = plan.trials, []
    while waiting or running:
        while waiting and len(running) < plan.groups:
            actor = cluster.place_trial_actor()
            assert actor is not None or running, "no trial can start, and none runs that could end"
            if actor is None:
                break
            running.append(actor)
            waiting -= 1
        assert len(running) == min(plan.groups, len(running) + waiting), "a group has nothing to do"
        running.pop(choose(len(running))).memory += TRIAL_BYTES
    if plan.serve is not None:
        cluster = Cluster([Machine.of(node) for node in capacity.nodes], choose)
        size = int(plan.serve.cpus_per_replica * STEPS), int(plan.serve.gpus_per_replica * STEPS)
        for replica in range(plan.serve.min_replicas - capacity.replicas):
            assert cluster.place_group(1, *size), f"replica {replica} waits for ever"


def can_hang(capacity: Capacity, bundle: tuple[float, float], count: int, *, of_one_group: bool) -> bool:
    """Brute force over every choice of nodes: whether one of them leaves `count` bundles waiting."""
    size = int(bundle[0] * STEPS), int(bundle[1] * STEPS)
    for order in itertools.permutations(range(len(capacity.nodes))):
        # always the first of this order that seems to have room: the worst case is to fill one node after another
        machines = [Machine.of(capacity.nodes[index]) for index in order]
        cluster = Cluster(machines, lambda _: 0)
        groups = [count] if of_one_group else [1] * count
        if not all(cluster.place_group(workers, *size) for workers in groups):
            return True
    return False


CPUS = st.sampled_from([8.0, 4.0, 2.0, 1.0, 16.0, 2.5, 0.3, 0.0, 7.9999])
HELD = st.sampled_from([0.0, 0.0, 0.0, 1.0, 0.5, 1.3, 4.0])
SHARES = st.sampled_from([(), (), (), (1,), (1, 1), (1, 1, 1, 1), (0.4,), (1, 0.5), (0.5, 0.5), (0.2, 1, 0.9), (0,)])
MEMORY = st.sampled_from([1.0, 0.0, 0.99, 2.5, 40.0, 40.0, 40.0])
REPLICAS = st.sampled_from([0, 0, 0, 1, 2])


def _node(cpus: float, held: float, shares: tuple[float, ...], memory: float, replicas: int) -> Node:
    free_cpus = max(0.0, round(cpus - held, 4))
    return Node(cpus, len(shares), free_cpus, sum(shares), shares, memory * TRIAL_BYTES, replicas=replicas)


def _job(workers: tuple[int, int], cpus: float, gpus: float) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "digits",
            "data": {"source": "rows.csv", "target": "label"},
            "models": {"mlp": {"factory": "bigray.models:mlp"}},
            "training": {"task": "classification"},
            "scaling": {
                "num_workers": workers[0] if workers[0] == workers[1] else workers,
                "cpus_per_worker": cpus,
                "gpus_per_worker": gpus,
            },
        }
    )


WORKERS = st.sampled_from([(1, 1), (2, 2), (1, 4), (2, 3), (3, 3), (4, 4), (5, 5), (2, 6)])
WORKER_CPUS = st.one_of(st.sampled_from([0.1, 0.3, 1 / 3, 0.57, 1.0, 1.5, 2.0]), st.floats(1e-4, 3))
WORKER_GPUS = st.one_of(st.just(0.0), st.sampled_from([0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 1.0, 1.5, 2.0]))
SERVE_CPUS, SERVE_GPUS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.0, 0.0, 0.4, 1.0])
nodes = st.builds(_node, CPUS, HELD, SHARES, MEMORY, REPLICAS)
jobs = st.builds(_job, WORKERS, WORKER_CPUS, WORKER_GPUS)
endpoints = st.builds(
    lambda low, cpus, gpus: ServeNeeds(low, low + 2, cpus, gpus), st.integers(0, 3), SERVE_CPUS, SERVE_GPUS
)
serves = st.one_of(st.none(), endpoints)
clusters = st.lists(nodes, min_size=1, max_size=6).map(lambda found: Capacity(tuple(found)))


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(clusters, jobs, st.integers(1, 12), serves, st.randoms(use_true_random=False))
def test_what_is_called_feasible_ends_in_any_order_and_what_is_refused_can_hang(
    capacity: Capacity, job: JobSpec, trials: int, serve: ServeNeeds | None, random: Random
) -> None:
    try:
        plan = make_plan(job, trials, ROWS, capacity, serve, trial_actor_bytes=TRIAL_BYTES)
    except CapacityError as error:
        event("refused")
        _assert_refused_rightly(error.faults, capacity, job, serve)
        return
    event("feasible")
    for choose in (random.randrange, lambda _: 0, lambda count: count - 1):
        run(plan, job, capacity, choose)
    _assert_no_group_is_missing(plan, capacity, job)


def _assert_refused_rightly(faults: Sequence[str], capacity: Capacity, job: JobSpec, serve: ServeNeeds | None) -> None:
    scaling = job.scaling
    worker = (scaling.cpus_per_worker, scaling.gpus_per_worker)
    for fault in faults:
        if fault.startswith("scaling.num_workers"):
            # an elastic group asks for all that Ray sees, up to its most
            asked = max(scaling.min_workers, min(scaling.max_workers, _seen(capacity, worker)))
            assert can_hang(capacity, worker, asked, of_one_group=True), fault
        elif fault.startswith("scaling.gpus_per_worker"):
            assert worker[1] > 1 and not worker[1].is_integer(), fault
        elif fault.startswith("memory"):
            assert all(node.free_memory_bytes < TRIAL_BYTES for node in capacity.nodes), fault
        else:
            assert fault.startswith("serve") and serve is not None, fault
            replica = (serve.cpus_per_replica, serve.gpus_per_replica)
            needed = serve.min_replicas - capacity.replicas
            assert can_hang(capacity, replica, needed, of_one_group=False), fault


def _seen(capacity: Capacity, bundle: tuple[float, float]) -> int:
    """Bundles that seem to fit, counted up to 8 a node."""
    cpus, gpus = int(bundle[0] * STEPS), int(bundle[1] * STEPS)
    machines = [Machine.of(node) for node in capacity.nodes]
    return sum(machine.seems_to_fit(cpus * n, gpus * n) for machine in machines for n in range(1, 9))


def _assert_no_group_is_missing(plan: Plan, capacity: Capacity, job: JobSpec) -> None:
    """One more group would have no trial, no trial actor, or might wait for ever."""
    actors = sum(int(node.free_memory_bytes // TRIAL_BYTES) for node in capacity.nodes)
    if plan.groups in (plan.trials, actors):
        return
    size = int(job.scaling.cpus_per_worker * STEPS), int(job.scaling.gpus_per_worker * STEPS)
    for order in itertools.permutations(range(len(capacity.nodes))):
        cluster = Cluster([Machine.of(capacity.nodes[index]) for index in order], lambda _: 0)
        placed = (cluster.place_group(job.scaling.max_workers, *size) for _ in range(plan.groups + 1))
        if not all(placed):
            return
    raise AssertionError("one more group always finds a place")
