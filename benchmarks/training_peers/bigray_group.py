"""A live worker group of bigray on a Ray of its own, to which trials are handed as `train` and `tune` do it."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training_peers.plain_loop import NUM_CLASSES, PlainJob, make_rows

VALIDATION_ROWS = 16


class LiveGroup:
    """One group of two workers that waits for commands."""

    def __init__(self, switchboard: Any, group: int) -> None:
        self.switchboard, self.group = switchboard, group
        self._numbers = itertools.count()

    def execute(self, job: PlainJob, **training: Any) -> Any:
        """Hand over a new trial; returns at once, with a reference to its result."""
        from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
        from bigray.training.commands import TrainTo

        settings = {"task": "classification", "epochs": 1, "global_batch_size": job.batch, "lr": job.lr, **training}
        trial = TrialSpec(
            trial_id=f"{next(self._numbers)}-net",
            model_name="net",
            model=ModelSpec(factory=job.factory, params=job.params),
            training=TrainingSpec.model_validate(settings),
            seed=0,
        )
        return self.switchboard.execute.remote(self.group, TrainTo(trial, 1))


@contextlib.contextmanager
def own_ray() -> Iterator[None]:
    """A Ray of two logical CPUs, with the settings that `bigray` starts it with."""
    from bigray.cluster.connect import prepare_environment
    from bigray.training.groups import preload

    prepare_environment(joining=False)
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=2, namespace="bigray", **options)
    preload().join()
    yield
    ray.shutdown()


@contextlib.contextmanager
def live_group(rows: int, shape: list[int], folder: Path, **scaling: Any) -> Iterator[LiveGroup]:
    """One group in `own_ray`, with the same rows as the plain loop's; its workers have taken their seats."""
    from bigray.data.dataset import TrainingArrays
    from bigray.paths import RunPaths
    from bigray.specs import ScalingSpec
    from bigray.storage import open_storage
    from bigray.training.groups import open_groups
    from bigray.training.switchboard import ask

    x, y = make_rows(rows, shape)
    arrays = TrainingArrays(x, y, x[:VALIDATION_ROWS].copy(), y[:VALIDATION_ROWS].copy())
    del x, y
    dataset: Any = SimpleNamespace(arrays=arrays, outputs=SimpleNamespace(num_outputs=NUM_CLASSES))
    spec = ScalingSpec.model_validate({"num_workers": 2, "max_failures": 100, **scaling})
    with open_groups(1, spec, dataset, RunPaths(open_storage(folder), "bench"), 1) as groups:
        ask(groups.switchboard.all_seated.remote())
        yield LiveGroup(groups.switchboard, ask(groups.switchboard.lease.remote()))
