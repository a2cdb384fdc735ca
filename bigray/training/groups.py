"""Worker groups as the driver sees them: start, lend out, end.

A group is one Ray Train run (`TorchTrainer`) whose workers stay up and train trial after trial; Ray Train places them,
sets up the process group, and restarts them when one dies.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bigray.data.dataset import Dataset
from bigray.errors import last_line
from bigray.paths import RunPaths
from bigray.specs import ScalingSpec
from bigray.training.setup import GroupSetup
from bigray.training.switchboard import Switchboard

STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class WorkerGroups:
    """Live groups. `switchboard` is the actor handle through which they are leased and commanded."""

    switchboard: Any
    count: int


def preload() -> threading.Thread:
    """Import what the driver needs of Ray Train and Tune (seconds, torch among it) while Ray's processes start.

    Call it after `prepare_environment`: Ray Train and Tune read some variables when they are imported.

    One thread imports both: side by side, their circular imports fail.
    """

    def load() -> None:
        for module in ("ray.train.torch", "ray.tune"):
            importlib.import_module(module)

    thread = threading.Thread(target=load, name="preload", daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def open_groups(
    count: int, scaling: ScalingSpec, dataset: Dataset, paths: RunPaths, attempt: int, num_commands: int
) -> Iterator[WorkerGroups]:
    """Hold `count` groups for the length of a `with` block (driver). They start in the background.

    The training arrays go into the object store once. Each of `num_commands` may fail by its own error, which restarts
    its group, without using up the deaths that `scaling.max_failures` allows.
    """
    # no CPU of its own: the groups' workers may hold every CPU there is; on the driver's node, whose end ends the run
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
    switchboard = ray.remote(**options)(Switchboard).remote(count)
    data = ray.put(dataset.arrays)
    with tempfile.TemporaryDirectory(prefix="bigray-train-", ignore_cleanup_errors=True) as scratch:
        threads = [
            threading.Thread(
                target=_run_group,
                args=(
                    _setup(group, switchboard, data, scaling, dataset, paths, attempt),
                    scaling,
                    num_commands,
                    scratch,
                ),
                name=f"worker-group-{group}",
                daemon=True,
            )
            for group in range(count)
        ]
        for thread in threads:
            thread.start()
        try:
            yield WorkerGroups(switchboard, count)
        except Exception:
            _stop(switchboard, threads)
            raise
        except BaseException:
            # Ctrl-C: the workers may be hours from their next command, so they are not waited for; they end with
            # this process's connection, or on finding the switchboard gone
            ray.kill(switchboard)
            raise
        _stop(switchboard, threads)


def _setup(
    group: int, switchboard: Any, data: Any, scaling: ScalingSpec, dataset: Dataset, paths: RunPaths, attempt: int
) -> GroupSetup:
    return GroupSetup(
        group=group,
        switchboard=switchboard,
        data=data,
        num_outputs=dataset.outputs.num_outputs,
        paths=paths,
        attempt=attempt,
        threads_per_worker=max(1, int(scaling.cpus_per_worker)),
    )


def _run_group(setup: GroupSetup, scaling: ScalingSpec, num_commands: int, scratch: str) -> None:
    """One group's whole life (a driver thread; `fit` blocks until its workers leave the command loop)."""
    try:
        _make_trainer(setup, scaling, num_commands, scratch).fit()
        message = "the worker group was stopped"
    except Exception as error:  # whatever ends the run must reach those who wait for the group
        message = f"worker group {setup.group} ended: {last_line(error)}"
    with contextlib.suppress(ray.exceptions.RayError):  # the switchboard is gone when the whole run is being ended
        ray.get(setup.switchboard.group_ended.remote(setup.group, message))


def _make_trainer(setup: GroupSetup, scaling: ScalingSpec, num_commands: int, scratch: str) -> Any:
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from bigray.training.worker import run_worker

    return TorchTrainer(
        run_worker,
        train_loop_config={"setup": setup},
        scaling_config=_scaling_config(scaling),
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker > 0 else "gloo"),
        run_config=RunConfig(
            # Train keeps no checkpoint of ours: this folder holds only its own bookkeeping
            name=f"group-{setup.group}",
            storage_path=scratch,
            # a group that cannot be placed must end with an error, not wait for ever (Ray's default)
            failure_config=FailureConfig(max_failures=scaling.max_failures + num_commands, controller_failure_limit=3),
        ),
    )


def _scaling_config(scaling: ScalingSpec) -> Any:
    from ray.train import ScalingConfig

    resources: dict[str, float] = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker > 0:
        resources["GPU"] = scaling.gpus_per_worker
    return ScalingConfig(
        num_workers=scaling.num_workers, use_gpu=scaling.gpus_per_worker > 0, resources_per_worker=resources
    )


def _stop(switchboard: Any, threads: list[threading.Thread]) -> None:
    with contextlib.suppress(ray.exceptions.RayError):  # already gone with its cluster
        ray.get(switchboard.stop_all.remote(), timeout=STOP_TIMEOUT_S)
    for thread in threads:
        thread.join(STOP_TIMEOUT_S)
    ray.kill(switchboard)
