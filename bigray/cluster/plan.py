"""What a job would start, and whether the cluster can hold it: decided here, started elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bigray.cluster.capacity import (
    Bundle,
    Capacity,
    bundles_that_fit,
    groups_that_fit,
    nodes_too_small_for,
    trial_actors_that_fit,
    workers_of_a_group,
    workers_that_fit,
    workers_that_seem_to_fit,
)
from bigray.cluster.placement import NodePlan, place, replicas_beside
from bigray.errors import CapacityError
from bigray.specs import JobSpec, KeepSpec, ScalingSpec

STEP = 1e-4
"""Ray counts resources in whole steps of this size."""


LEG_ACTOR_BYTES = 64 * 2**20
"""What the actor of a sweep's leg asks of the cluster's memory. Tune places nothing that asks for nothing, and every
CPU may be held by the groups' workers, which must never wait for the legs that wait for them."""


@dataclass(frozen=True)
class ServeNeeds:
    """What the endpoint holds at its floor and at its ceiling."""

    min_replicas: int
    max_replicas: int
    cpus_per_replica: float
    gpus_per_replica: float


@dataclass(frozen=True)
class Footprint:
    """What a run takes beside CPUs, GPUs and memory; None where it is not known."""

    checkpoint_bytes: int | None = None
    """The largest checkpoint of one trial."""
    storage_free_bytes: int | None = None
    """Of the disk the storage is on; None also of an object store, which has no end."""
    package_bytes: int | None = None
    """Of the folder that `bigray submit` would send."""


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
    nodes: tuple[NodePlan, ...] = ()
    """One placement that works, node by node."""
    gpus_by_type: dict[str, float] = field(default_factory=dict)
    """Accelerator type -> GPUs of the cluster, those of an unknown type under ""."""
    replicas_beside_training: int | None = None
    """Of the endpoint's floor; those that find a place while all groups train. None without an endpoint."""
    data_bytes: int = 0
    """Put into the object store."""
    footprint: Footprint = Footprint()
    checkpoints_bytes: int | None = None
    """On storage at once, at most."""
    notes: tuple[str, ...] = ()
    new_nodes: int = 0
    """Of `cluster_nodes` those that the autoscaler may add; they are not there yet."""
    can_grow: bool = False
    """The cluster has an autoscaler, so that a group may have to wait for a node."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    job: JobSpec,
    num_trials: int,
    rows: dict[str, int],
    capacity: Capacity,
    serve: ServeNeeds | None = None,
    *,
    data_bytes: int = 0,
    trial_actor_bytes: int = 0,
    footprint: Footprint | None = None,
) -> Plan:
    """Fit a job to a cluster.

    `data_bytes` is put into the object store once; `trial_actor_bytes` of memory is held by each Tune trial's actor
    (0: no Tune). The endpoint starts when the groups have ended. `footprint` is what has been measured.

    Raises:
        CapacityError: it does not fit; with the numbers and the nearest thing that would.
    """
    footprint = footprint or Footprint()
    faults = [
        *_training_faults(job.scaling, capacity),
        *_data_faults(data_bytes, job.scaling, capacity),
        *_trial_actor_faults(trial_actor_bytes, capacity),
        *(_serve_faults(serve, capacity) if serve else []),
    ]
    groups = groups_that_fit(capacity, job.scaling, num_trials, trial_actor_bytes=trial_actor_bytes)
    is_sweep = trial_actor_bytes > 0
    faults += _checkpoint_faults(job, num_trials, groups, footprint, is_sweep=is_sweep)
    if faults:
        raise CapacityError(faults)
    a_group = workers_of_a_group(capacity, job.scaling)
    workers = groups * a_group
    worker = Bundle.of_worker(job.scaling)
    replica = Bundle(serve.cpus_per_replica, serve.gpus_per_replica) if serve else None
    floor = serve.min_replicas if serve else 0
    most = _most_checkpoints(job.training.keep, num_trials, groups, is_sweep=is_sweep)
    nodes = place(capacity, worker, groups, a_group, replica, floor)
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
        nodes=nodes,
        gpus_by_type=capacity.gpus_by_type,
        replicas_beside_training=replicas_beside(capacity, worker, nodes, replica, floor) if replica else None,
        data_bytes=data_bytes,
        footprint=footprint,
        checkpoints_bytes=footprint.checkpoint_bytes * most if footprint.checkpoint_bytes is not None else None,
        notes=(*_gpu_notes(job.scaling, nodes), *_growth_notes(capacity)),
        new_nodes=_num_new(capacity),
        can_grow=capacity.can_grow,
    )


def _most_checkpoints(keep: KeepSpec, num_trials: int, groups: int, *, is_sweep: bool) -> int:
    """On storage at once: the kept ones of each trial that may go on or stays, and one that each group is writing."""
    stay = min(num_trials, keep.best + groups) if is_sweep else num_trials
    return stay * keep.last + groups


def _checkpoint_faults(
    job: JobSpec, num_trials: int, groups: int, footprint: Footprint, *, is_sweep: bool
) -> list[str]:
    free, each, keep = footprint.storage_free_bytes, footprint.checkpoint_bytes, job.training.keep
    if free is None or not each:
        return []
    count = _most_checkpoints(keep, num_trials, groups, is_sweep=is_sweep)
    if count * each <= free:
        return []
    fewer = _most_checkpoints(keep.model_copy(update={"last": 1}), num_trials, groups, is_sweep=is_sweep)
    nearest = "not one fits there; use a storage with more"
    if keep.last > 1 and fewer * each <= free:
        nearest = "training.keep.last = 1 would fit"
    elif free >= each:
        nearest = f"{free // each} of them fit there; use a storage with more, or fewer models"
    needed = f"{count} checkpoints of {_mb(each)} take up to {_mb(count * each)}"
    return [f"storage: {needed}, but {job.storage} has {_mb(free)} free; {nearest}"]


def _gpu_notes(scaling: ScalingSpec, nodes: Sequence[NodePlan]) -> Iterator[str]:
    if scaling.gpus_per_worker:
        yield from _mixed_groups(nodes)
    if scaling.may_share_gpus:
        yield "workers of a group may share a GPU: their gradients then go over gloo, since NCCL refuses it"


def _mixed_groups(nodes: Sequence[NodePlan]) -> Iterator[str]:
    """Groups whose workers have GPUs of several types."""
    types: dict[str, set[str]] = {}
    for node in nodes:
        for group in node.workers:
            types.setdefault(group, set()).add(node.accelerator or "an unknown type")
    mixed = [(group, found) for group, found in types.items() if len(found) > 1]
    for group, found in mixed[:1]:
        many = f" (and {len(mixed) - 1} more)" if len(mixed) > 1 else ""
        types_text = ", ".join(sorted(found))
        yield f"group {group}{many} would have GPUs of several types, {types_text}: the slowest sets its pace"


def _training_faults(scaling: ScalingSpec, capacity: Capacity) -> list[str]:
    if faults := _quantity_faults(scaling):
        return faults
    asked = _describe(scaling)
    ever = workers_that_fit(capacity, scaling, free_only=False)
    now = workers_that_fit(capacity, scaling, free_only=True)
    # more may surely fit on the busy cluster: Ray overrates no node whose CPUs run out before its GPUs
    if max(ever, now) < scaling.min_workers:
        nearest = f"the most that fits is num_workers = {ever}" if ever else _nearest_size(scaling, capacity)
        hint = _share_hint(scaling, capacity, free_only=False)
        return [f"scaling.num_workers: {asked}, but the cluster has {_cluster(capacity)}; {nearest}{hint}"]
    if now < scaling.min_workers:
        free = f"{capacity.free_cpus:g} CPUs and {capacity.free_gpus:g} GPUs are free"
        return [
            f"scaling.num_workers: {asked}, but only {free} of {_cluster(capacity)}; "
            f"num_workers = {now} would start now"
            + ("" if now else " (none): wait, or end what runs there")
            + _share_hint(scaling, capacity, free_only=True)
        ]
    if not workers_of_a_group(capacity, scaling):
        asked_for = min(scaling.max_workers, workers_that_seem_to_fit(capacity, scaling))
        return [
            f"scaling.num_workers: an elastic group would ask Ray for {asked_for} workers, but only {now} surely find "
            f"a place; num_workers = [{scaling.min_workers}, {now}] would"
        ]
    return []


def _nearest_size(scaling: ScalingSpec, capacity: Capacity) -> str:
    """That no worker fits, and the most CPUs one may hold where it is they that are too many."""
    if scaling.accelerator is not None and scaling.accelerator not in capacity.gpus_by_type:
        found = ", ".join(f"{gpus:g} x {kind or 'an unknown type'}" for kind, gpus in capacity.gpus_by_type.items())
        return f"scaling.accelerator is '{scaling.accelerator}', and its GPUs are {found or 'none'}"
    able = [node.cpus for node in capacity.nodes if node.gpus >= scaling.gpus_per_worker]
    most = max(able, default=0.0)
    smaller = scaling.model_copy(update={"cpus_per_worker": most})
    text = "not one worker of this size fits on any node"
    if STEP <= most < scaling.cpus_per_worker and (count := workers_that_fit(capacity, smaller, free_only=False)):
        return f"with cpus_per_worker = {most:g}, num_workers = {count} would fit, but {text}"
    return text


def _quantity_faults(scaling: ScalingSpec) -> list[str]:
    """What Ray refuses, or takes for nothing, on a cluster of any size."""
    faults = []
    if scaling.cpus_per_worker < STEP:
        faults.append(
            f"scaling.cpus_per_worker: {scaling.cpus_per_worker:g} is too small, Ray counts steps of {STEP:g}"
        )
    gpus = scaling.gpus_per_worker
    if 0 < gpus < STEP:
        faults.append(f"scaling.gpus_per_worker: {gpus:g} is too small, Ray counts steps of {STEP:g}")
    if gpus > 1 and gpus != int(gpus):
        faults.append(f"scaling.gpus_per_worker: {gpus:g}: more than one GPU must be whole ones; use {math.ceil(gpus)}")
    return faults


def _share_hint(scaling: ScalingSpec, capacity: Capacity, *, free_only: bool) -> str:
    """A share that leaves a rest of each GPU is what Ray miscounts: the next that does not, where it would fit."""
    gpus = scaling.gpus_per_worker
    if not 0 < gpus < 1:
        return ""
    even = math.floor(1 / STEP / math.floor(1 / gpus)) * STEP
    whole_shares = scaling.model_copy(update={"gpus_per_worker": even})
    if even == gpus or workers_that_fit(capacity, whole_shares, free_only=free_only) < scaling.min_workers:
        return ""
    return f"; Ray cannot place shares of {gpus:g} over several GPUs safely, gpus_per_worker = {even:g} would fit"


def _data_faults(data_bytes: int, scaling: ScalingSpec, capacity: Capacity) -> list[str]:
    small = nodes_too_small_for(data_bytes, capacity, scaling)
    if not small:
        return []
    least = min(node.object_store_bytes for node in small)
    return [
        f"data: the training arrays have {_mb(data_bytes)}, but the object store of {len(small)} of "
        f"{len(capacity.nodes)} nodes holds less, the smallest {_mb(least)}; start Ray there with "
        f"--object-store-memory={data_bytes} or more, or use fewer rows"
    ]


def _trial_actor_faults(trial_actor_bytes: int, capacity: Capacity) -> list[str]:
    if trial_actors_that_fit(capacity, trial_actor_bytes) >= 1:
        return []
    most = max((node.free_memory_bytes for node in capacity.nodes), default=0.0)
    return [
        f"memory: a Tune trial's actor asks Ray for {_mb(trial_actor_bytes)}, but no node has more than {_mb(most)} "
        "of its memory resource free: wait, or end what runs there"
    ]


def _serve_faults(serve: ServeNeeds, capacity: Capacity) -> list[str]:
    """Training has ended when the endpoint starts; what others hold now may be held still.

    The replicas that run now are taken over: a new version takes the place of the old one.
    """
    size = Bundle(serve.cpus_per_replica, serve.gpus_per_replica)
    ever = bundles_that_fit(capacity, size, free_only=False)
    now = capacity.replicas + bundles_that_fit(capacity, size, free_only=True)
    asked = f"serve: {serve.min_replicas} replicas x {serve.cpus_per_replica:g} CPU, {serve.gpus_per_replica:g} GPU"
    if max(ever, now) < serve.min_replicas:
        return [f"{asked}, but the cluster has {_cluster(capacity)}; the most that fits is {ever} replicas"]
    if now < serve.min_replicas:
        free = f"{capacity.free_cpus:g} CPUs and {capacity.free_gpus:g} GPUs are free"
        held = f" and {capacity.replicas} replicas run already" if capacity.replicas else ""
        return [
            f"{asked}, but only {free} of {_cluster(capacity)}{held}; {now} replicas would start: "
            "wait, or end what runs there"
        ]
    return []


def _describe(scaling: ScalingSpec) -> str:
    least = scaling.min_workers
    text = f"{'at least ' if scaling.is_elastic else ''}{least} workers x {scaling.cpus_per_worker:g} CPU"
    if scaling.gpus_per_worker:
        text += f" + {scaling.gpus_per_worker:g} GPU" + (f" '{scaling.accelerator}'" if scaling.accelerator else "")
    needs = f"{least * scaling.cpus_per_worker:g} CPUs"
    if scaling.gpus_per_worker:
        needs += f" and {least * scaling.gpus_per_worker:g} GPUs"
    return f"{text} need {needs}"


def _cluster(capacity: Capacity) -> str:
    nodes = f"{len(capacity.nodes)} node" + ("s" if len(capacity.nodes) != 1 else "")
    added = f", with the {new} that its autoscaler may add" if (new := _num_new(capacity)) else ""
    return f"{capacity.cpus:g} CPUs and {capacity.gpus:g} GPUs on {nodes}{added}"


def _growth_notes(capacity: Capacity) -> Iterator[str]:
    if new := _num_new(capacity):
        yield f"{new} of the {len(capacity.nodes)} nodes are not there yet: the autoscaler adds those that are needed"


def _num_new(capacity: Capacity) -> int:
    return sum(node.is_new for node in capacity.nodes)


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
