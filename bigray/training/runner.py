"""`train`: every model of a job, each once, with the job's own numbers (driver)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from bigray.errors import GroupLost, OutOfMemory, TrainingFailed
from bigray.results import Leaderboard
from bigray.specs import JobSpec, TrialSpec
from bigray.training.commands import Event, TrainTo, TrialState
from bigray.training.groups import WorkerGroups
from bigray.training.out_of_memory import halved
from bigray.training.request import RunRequest, make_request
from bigray.training.session import Listener, LiveRun, run_trials, silent
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

    def drive(run: LiveRun) -> None:
        drive_trials(run.groups, run.request.trials)

    return run_trials(request, drive, listener or silent, address=address, new=new)


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
    """Train one trial on whichever group is free (a driver thread)."""
    ask(switchboard.push_all.remote(train_alone(switchboard, trial.trial_id, TrainTo(trial, trial.training.epochs))[1]))


def train_alone(
    switchboard: Any, key: str, command: TrainTo, *, was_split: bool = False
) -> tuple[TrialState | None, list[Event]]:
    """Train one trial (further) on whichever group is free; one that runs out of memory is split once (driver, Tune's
    actor). `key` names the command: the same one is not carried out twice. `was_split`: it has been already.

    Returns the state, None where the trial failed, and the events that tell of it, for the journal.

    Raises:
        GroupLost, StorageError: no other trial will fare better.
    """
    trial_id = command.trial.trial_id
    try:
        group, waited_s, state = ask(switchboard.work.remote(key, command))
        if was_split:
            state = replace(state, micro_batch_size=command.trial.training.micro_batch_size)
        return state, [Event.of_state(trial_id, state, group, waited_s)]
    except OutOfMemory as error:
        smaller = None if was_split else halved(command.trial, error.rows)
        if smaller is None:
            return None, [Event("failed", trial_id, {"error": str(error)})]
        rows = smaller.training.micro_batch_size
        retried = Event("retried", trial_id, {"error": str(error), "micro_batch_size": rows})
        split = replace(command, trial=smaller)
        state, events = train_alone(switchboard, f"{key}-{rows}-rows", split, was_split=True)
        return state, [retried, *events]
    except GroupLost:
        raise
    except TrainingFailed as error:
        return None, [Event("failed", trial_id, {"error": str(error)})]
