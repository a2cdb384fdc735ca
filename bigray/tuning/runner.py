"""`tune`: Ray Tune over the trials of a search, on warm worker groups (driver)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from typing import Any

from bigray.errors import last_line
from bigray.results import Leaderboard
from bigray.specs import JobSpec, SearchSpec, TrialSpec
from bigray.training.commands import Event
from bigray.training.groups import WorkerGroups
from bigray.training.request import RunRequest, make_request
from bigray.training.session import Listener, run_trials, silent
from bigray.training.switchboard import ask
from bigray.tuning.space import rungs, search_trials

TRIAL_MEMORY_BYTES = 64 * 2**20
"""What a trial's actor asks of the cluster. Tune places nothing that asks for nothing, and every CPU may be held by
the groups' workers, which must never wait for the trials that wait for them."""


def tune(
    job: JobSpec,
    search: SearchSpec,
    *,
    address: str | None = None,
    listener: Listener | None = None,
    new: bool = False,
) -> Leaderboard:
    """Search, and export the best trial's best epoch; the same call again goes on where it stopped.

    Raises:
        SpecError: the data or a batch size does not suit the job.
        CapacityError: the cluster cannot hold one worker group.
        TrainingFailed: no trial reached a metric.
    """
    request = make_request(job, search_trials(job, search), search.model_dump(mode="json"))
    return tune_request(request, search, address=address, listener=listener, new=new)


def tune_request(
    request: RunRequest,
    search: SearchSpec,
    *,
    address: str | None = None,
    listener: Listener | None = None,
    new: bool = False,
) -> Leaderboard:
    """`tune` for a request whose data has been prepared already."""

    def drive(groups: WorkerGroups, trials: Sequence[TrialSpec]) -> None:
        _run_tuner(search, groups, trials)

    return run_trials(request, drive, listener or silent, address=address, new=new)


def _run_tuner(search: SearchSpec, groups: WorkerGroups, trials: Sequence[TrialSpec]) -> None:
    from ray import tune as ray_tune

    from bigray.tuning.trial import GroupTrial

    for name in ("ray.tune", "ray.train"):  # Tune's own tables and hints; bigray shows the same from its journal
        logging.getLogger(name).setLevel(logging.CRITICAL)
    known = {trial.trial_id: (trial, rungs(search, trial.training.epochs)) for trial in trials}
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(GroupTrial, trials=known, switchboard=groups.switchboard),
        ray_tune.PlacementGroupFactory([{"memory": TRIAL_MEMORY_BYTES}]),
    )
    with tempfile.TemporaryDirectory(prefix="bigray-tune-", ignore_cleanup_errors=True) as scratch:
        results = ray_tune.Tuner(
            trainable,
            param_space={"trial": ray_tune.grid_search([trial.trial_id for trial in trials])},
            tune_config=ray_tune.TuneConfig(
                scheduler=_scheduler(search, trials),
                max_concurrent_trials=groups.count,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            # Tune's own state is not what a run resumes from: it goes to a scratch folder, without checkpoints
            run_config=ray_tune.RunConfig(
                storage_path=scratch,
                name="tune",
                verbose=0,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()
    ask(groups.switchboard.check_storage.remote())
    # also of a trial whose actor died and could not tell; one that told has the better words, and keeps them
    for result in results:
        if result.error is not None:
            failed = Event("failed", result.config["trial"], {"error": last_line(result.error)})
            ask(groups.switchboard.push.remote(failed))


def _scheduler(search: SearchSpec, trials: Sequence[TrialSpec]) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    from bigray.tuning.trial import EPOCH

    if search.scheduler == "none":
        return FIFOScheduler()
    training = trials[0].training
    return ASHAScheduler(
        time_attr=EPOCH,
        metric=training.selection_metric,
        mode=training.selection_mode,
        max_t=max(trial.training.epochs for trial in trials),
        grace_period=search.asha.grace_epochs,
        reduction_factor=search.asha.reduction_factor,
    )
