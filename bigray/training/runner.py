"""`train`: every model of a job, each once, with the job's own numbers (driver)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from bigray.cross_validation import cross_validate, trials_of_folds
from bigray.errors import GroupLost, OutOfMemory, TrainingFailed
from bigray.ranking import trial_results
from bigray.results import CrossValidation, Leaderboard
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

    With `data.k_folds` each is trained once for every fold; the one with the best mean is then trained on the usual
    split, and that trial is exported.

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
    return run_trials(request, drive, listener or silent, address=address, new=new)


def drive(run: LiveRun) -> None:
    """Each trial once; after the folds, the model with the best mean once more, on the usual split."""
    told = drive_trials(run.groups, run.request.trials)
    best = best_over_folds(run.request, told) if run.request.folds else None
    if best is not None:
        final = _usual_trial(run.request.job, best.model_name)
        proposed = Event("proposed", "", {"trials": [final.model_dump(mode="json")]})
        told_of_best = {name: value for name, value in asdict(best).items() if value == value}  # JSON has no NaN
        run.tell([Event("cross_validated", "", told_of_best), proposed])
        drive_trials(run.groups, [final])


def training_trials(job: JobSpec) -> tuple[TrialSpec, ...]:
    """One trial for each model, in the order of the file; with `data.k_folds` one for each of its folds.

    Raises:
        SpecError: a model is called what a fold of another is.
    """
    trials = tuple(_usual_trial(job, name) for name in job.models)
    return trials if job.data.k_folds is None else trials_of_folds(trials, job.data.k_folds)


def _usual_trial(job: JobSpec, model_name: str) -> TrialSpec:
    """Of a model on the usual split."""
    model = job.models[model_name]
    return TrialSpec(trial_id=model_name, model_name=model_name, model=model, training=job.training, seed=job.seed)


def best_over_folds(request: RunRequest, told: Iterable[Event]) -> CrossValidation | None:
    """The model with the best mean over its folds, which goes on to the usual split; None where no fold has a value.

    `told`: what was told of the folds' trials in this attempt, which is of every one of them.
    """
    events = [{"kind": event.kind, "trial": event.trial_id, **event.values} for event in told]
    training = request.job.training
    results = trial_results(request.trials, events)
    found = cross_validate(results, len(request.folds), training.selection_metric, training.selection_mode)
    return found[0] if found and found[0].values else None


def drive_trials(groups: WorkerGroups, trials: Sequence[TrialSpec]) -> list[Event]:
    """Each trial once, on whichever group is free; tells of each as it ends, and returns what it told."""
    pool = ThreadPoolExecutor(groups.count, thread_name_prefix="trial")
    try:
        under_way = [pool.submit(_train_one, groups.switchboard, trial) for trial in trials]
        return [event for done in under_way for event in done.result()]
    finally:
        # without waiting: after Ctrl-C the threads are inside calls that end only with their groups
        pool.shutdown(wait=False, cancel_futures=True)


def _train_one(switchboard: Any, trial: TrialSpec) -> list[Event]:
    """Train one trial on whichever group is free (a driver thread)."""
    _, events = train_alone(switchboard, trial.trial_id, TrainTo(trial, trial.training.epochs))
    ask(switchboard.push_all.remote(events))
    return events


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
