"""Worker groups as the driver sees them: start, lend out, end.

A group is one Ray Train run (`GroupTrainer`) whose workers stay up and train trial after trial; Ray Train places them
and replaces one that dies.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bigray.cluster.capacity import ACCELERATOR_LABEL, Capacity, connected_capacity
from bigray.data.dataset import Dataset
from bigray.data.folds import Fold
from bigray.errors import Preempted, last_line
from bigray.paths import RunPaths
from bigray.specs import ScalingSpec
from bigray.training.setup import GroupSetup
from bigray.training.switchboard import Switchboard, ask

STOP_TIMEOUT_S = 20.0
HOLD_TIMEOUT_S = 20.0
"""For the checkpoints that are committed when the driver is told to end."""
LETTING_GO_S = 15.0
"""For the driver's threads when it is told to end: Ray ends the process on the spot, with exit code 1, where a thread
still uses the connection that is being closed."""
PLACES_TIMEOUT_S = 5.0
DRAIN_WATCH_EVERY_S = 1.0
RESIZE_EVERY_S = 5.0
"""How often an elastic group looks whether the cluster has changed (Ray: 60 s)."""
SPARE_DELAY_S = 15.0
"""A short run does without a spare process: starting one would slow it more than it can save."""
SPARE_WATCH_EVERY_S = 0.5
SPARE_AGAIN_S = 2.0
"""Between the end of a spare process and the next call to it; Ray refuses those to a process that is being started."""
MAX_CONTROLLERS = 10
"""Deaths in a row, of Ray Train's controller or of workers while they start, before a group is given up."""
SETTLED_AFTER_S = 60.0
"""A controller that lasted this long begins a new row."""
MAX_STARTS = 3
"""Attempts to place a group before it is given up."""
MAX_STARTS_WHILE_GROWING = 180
"""Half an hour where the cluster has an autoscaler: a node has to boot, and one that does not is asked for again."""
MAX_ELASTIC_STARTS = 1000
"""An elastic group waits for its least number of workers; each attempt takes ten seconds."""
NO_GROUP = -1


@dataclass(frozen=True)
class WorkerGroups:
    """Live groups. `switchboard` is the actor handle through which they are leased and commanded."""

    switchboard: Any
    count: int


