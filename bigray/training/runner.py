"""`train`: every model of a job, each once, with the job's own numbers (driver)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bigray.data.dataset import Dataset, prepare_dataset
from bigray.errors import SpecError, TrainingFailed
from bigray.results import Leaderboard
from bigray.specs import JobSpec, TrialSpec
from bigray.training.commands import Event, TrainTo
from bigray.training.groups import WorkerGroups
from bigray.training.switchboard import ask
from bigray.training.session import Listener, RunRequest, run_trials, silent


def train(
    job: JobSpec, *, address: str | None = None, listener: Listener | None = None, new: bool = False
) -> Leaderboard:
    """Train each model of the job on a worker group and export the best; the same call again resumes.

    Raises:
        SpecError: the data or a batch size does not suit the job.
        CapacityError: the cluster cannot hold one worker group.
        TrainingFailed: no model could be trained.
    """
    dataset = prepare_dataset(job.data, job.training.task)
    request = RunRequest(job, training_trials(job), dataset, search=None)
    check_trials(request.trials, dataset)
    return run_trials(request, _drive, listener or silent, address=address, new=new)


def training_trials(job: JobSpec) -> tuple[TrialSpec, ...]:
    """One trial for each model, in the order of the file."""
    return tuple(
        TrialSpec(trial_id=name, model_name=name, model=model, training=job.training, seed=job.seed)
        for name, model in job.models.items()
    )


def check_trials(trials: Sequence[TrialSpec], dataset: Dataset) -> None:
    """Refuse what the data makes impossible, before anything starts."""
    rows = dataset.num_rows["train"]
    sizes = sorted({t.training.global_batch_size for t in trials if t.training.global_batch_size > rows})
    if sizes:
        raise SpecError(
            [f"training.global_batch_size: {size} is more than the {rows} training rows" for size in sizes]
        )


def _drive(groups: WorkerGroups, trials: Sequence[TrialSpec]) -> None:
    with ThreadPoolExecutor(groups.count, thread_name_prefix="trial") as pool:
        for done in [pool.submit(_train_one, groups.switchboard, trial) for trial in trials]:
            done.result()


def _train_one(switchboard: Any, trial: TrialSpec) -> None:
    """Borrow a group for one trial (a driver thread)."""
    group = ask(switchboard.lease.remote())
    ask(switchboard.push.remote(Event("started", trial.trial_id, {"group": group})))
    try:
        state = ask(switchboard.execute.remote(group, TrainTo(trial, trial.training.epochs)))
        ask(switchboard.push.remote(Event.of_state(trial.trial_id, state)))
    except TrainingFailed as error:
        ask(switchboard.push.remote(Event("failed", trial.trial_id, {"error": str(error)})))
    finally:
        ask(switchboard.release.remote(group))
