"""`tune`: a sweep over warm worker groups, its legs run by Ray Tune (driver)."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from bigray.cluster.plan import LEG_ACTOR_BYTES
from bigray.results import Finalist, Leaderboard, TrialResult
from bigray.specs import JobSpec, SearchSpec
from bigray.training.commands import Event
from bigray.training.request import RunRequest, make_request
from bigray.training.session import Judge, Listener, LiveRun, run_trials, silent
from bigray.training.switchboard import ask
from bigray.tuning.budget import Budget, used_before
from bigray.tuning.evidence import judge_run
from bigray.tuning.policies import make_policy
from bigray.tuning.proposals import make_proposer
from bigray.tuning.space import search_trials
from bigray.tuning.sweep import Sweep

BUDGET_WATCH_EVERY_S = 0.2

AWS_KEYS = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"})


def tune(
    job: JobSpec,
    search: SearchSpec,
    *,
    address: str | None = None,
    listener: Listener | None = None,
    new: bool = False,
    budget: Budget | None = None,
) -> Leaderboard:
    """Search, and export the best trial's best epoch; the same call again goes on where it stopped.

    With a budget that is used up the sweep ends at the next report of each trial, with the best so far as the winner;
    the same call with a larger one goes on.

    With `data.k_folds` the finalists are trained on each fold instead of with other seeds.

    Raises:
        SpecError: the data or a batch size does not suit the job, or it has folds and the search no finalists.
        CapacityError: the cluster cannot hold one worker group.
        TrainingFailed: no trial reached a metric.
    """
    request = make_request(job, search_trials(job, search), search.model_dump(mode="json"))
    return tune_request(request, search, address=address, listener=listener, new=new, budget=budget)


def tune_request(
    request: RunRequest,
    search: SearchSpec,
    *,
    address: str | None = None,
    listener: Listener | None = None,
    new: bool = False,
    budget: Budget | None = None,
) -> Leaderboard:
    """`tune` for a request whose data has been prepared already."""

    def drive(run: LiveRun) -> None:
        _run_sweep(run, search, budget)

    judge = make_judge(request, search)
    return run_trials(request, drive, listener or silent, address=address, new=new, judge=judge)


def make_judge(request: RunRequest, search: SearchSpec) -> Judge | None:
    """Who says which finalist has won, where the search asks for finalists."""
    if not search.finalists:
        return None
    training = request.trials[0].training

    def judged(results: Sequence[TrialResult], events: Sequence[Mapping[str, Any]]) -> tuple[Finalist, ...]:
        return judge_run(results, events, training.selection_metric, training.selection_mode)

    return judged


def _run_sweep(run: LiveRun, search: SearchSpec, budget: Budget | None) -> None:
    from ray import tune as ray_tune

    from bigray.tuning.searcher import LegSearcher
    from bigray.tuning.trial import LegTrial

    for name in ("ray.tune", "ray.train"):  # Tune's own tables and hints; bigray shows the same from its journal
        logging.getLogger(name).setLevel(logging.CRITICAL)
    keep_keys_private()
    board = run.groups.switchboard
    is_used_up = threading.Event()
    searcher = LegSearcher(
        _make_sweep(run, search),
        [event for event in run.earlier if event["kind"] == "leg"],
        offer=lambda leg: ask(board.offer.remote(leg.number, leg)),
        tell=run.tell,
        must_stop=lambda: is_used_up.is_set() or run.is_unheard(),
    )
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(LegTrial, switchboard=board),
        ray_tune.PlacementGroupFactory([{"memory": LEG_ACTOR_BYTES}]),
    )
    with (
        tempfile.TemporaryDirectory(prefix="bigray-tune-", ignore_cleanup_errors=True) as scratch,
        _watched_budget(run, budget, is_used_up),
    ):
        ray_tune.Tuner(
            trainable,
            tune_config=ray_tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: f"leg-{trial.config['leg']}",
            ),
            # Tune's own state is not what a run resumes from: it goes to a scratch folder, without checkpoints
            run_config=ray_tune.RunConfig(
                storage_path=scratch,
                name="tune",
                verbose=0,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()
    ask(board.check_storage.remote())
    searcher.raise_failure()


def keep_keys_private() -> None:
    """Keep the driver's AWS credentials out of the runtime environment of Tune's actors (driver).

    Ray 2.60 copies them there, and its agent writes every runtime environment into a log, in clear. These actors read
    no storage; whoever does has the credentials of its own node.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(AWS_KEYS)


def _make_sweep(run: LiveRun, search: SearchSpec) -> Sweep:
    """With the same slots as the first attempt had: they decide what is known when a leg is chosen."""
    request = run.request
    begun = next((event for event in run.earlier if event["kind"] == "sweep"), None)
    slots = begun["slots"] if begun is not None else run.groups.count + 1  # one more is ready when a group is done
    totals = [event["trials"] for event in run.earlier if event["kind"] == "extended"]
    if begun is None:
        run.tell([Event("sweep", "", {"slots": slots})])
    if request.extended_to is not None and request.extended_to not in totals:
        totals.append(request.extended_to)
        # also told as trials, since the command that began the sweep knows only of its own
        drawn = [trial.model_dump(mode="json") for trial in request.drawn_trials]
        run.tell([Event("extended", "", {"trials": totals[-1]}), Event("proposed", "", {"trials": drawn})])
    mode = request.trials[0].training.selection_mode
    return Sweep(
        search,
        mode,
        make_proposer(request.job, search, mode),
        make_policy(search, mode, request.job.seed),
        slots=slots,
        chapters=tuple(totals),
        folds=[partial(request.of_fold, fold=fold.number) for fold in request.folds],
        can_stack=request.job.training.loop is None and not request.job.scaling.isolate,
    )


@contextmanager
def _watched_budget(run: LiveRun, budget: Budget | None, is_used_up: threading.Event) -> Iterator[None]:
    """Have the groups rest at their next report once the budget is used up (a driver thread)."""
    if budget is None:
        yield
        return
    is_over = threading.Event()
    arguments = (run, budget, is_used_up, is_over)
    thread = threading.Thread(target=_watch_budget, args=arguments, name="budget", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _watch_budget(run: LiveRun, budget: Budget, is_used_up: threading.Event, is_over: threading.Event) -> None:
    """Counts from the moment a group is up, and what earlier attempts have used."""
    board = run.groups.switchboard
    scaling = run.request.job.scaling
    gpus = run.groups.count * scaling.max_workers * scaling.gpus_per_worker
    before, started = used_before(run.earlier), None
    while not is_over.wait(BUDGET_WATCH_EVERY_S):
        if started is None:
            started = time.monotonic() if ask(board.has_begun.remote()) else None
            continue
        wall_s = time.monotonic() - started
        if budget.is_used(before.wall_s + wall_s, before.gpu_s + wall_s * gpus):
            is_used_up.set()
            run.tell([Event("budget", "", {"text": f"the budget of {budget.text} is used up"})])
            ask(board.rest_all.remote())
            return