def preload() -> threading.Thread:
    """Import what the driver needs of Ray Train and Tune (a second) while Ray's processes start.

    Call it after `prepare_environment`: Ray Train and Tune read some variables when they are imported.

    One thread imports both: side by side, their circular imports fail.
    """

    def load() -> None:
        for module in ("bigray.training.trainer", "ray.tune"):
            importlib.import_module(module)

    thread = threading.Thread(target=load, name="preload", daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def open_groups(
    count: int,
    scaling: ScalingSpec,
    dataset: Dataset,
    paths: RunPaths,
    attempt: int,
    folds: Iterable[Fold] = (),
    *,
    can_grow: bool = False,
) -> Iterator[WorkerGroups]:
    """Hold `count` groups for the length of a `with` block (driver). They start in the background.

    `can_grow`: the cluster's autoscaler may have to start nodes for them.

    The training arrays, also those of each fold, go into the object store once; rows that are streamed stay in their
    files. On Ctrl-C or SIGTERM, call `hold_all`
    before the block is left.
    """
    # no CPU of its own: the groups' workers may hold every CPU there is; on the driver's node, whose end ends the run
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
    switchboard = ray.remote(**options)(Switchboard).remote(count, scaling.max_failures, here.node_id)
    setup = GroupSetup(
        group=NO_GROUP,
        switchboard=switchboard,
        data=ray.put(dataset.arrays),
        driver_node=here.node_id,
        folds=tuple(ray.put(fold.arrays()) for fold in folds),
        num_outputs=dataset.outputs.num_outputs,
        paths=paths,
        attempt=attempt,
        threads_per_worker=max(1, int(scaling.cpus_per_worker)),
        isolate=scaling.isolate,
        max_rss_gb=scaling.max_rss_gb,
    )
    is_over = threading.Event()
    free_cpus = connected_capacity().free_cpus
    starts = _max_starts(scaling, can_grow=can_grow)
    with tempfile.TemporaryDirectory(prefix="bigray-train-", ignore_cleanup_errors=True) as scratch:
        groups = [
            _start_thread(f"worker-group-{group}", _run_group, mine, scaling, scratch, is_over, starts)
            for group, mine in ((group, replace(setup, group=group)) for group in range(count))
        ]
        threads = [*groups, _start_thread("drain-watch", _watch_drains, switchboard, is_over)]
        if scaling.warm_spare and not scaling.gpus_per_worker:
            threads.append(_start_thread("spare", _keep_spare, setup, is_over))
        try:
            yield WorkerGroups(switchboard, count)
        except Exception:
            is_over.set()
            _stop(switchboard, threads)
            raise
        except BaseException:
            # Ctrl-C: the workers may be hours from their next command, so they are not waited for long; they end on
            # finding the switchboard gone, or with this process's connection. Their state is safe by now (`hold_all`)
            is_over.set()
            ray.kill(switchboard)
            _join(threads, LETTING_GO_S)
            raise
        is_over.set()
        _stop(switchboard, threads)
        _wait_for_places(free_cpus)


def _start_thread(name: str, work: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
    thread.start()
    return thread


def _max_starts(scaling: ScalingSpec, *, can_grow: bool) -> int:
    if scaling.is_elastic:
        return MAX_ELASTIC_STARTS
    return MAX_STARTS_WHILE_GROWING if can_grow else MAX_STARTS


def _run_group(
    setup: GroupSetup, scaling: ScalingSpec, scratch: str, is_over: threading.Event, max_starts: int
) -> None:
    """One group's whole life (a driver thread; `fit` blocks until its workers leave the command loop).

    Where Ray Train's controller dies too, or gives up over a worker's death, the workers start again under another one.
    """
    num_deaths = 0
    for number in itertools.count():
        began = time.monotonic()
        try:
            _make_trainer(setup, scaling, f"{scratch}/{number}", max_starts).fit()
            message = "the worker group was stopped"
            break
        except Exception as error:  # whatever ends the run must reach those who wait for the group
            num_deaths = 1 if time.monotonic() - began > SETTLED_AFTER_S else num_deaths + 1
            if is_over.is_set() or num_deaths >= MAX_CONTROLLERS or not is_a_death(error):
                message = f"worker group {setup.group} ended: {last_line(error)}"
                break
            if isinstance(error, RayActorError):
                _free_places_of(error.actor_id)
    with contextlib.suppress(ray.exceptions.RayError):  # the switchboard is gone when the whole run is being ended
        ray.get(setup.switchboard.group_ended.remote(setup.group, message))


def is_a_death(error: Exception) -> bool:
    """Whether `fit` failed because a process died: the controller, or a worker while Ray Train was placing another.

    A group for which there is no place is not among them: its controller has tried often enough (`_max_starts`).
    """
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    cause = error.controller_failure if isinstance(error, ControllerError) else error
    return isinstance(cause, RayActorError | WorkerGroupStartupFailedError)


def _free_places_of(actor_id: str | None) -> None:
    """Give back the places of the workers of a controller that died.

    Ray keeps them for as long as this driver lives. Ray Train's own cleaner asks the dashboard who is dead, and an
    embedded Ray has none.
    """
    from ray._private import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    with contextlib.suppress(ray.exceptions.RayError):  # the run is being ended
        for packed in state.state._connect_and_get_accessor().get_placement_group_table():
            found = PlacementGroupTableData.FromString(packed)
            if found.creator_actor_id.hex() == actor_id:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))


def _make_trainer(setup: GroupSetup, scaling: ScalingSpec, scratch: str, max_starts: int) -> Any:
    from ray.train import FailureConfig, RunConfig

    from bigray.training.backend import GroupConfig
    from bigray.training.entry import run_worker
    from bigray.training.trainer import GroupTrainer

    trainer = GroupTrainer(
        run_worker,
        train_loop_config={"setup": setup},
        scaling_config=_scaling_config(scaling),
        backend_config=GroupConfig(setup.switchboard, setup.group, scaling.is_elastic),
        run_config=RunConfig(
            # Train keeps no checkpoint of ours: this folder holds only its own bookkeeping
            name=f"group-{setup.group}",
            storage_path=scratch,
            # the switchboard counts deaths, for each trial; but a group that cannot be placed must end with an error,
            # not wait for ever (Ray's default)
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=max_starts),
        ),
    )
    # what an elastic group may take of the cluster is reserved under this name, for three minutes beyond a controller
    # that is killed: the next one, also of the next command, takes the reservation over instead of waiting behind it
    object.__setattr__(trainer.train_run_context, "run_id", f"bigray-{setup.paths.storage.root}-{setup.group}")
    return trainer


