"""What a job would start, and whether the cluster can hold it: decided here, started elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bigray.cluster.capacity import Capacity, groups_that_fit, workers_that_fit
from bigray.errors import CapacityError
from bigray.specs import JobSpec, ScalingSpec


@dataclass(frozen=True)
class ServeNeeds:
    """What the endpoint holds at its floor and at its ceiling."""

    min_replicas: int
    max_replicas: int
    cpus_per_replica: float
    gpus_per_replica: float


@dataclass(frozen=True)
class Plan:
    """What would run. `groups` of them train at once; each has `workers_per_group` workers."""

    job: str
    models: tuple[str, ...]
    storage: str
    rows: dict[str, int]
    """train, validation, holdout."""
    trials: int
    trials_at_once: int
    groups: int
    workers_per_group: int
    cpus: float
    """Held while training, over all groups."""
    gpus: float
    backend: str
    cluster_cpus: float
    cluster_gpus: float
    cluster_nodes: int
    serve: ServeNeeds | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    job: JobSpec, num_trials: int, rows: dict[str, int], capacity: Capacity, serve: ServeNeeds | None = None
) -> Plan:
    """Fit a job to a cluster.

    Raises:
        CapacityError: it does not fit; with the numbers and the nearest thing that would.
    """
    faults = [*_training_faults(job.scaling, capacity), *(_serve_faults(serve, capacity) if serve else [])]
    if faults:
        raise CapacityError(faults)
    groups = groups_that_fit(capacity, job.scaling, num_trials)
    a_group = min(job.scaling.max_workers, workers_that_fit(capacity, job.scaling, free_only=True))
    workers = groups * a_group
    return Plan(
        job=job.name,
        models=tuple(job.models),
        storage=job.storage,
        rows=rows,
        trials=num_trials,
        trials_at_once=groups,
        groups=groups,
        workers_per_group=a_group,
        cpus=workers * job.scaling.cpus_per_worker,
        gpus=workers * job.scaling.gpus_per_worker,
        backend="nccl" if job.scaling.gpus_per_worker else "gloo",
        cluster_cpus=capacity.cpus,
        cluster_gpus=capacity.gpus,
        cluster_nodes=len(capacity.nodes),
        serve=serve,
    )


def _training_faults(scaling: ScalingSpec, capacity: Capacity) -> list[str]:
    asked = _describe(scaling)
    ever = workers_that_fit(capacity, scaling, free_only=False)
    if ever < scaling.min_workers:
        nearest = (
            f"the most that fits is num_workers = {ever}" if ever else "not one worker of this size fits on any node"
        )
        return [f"scaling.num_workers: {asked}, but the cluster has {_cluster(capacity)}; {nearest}"]
    now = workers_that_fit(capacity, scaling, free_only=True)
    if now < scaling.min_workers:
        free = f"{capacity.free_cpus:g} CPUs and {capacity.free_gpus:g} GPUs are free"
        return [
            f"scaling.num_workers: {asked}, but only {free} of {_cluster(capacity)}; "
            f"num_workers = {now} would start now" + ("" if now else " (none): wait, or end what runs there")
        ]
    return []


def _serve_faults(serve: ServeNeeds, capacity: Capacity) -> list[str]:
    # training has ended when the endpoint starts, so it only has to fit by itself
    size = ScalingSpec(
        num_workers=max(1, serve.min_replicas),
        cpus_per_worker=max(serve.cpus_per_replica, 1e-3),
        gpus_per_worker=serve.gpus_per_replica,
    )
    fit = workers_that_fit(capacity, size, free_only=False)
    if fit >= size.min_workers:
        return []
    return [
        f"serve: {size.min_workers} replicas x {serve.cpus_per_replica:g} CPU, {serve.gpus_per_replica:g} GPU, "
        f"but the cluster has {_cluster(capacity)}; the most that fits is {fit} replicas"
    ]


def _describe(scaling: ScalingSpec) -> str:
    least = scaling.min_workers
    text = f"{'at least ' if scaling.is_elastic else ''}{least} workers x {scaling.cpus_per_worker:g} CPU"
    if scaling.gpus_per_worker:
        text += f" + {scaling.gpus_per_worker:g} GPU"
    needs = f"{least * scaling.cpus_per_worker:g} CPUs"
    if scaling.gpus_per_worker:
        needs += f" and {least * scaling.gpus_per_worker:g} GPUs"
    return f"{text} need {needs}"


def _cluster(capacity: Capacity) -> str:
    nodes = f"{len(capacity.nodes)} node" + ("s" if len(capacity.nodes) != 1 else "")
    return f"{capacity.cpus:g} CPUs and {capacity.gpus:g} GPUs on {nodes}"
