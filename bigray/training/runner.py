"""`train`: every model of a job, each once, with the job's own numbers (driver)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bigray.errors import TrainingFailed
from bigray.results import Leaderboard
from bigray.specs import JobSpec, TrialSpec
from bigray.training.commands import Event, TrainTo
from bigray.training.groups import WorkerGroups
from bigray.training.request import RunRequest, make_request
from bigray.training.session import Listener, run_trials, silent
from bigray.training.switchboard import ask


def train(
    job: JobSpec, *, address: str | None = None, listener: Listener | None = None, new: bool = False
) -> Leaderboard:
    """Train each model of the job on a worker group and export the best; the same call again resumes.

    Raises:
        SpecError: the data or a batch size does not suit the job.
        CapacityError: the cluster cannot hold one worker group.
        TrainingFailed: no model could be trained.
    """
    return train_request(make_request(job, training_trials(job)), address=address, listener=listener, new=new)


def train_request(
    request: RunRequest, *, address: str | None = None, listener: Listener | None = None, new: bool = False
) -> Leaderboard:
    """`train` for a request whose data has been prepared already."""
    return run_trials(request, drive_trials, listener or silent, address=address, new=new)


def training_trials(job: JobSpec) -> tuple[TrialSpec, ...]:
    """One trial for each model, in the order of the file."""
    return tuple(
        TrialSpec(trial_id=name, model_name=name, model=model, training=job.training, seed=job.seed)
        for name, model in job.models.items()
    )


def drive_trials(groups: WorkerGroups, trials: Sequence[TrialSpec]) -> None:
    """Each trial once, on whichever group is free; tells of each as it ends."""
    pool = ThreadPoolExecutor(groups.count, thread_name_prefix="trial")
    try:
        for done in [pool.submit(_train_one, groups.switchboard, trial) for trial in trials]:
            done.result()
    finally:
        # without waiting: after Ctrl-C the threads are inside calls that end only with their groups
        pool.shutdown(wait=False, cancel_futures=True)


def _train_one(switchboard: Any, trial: TrialSpec) -> None:
    """Borrow a group for one trial (a driver thread)."""
    group = ask(switchboard.lease.remote())
    ask(switchboard.push.remote(Event("started", trial.trial_id, {"group": group})))
    try:
        state = ask(switchboard.execute.remote(group, TrainTo(trial, trial.training.epochs)))
        ask(switchboard.push.remote(Event.of_state(trial.trial_id, state)))
    except TrainingFailed as error:
        ask(switchboard.push.remote(Event("failed", trial.trial_id, {"error": str(error)})))
    # not where something else was raised: the run is being ended then, and with Ray gone a call ends this process
    ask(switchboard.release.remote(group))