def _scaling_config(scaling: ScalingSpec) -> Any:
    from ray.train import ScalingConfig

    resources: dict[str, float] = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker > 0:
        resources["GPU"] = scaling.gpus_per_worker
    return ScalingConfig(
        num_workers=scaling.num_workers,
        use_gpu=scaling.gpus_per_worker > 0,
        resources_per_worker=resources,
        # one group on as few nodes as hold it; Ray gives each the node with the most room, so that groups are spread
        placement_strategy="PACK",
        label_selector={ACCELERATOR_LABEL: scaling.accelerator} if scaling.accelerator else None,
        elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
    )


def _watch_drains(switchboard: Any, is_over: threading.Event) -> None:
    """Tell the switchboard of nodes that are about to go away (a driver thread)."""
    from ray._private import state

    told: set[str] = set()
    while not is_over.wait(DRAIN_WATCH_EVERY_S):
        try:
            draining = set(state.state.get_draining_nodes())  # Ray Train's own watcher asks the same way
            if draining != told:
                ray.get(switchboard.drain.remote(sorted(draining)))
                told = draining
        except ray.exceptions.RayError:  # the switchboard is gone: the run is being ended
            return


def _keep_spare(setup: GroupSetup, is_over: threading.Event) -> None:
    """Start a spare process for a run that lasts (a driver thread): its imports are seconds of a core.

    One that ends is started again by Ray, on another node where its own is going away, and told to serve again here.
    """
    from bigray.training.entry import Spare

    try:
        ray.get(setup.switchboard.all_seated.remote())
        if is_over.wait(SPARE_DELAY_S):
            return
        spare = ray.remote(num_cpus=0, max_restarts=-1)(Spare).remote()
        while not is_over.is_set():
            try:
                _ask_until(is_over, spare.serve.remote(setup))
                return
            except Preempted:  # Ray keeps a node that is drained until nothing is left on it
                ray.kill(spare, no_restart=False)
            except RayActorError:  # its process was lost
                pass
            is_over.wait(SPARE_AGAIN_S)
    except ray.exceptions.RayError:  # the run is being ended
        return


def _ask_until(is_over: threading.Event, reference: Any) -> None:
    """As `ask`, but no longer than the run: a spare that is still starting would hold up its end."""
    while not is_over.is_set():
        if ray.wait([reference], timeout=SPARE_WATCH_EVERY_S)[0]:
            ask(reference)
            return


def hold_all(switchboard: Any) -> None:
    """Have every group commit a checkpoint and stop (driver, before it ends)."""
    with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone: the last commit stands
        ray.get(switchboard.hold_all.remote(HOLD_TIMEOUT_S), timeout=HOLD_TIMEOUT_S + 5)


def _stop(switchboard: Any, threads: Sequence[threading.Thread]) -> None:
    """End the groups, and wait for every thread of theirs: one that calls Ray after the driver has left it makes Ray
    end the whole process, with code 1."""
    with contextlib.suppress(ray.exceptions.RayError):  # already gone with its cluster
        ray.get(switchboard.stop_all.remote(), timeout=STOP_TIMEOUT_S)
    _join(threads, STOP_TIMEOUT_S)
    ray.kill(switchboard)
    _join(threads, LETTING_GO_S)


def _wait_for_places(free_cpus: float) -> None:
    """Until as many CPUs are free as before: Ray gives the places back a moment after the controllers have ended, and
    the next run in this process would be told that there is no room. Not for long: others may have taken them. Of a
    cluster that has become smaller no more is expected than it has."""
    deadline = time.monotonic() + PLACES_TIMEOUT_S
    while not _are_back(free_cpus, connected_capacity()) and time.monotonic() < deadline:
        time.sleep(0.05)


def _are_back(free_cpus: float, now: Capacity) -> bool:
    return now.free_cpus >= min(free_cpus, now.cpus)


def _join(threads: Sequence[threading.Thread], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
