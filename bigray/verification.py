"""`verify`: train twice, once with workers that are killed and a group that is resized, and compare (driver).

Both are ordinary runs in folders of their own. What is compared is on storage: the weights of the last checkpoint, the
validation metrics in the journal, and the count of samples.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bigray.cluster.capacity import connected_capacity, workers_that_fit
from bigray.comparison import Outcome, judge
from bigray.errors import SpecError, TrainingFailed, did_you_mean
from bigray.journal import read_journal
from bigray.paths import DISTURBED, REFERENCE, VERIFICATION, RunPaths
from bigray.results import Kill, Leaderboard, ModelVerification, Resize, SampleCounts, Verification
from bigray.specs import JobSpec, TrialSpec
from bigray.storage import open_storage
from bigray.training.checkpoint import load_checkpoint
from bigray.training.commands import Event
from bigray.training.faults import Disturbance, FaultPlan, GroupHeld, other_size, plan_faults
from bigray.training.request import RunRequest, make_request
from bigray.training.runner import train_request, training_trials
from bigray.training.session import Listener, LiveRun, run_trials, silent

if TYPE_CHECKING:
    from bigray.training.tensor_files import StateDict

CHECKPOINT_EVERY_S = 1.0
"""At most, in the disturbed run."""
ROOM_TIMEOUT_S = 30.0
"""For the CPUs of a group that has stopped to be free again."""


def verify(
    job: JobSpec,
    *,
    models: Sequence[str] = (),
    kills: int = 3,
    seed: int = 0,
    address: str | None = None,
    listener: Listener | None = None,
) -> Verification:
    """Train each model of a job, or those named, undisturbed and with faults, and compare what comes out.

    The faults are `kills` SIGKILLs of workers and a resize of the group, at random steps that follow from `seed`. The
    runs stay on storage, below `<storage>/verify-<hash>-<number>/`.

    Raises:
        SpecError: the data or a batch size does not suit the job, or it has no such model.
        CapacityError: the cluster cannot hold one worker group.
        TrainingFailed: no model could be trained even without faults.
    """
    chosen = only_models(job, models)
    request = make_request(chosen, training_trials(chosen))
    return verify_request(request, kills=kills, seed=seed, address=address, listener=listener)


def verify_request(
    request: RunRequest, *, kills: int = 3, seed: int = 0, address: str | None = None, listener: Listener | None = None
) -> Verification:
    """`verify` for a request whose data has been prepared already."""
    started = time.monotonic()
    folder = _fresh_folder(request)
    work = _Work(folder, kills, seed, address, listener or silent)
    reference = _stored_in(request, f"{folder}/{REFERENCE}")
    board = train_request(reference, address=address, listener=work.listener)
    found = Verification(
        job=request.job.name,
        folder=folder,
        exact=request.job.training.exact,
        models=tuple(_verify_model(work, reference, board, trial) for trial in reference.trials),
        wall_s=time.monotonic() - started,
    )
    open_storage(folder).write_bytes(VERIFICATION, json.dumps(found.to_json(), indent=2).encode())
    return found


def only_models(job: JobSpec, names: Sequence[str]) -> JobSpec:
    """The job with only these of its models; with no names, all. Each is trained once, also where the job has folds.

    Raises:
        SpecError: it has no model of that name.
    """
    if unknown := [name for name in names if name not in job.models]:
        raise SpecError([f"--model {name}: no such model{did_you_mean(name, job.models)}" for name in unknown])
    chosen = {name: model for name, model in job.models.items() if not names or name in names}
    data = job.data.model_copy(update={"k_folds": None})
    return job.model_copy(update={"models": chosen, "data": data})


def disturbed_request(reference: RunRequest, trial: TrialSpec, folder: str, kills: int) -> RunRequest:
    """One model of the reference run in a run of its own: the same training, with checkpoints more often.

    The kills come on top of the worker deaths that the job allows for.
    """
    job = reference.job.model_copy(update={"models": {trial.model_name: trial.model}})
    job = _scaled(job, max_failures=job.scaling.max_failures + kills)
    request = _stored_in(replace(reference, job=job, trials=(trial,)), folder)
    return _trained_with(request, checkpoint_every_s=min(CHECKPOINT_EVERY_S, job.training.checkpoint_every_s))


@dataclass(frozen=True)
class _Work:
    """What all models of one `verify` share."""

    folder: str
    kills: int
    seed: int
    address: str | None
    listener: Listener


def _verify_model(work: _Work, reference: RunRequest, board: Leaderboard, trial: TrialSpec) -> ModelVerification:
    """The disturbed run of one model, beside what the reference run made of it."""
    expected = _read_outcome(board, trial, work.listener)
    if expected.error is not None:
        return judge(trial.training, expected, Outcome("not started"), model_name=trial.model_name)
    plan = plan_faults(expected.steps, work.kills, f"{work.seed} {trial.trial_id}")
    request = disturbed_request(reference, trial, f"{work.folder}/{DISTURBED}", work.kills)
    run = _DisturbedRun(work, request, plan, expected.steps_per_s)
    _take_over_batch_size(reference, request)
    try:
        found = _read_outcome(run.train(), request.trials[0], work.listener)
    except TrainingFailed as error:
        found = Outcome("failed", error=str(error))
    return judge(
        trial.training,
        expected,
        found,
        model_name=trial.model_name,
        kills=run.kills,
        kills_planned=work.kills,
        resize=run.resize,
    )


class _DisturbedRun:
    """One run in two parts: the first ends at the resize, and the second goes on with another number of workers."""

    def __init__(self, work: _Work, request: RunRequest, plan: FaultPlan, steps_per_s: float) -> None:
        self.request = request
        self._work, trial_id = work, request.trials[0].trial_id
        self._before = Disturbance(trial_id, plan.before, plan.resize_step, steps_per_s)
        self._after = Disturbance(trial_id, plan.after, None, steps_per_s)
        self._sizes: tuple[int, int] | None = None

    @property
    def kills(self) -> tuple[Kill, ...]:
        return (*self._before.watch.kills, *self._after.watch.kills)

    @property
    def resize(self) -> Resize | None:
        """None where the training was over before its group could be stopped."""
        return None if self._sizes is None else Resize(self._after.watch.went_on_at_step, *self._sizes)

    def train(self) -> Leaderboard:
        """Train through all faults.

        Raises:
            TrainingFailed: the model did not get through.
        """
        job = self.request.job
        _free_workers(job, job.scaling.min_workers)
        with contextlib.suppress(GroupHeld):
            return self._run(self.request, self._before)
        before = self._before.num_workers or job.scaling.min_workers
        most = _free_workers(job, before)
        after = other_size(before, min(most, job.training.logical_shards) if job.training.exact else most)
        self._sizes = (before, after)
        return self._run(replace(self.request, job=_scaled(job, num_workers=after)), self._after)

    def _run(self, request: RunRequest, part: Disturbance) -> Leaderboard:
        def listen(event: Event) -> None:
            part.note(event)
            self._work.listener(event)

        def drive(run: LiveRun) -> None:
            part.drive(run.groups, run.request.trials)

        return run_trials(request, drive, listen, address=self._work.address, new=False)


def _fresh_folder(request: RunRequest) -> str:
    """Where the runs go: a folder that is not there yet."""
    root, number = open_storage(request.job.storage), 1
    name = f"verify-{request.run_id.rpartition('-')[2]}"
    while root.exists(f"{name}-{number}"):
        number += 1
    return root.child(f"{name}-{number}").uri


def _stored_in(request: RunRequest, folder: str) -> RunRequest:
    return replace(request, job=request.job.model_copy(update={"storage": folder}))


def _trained_with(request: RunRequest, **settings: Any) -> RunRequest:
    """The request with other training settings, in the job and in each of its trials."""
    training = request.job.training.model_copy(update=settings)
    trials = tuple(trial.model_copy(update={"training": training}) for trial in request.trials)
    return replace(request, job=request.job.model_copy(update={"training": training}), trials=trials)


def _scaled(job: JobSpec, **settings: Any) -> JobSpec:
    return job.model_copy(update={"scaling": job.scaling.model_copy(update=settings)})


def _take_over_batch_size(reference: RunRequest, disturbed: RunRequest) -> None:
    """What global_batch_size = "auto" came to must not be found again: it depends on the memory that is free."""
    source, target = _paths(reference), _paths(disturbed)
    name = RunPaths.batch_size_file(disturbed.trials[0].trial_id)
    if source.storage.exists(name):
        target.storage.write_bytes(name, source.storage.read_bytes(name))


def _paths(request: RunRequest) -> RunPaths:
    return RunPaths(open_storage(request.job.storage).child(request.run_id), request.run_id)


def _free_workers(job: JobSpec, awaited: int) -> int:
    """Workers that a new group may have, once those of the last one have given back room for `awaited`."""
    deadline = time.monotonic() + ROOM_TIMEOUT_S
    while (room := workers_that_fit(connected_capacity(), job.scaling, free_only=True)) < awaited:
        if time.monotonic() > deadline:  # the next group is refused in words of its own
            break
        time.sleep(0.1)
    return room


def _read_outcome(board: Leaderboard, trial: TrialSpec, listener: Listener) -> Outcome:
    """What a run has left of a trial on storage."""
    paths = RunPaths(open_storage(board.run_uri), board.run_id)
    result = next(result for result in board.trials if result.trial_id == trial.trial_id)
    events = [event for event in read_journal(paths) if event["trial"] == trial.trial_id]
    epochs = [event for event in events if event["kind"] == "epoch"]
    steps = max((event["step"] for event in events if event["kind"] == "state"), default=0)
    trained_s = sum(event["epoch_s"] or 0.0 for event in epochs)
    return Outcome(
        status=result.status,
        error=result.error,
        weights=None if result.error else _read_weights(paths, trial, listener),
        epochs=tuple((event["epoch"], event["metrics"]) for event in epochs),
        samples=SampleCounts(result.samples_lost, result.samples_repeated),
        steps=steps,
        steps_per_s=steps / trained_s if trained_s > 0 else 0.0,
    )


def _read_weights(paths: RunPaths, trial: TrialSpec, listener: Listener) -> StateDict | None:
    """Of the last step, with the averaged ones where the trial keeps some."""
    checkpoint = load_checkpoint(paths, trial, lambda text: listener(Event("warning", trial.trial_id, {"text": text})))
    if checkpoint is None:
        return None
    averaged = checkpoint.tensors("ema") or {}
    return {**(checkpoint.tensors("model") or {}), **{f"ema.{name}": tensor for name, tensor in averaged.items()}}
