"""One run from its folder to its leaderboard: what `train` and `tune` have in common (driver).

They differ only in how trials are driven over the worker groups; resuming, the journal, ranking and the export of the
winner are here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from bigray.bundle import BundleManifest, FactorySpec, ModelCard, Origin, is_outdated, pack_holdout
from bigray.cluster.capacity import Capacity, local_capacity
from bigray.cluster.connect import ensure_connected, resolve_address
from bigray.cluster.growth import growing_capacity
from bigray.cluster.plan import LEG_ACTOR_BYTES, Footprint, Plan, ServeNeeds, make_plan
from bigray.cluster.shared_storage import check_shared
from bigray.cross_validation import cross_validate
from bigray.errors import TrainingFailed
from bigray.journal import Journal, read_journal
from bigray.paths import RUN_FILE, RunPaths
from bigray.ranking import rank, searched_names, slots, training_wall_s, trial_results
from bigray.results import Finalist, Leaderboard, TrialResult
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, open_storage
from bigray.training.commands import Event, ExportBundle
from bigray.training.groups import WorkerGroups, hold_all, open_groups, preload
from bigray.training.housekeeping import Housekeeping
from bigray.training.request import RunRequest
from bigray.training.switchboard import ask

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class LiveRun:
    """A run while its groups are up, as who drives it sees it (driver)."""

    request: RunRequest
    groups: WorkerGroups
    paths: RunPaths
    earlier: Sequence[Mapping[str, Any]]
    """The journal of the attempts before this one."""
    is_unheard: Callable[[], bool]
    """Whether the journal cannot be written any more: what is trained from here on would be lost."""

    def tell(self, events: Sequence[Event]) -> None:
        """To the journal and the screen, in the order of what the workers report."""
        if events:
            ask(self.groups.switchboard.push_all.remote(list(events)))


Drive = Callable[[LiveRun], None]
"""Runs every trial over the groups; sees that a `state` or `failed` event is pushed for each. Raises only if none can
go on. One that ends before all is done, since its budget is used up, tells a `budget` event."""
Judge = Callable[[Sequence[TrialResult], Sequence[Mapping[str, Any]]], tuple[Finalist, ...]]
"""The finalists, the winner first, from the results and the journal; none where the best trial wins as it is."""

_VERSIONS = ("bigray", "ray", "torch", "numpy", "pyarrow", "onnxruntime")


def run_trials(
    request: RunRequest,
    drive: Drive,
    listener: Listener,
    *,
    address: str | None,
    new: bool,
    judge: Judge | None = None,
) -> Leaderboard:
    """Run, or go on with, every trial; export the winner.

    Raises:
        CapacityError: the cluster cannot hold one worker group; nothing was started.
        TrainingFailed: no trial reached a metric.
    """
    started = time.monotonic()
    paths = _run_paths(request, new=new)
    paths.storage.check_writable()
    events = list(read_journal(paths))
    if is_complete(num_trials(request, events), paths, events):
        listener(Event("complete", "", {"run": paths.run_id}))
    else:
        if resolve_address(address) is None and not ray.is_initialized():
            plan_for(request, local_capacity())  # says no before Ray starts
        _tell_start(request, paths, events, listener)
        imports = preload()
        ensure_connected(address)
        imports.join()
        _run_attempt(request, drive, listener, paths, judge)
    board = make_board(request, paths, list(read_journal(paths)), time.monotonic() - started, judge)
    listener(Event("ranked", board.winner.trial_id, {"board": board}))
    return board


def _run_attempt(request: RunRequest, drive: Drive, listener: Listener, paths: RunPaths, judge: Judge | None) -> None:
    job = request.job
    plan = plan_for(request, growing_capacity())
    check_shared(open_storage(job.storage))
    paths.storage.write_bytes(RUN_FILE, json.dumps(_run_document(request, paths), indent=2).encode())
    earlier = list(read_journal(paths))
    journal = Journal.open(paths)
    # of a plain training, every model is wanted; of a sweep, the best
    keep_best = job.training.keep.best if request.search is not None else request.num_trials
    is_population = request.search is not None and request.search["scheduler"] == "pbt"
    trials = known_trials(request, earlier)
    housekeeping = Housekeeping(paths, trials, journal.attempt, keep_best, earlier, is_population=is_population)
    journal.append("attempt", plan=plan.to_json(), notes=list(request.dataset.notes))
    listener(Event("groups", "", {"groups": plan.groups, "workers": plan.workers_per_group}))
    held = open_groups(
        plan.groups, job.scaling, request.dataset, paths, journal.attempt, request.folds, can_grow=plan.can_grow
    )
    with held as groups:
        with _event_stream(groups, journal, housekeeping, listener) as is_unheard:
            drive(LiveRun(request, groups, paths, earlier, is_unheard))
        events = list(read_journal(paths))
        winner = _winner(request, paths, events, judge)
        listener(Event("exporting", winner.trial_id))
        with _event_stream(groups, journal, housekeeping, listener):
            _export(request, groups, paths, events, winner)
    is_whole = not any(event["kind"] == "budget" and event["attempt"] == journal.attempt for event in events)
    journal.append("completed", winner.trial_id, whole=is_whole, trials=num_trials(request, events))
    journal.flush(force=True)
    if is_whole:
        finalists = judge(trial_results(known_trials(request, events), events), events) if judge is not None else ()
        housekeeping.finish({winner.trial_id, *(finalist.best_seed_trial for finalist in finalists)})


def plan_for(
    request: RunRequest, capacity: Capacity, serve: ServeNeeds | None = None, footprint: Footprint | None = None
) -> Plan:
    """`make_plan` of a request.

    Raises:
        CapacityError: it does not fit.
    """
    return make_plan(
        request.job,
        request.num_trials,
        request.dataset.num_rows,
        capacity,
        serve,
        data_bytes=request.data_bytes,
        trial_actor_bytes=LEG_ACTOR_BYTES if request.search is not None else 0,
        footprint=footprint,
    )


def _run_paths(request: RunRequest, *, new: bool) -> RunPaths:
    root = open_storage(request.job.storage)
    if request.run_name is not None:
        return RunPaths(root.child(request.run_name), request.run_name)
    run_id, number = request.run_id, 1
    while new and root.exists(run_id):
        number += 1
        run_id = f"{request.run_id}-{number}"
    return RunPaths(root.child(run_id), run_id)


def num_trials(request: RunRequest, events: Iterable[Mapping[str, Any]]) -> int:
    """Trials of the run: of the request, or of a later extension."""
    return max([request.num_trials, *(int(event["trials"]) for event in events if event["kind"] == "extended")])


def is_complete(total: int, paths: RunPaths, events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether that many trials were run to where the scheduler wanted them, and the winner was exported.

    A bundle that an earlier bigray exported does not count: it is made anew, from the checkpoint that is still there.
    """
    done = [event for event in events if event["kind"] == "completed" and event.get("whole", True)]
    if not any(event.get("trials", total) >= total for event in done):
        return False
    return paths.bundle.exists(MANIFEST) and not is_outdated(paths.bundle)


def known_trials(request: RunRequest, events: Iterable[Mapping[str, Any]]) -> tuple[TrialSpec, ...]:
    """The trials drawn up front, and those that were proposed on the way."""
    found = {trial.trial_id: trial for trial in request.drawn_trials}
    for event in events:
        if event["kind"] == "proposed":
            for document in event["trials"]:
                trial = TrialSpec.model_validate_json(json.dumps(document))
                found[trial.trial_id] = trial
    return tuple(found.values())


def _tell_start(request: RunRequest, paths: RunPaths, events: Sequence[Mapping[str, Any]], listener: Listener) -> None:
    trials = known_trials(request, events)
    values: dict[str, Any] = {"run": paths.run_id, "folder": paths.storage.uri, "trials": trials}
    values["total"] = max(len(trials), num_trials(request, events))
    if events:
        ended = {event["trial"] for event in events if event["kind"] == "state" and event.get("ended")}
        step = max((event.get("step", 0) for event in events if event["kind"] == "checkpoint"), default=0)
        listener(Event("resuming", "", {**values, "step": step, "ended": len(ended)}))
    else:
        listener(Event("starting", "", values))
    for note in request.dataset.notes:
        listener(Event("note", "", {"text": note}))


@contextlib.contextmanager
def _event_stream(
    groups: WorkerGroups, journal: Journal, housekeeping: Housekeeping, listener: Listener
) -> Iterator[Callable[[], bool]]:
    """Carry events from the switchboard to the journal and the listener while the block runs (a driver thread).

    The value tells whether that has failed; what it failed with is raised where the block ends.
    """
    ended = threading.Event()
    errors: list[Exception] = []

    def pump() -> None:
        while True:
            is_last_round = ended.is_set()
            events = ask(groups.switchboard.take_events.remote(0.0 if is_last_round else 0.5))
            journal.append_all(events)
            for event in events:
                listener(event)
            housekeeping.note(events)
            journal.flush(force=is_last_round)
            if is_last_round:
                return

    def pump_or_keep_error() -> None:
        try:
            pump()
        except Exception as error:  # raised where the block ends: a run without its journal must not choose a winner
            errors.append(error)

    thread = threading.Thread(target=pump_or_keep_error, name="event-stream", daemon=True)
    thread.start()
    try:
        yield lambda: bool(errors)
    except Exception:
        raise
    except BaseException:  # told to end: the checkpoints that are made now belong into the journal
        hold_all(groups.switchboard)
        raise
    finally:
        ended.set()
        thread.join()
    if errors:
        raise errors[0]


def make_board(
    request: RunRequest,
    paths: RunPaths,
    events: Sequence[Mapping[str, Any]],
    wall_s: float,
    judge: Judge | None = None,
) -> Leaderboard:
    """The results of a run, as its journal has them."""
    metric, mode = _selection(request)
    results = trial_results(known_trials(request, events), events, searched_names(request.search))
    return Leaderboard(
        run_id=paths.run_id,
        run_uri=paths.storage.uri,
        metric=metric,
        mode=mode,
        trials=rank(results, metric, mode),
        bundle=paths.bundle,
        wall_s=wall_s,
        finalists=judge(results, events) if judge is not None else (),
        cross_validation=cross_validate(results, len(request.folds), metric, mode) if request.search is None else (),
        slots=slots(events),
        training_wall_s=training_wall_s(events),
        notes=request.dataset.notes,
    )


def _winner(
    request: RunRequest, paths: RunPaths, events: Sequence[Mapping[str, Any]], judge: Judge | None
) -> TrialResult:
    board = make_board(request, paths, events, 0.0, judge)
    if not board.trials or board.metric not in board.winner.metrics or board.winner.fold is not None:
        raise TrainingFailed(f"{paths.run_id}: no trial reached a value of {board.metric}: {_why_none(board, events)}")
    return board.winner


def _why_none(board: Leaderboard, events: Sequence[Mapping[str, Any]]) -> str:
    if errors := sorted({result.error for result in board.trials if result.error}):
        return errors[0]
    if any(event["kind"] == "budget" for event in events):
        return "the budget was used up before one was validated; the same command with a larger one goes on"
    return "every trial diverged; try smaller learning rates"


def _selection(request: RunRequest) -> tuple[str, Any]:
    training = request.trials[0].training
    return training.selection_metric, training.selection_mode


def _export(
    request: RunRequest,
    groups: WorkerGroups,
    paths: RunPaths,
    events: Sequence[Mapping[str, Any]],
    winner: TrialResult,
) -> None:
    trial = next(trial for trial in known_trials(request, events) if trial.trial_id == winner.trial_id)
    manifest = _manifest(request, paths, trial, winner)
    holdout = pack_holdout(request.dataset.holdout, request.job.data.split.seed)
    command = ExportBundle(trial, manifest, stack_of(trial.trial_id, events), holdout, request.dataset.golden_rows)
    _, _, exported = ask(groups.switchboard.work.remote("export", command))
    ask(groups.switchboard.push.remote(Event("bundle", trial.trial_id, {"uri": exported.uri})))


def stack_of(trial_id: str, events: Iterable[Mapping[str, Any]]) -> str | None:
    """The stack that holds a trial's newest state; None where it has a folder of its own.

    When a run is complete its stacks go, and the winner has a folder.
    """
    stack = None
    for event in events:
        if event["kind"] == "completed" and event["whole"]:
            stack = None
        for outcome in event["outcomes"] if event["kind"] in ("leg", "rested") else ():
            if outcome["trial"] == trial_id:
                stack = outcome["stack"]
    return stack


def _manifest(request: RunRequest, paths: RunPaths, trial: TrialSpec, winner: TrialResult) -> BundleManifest:
    dataset = request.dataset
    origin = Origin(
        run=paths.run_id,
        trial=trial.trial_id,
        model=trial.model_name,
        step=winner.best_step,
        epoch=winner.best_epoch,
        metrics=winner.metrics,
        config=trial.training.model_dump(mode="json"),
        seeds=_seeds(request),
        data_fingerprint=dataset.fingerprint,
        git=_git_revision(),
        versions=_versions(),
    )
    return BundleManifest(
        name=request.job.name,
        origin=origin,
        inputs=dataset.inputs,
        preprocessing=dataset.preprocessing,
        outputs=dataset.outputs,
        factory=FactorySpec(factory=trial.model.factory, params=trial.model.params),
        example=dataset.example,
        input_range=dataset.ranges.get(dataset.inputs.tensor_name) if dataset.inputs.is_tensor else None,
        ranges={} if dataset.inputs.is_tensor else dataset.ranges,
        card=ModelCard(rows=dataset.num_rows),
    )


def _run_document(request: RunRequest, paths: RunPaths) -> dict[str, Any]:
    return {
        "run": paths.run_id,
        "job": (request.asked or request.job).model_dump(mode="json"),
        "search": request.search,
        "trials": [trial.model_dump(mode="json") for trial in request.drawn_trials],
        "seeds": _seeds(request),
        "data": {
            "fingerprint": request.dataset.fingerprint,
            "rows": request.dataset.num_rows,
            "notes": list(request.dataset.notes),
            "folds": [{"train": len(fold.train), "validation": len(fold.validation)} for fold in request.folds],
            "inputs": request.dataset.inputs.model_dump(mode="json"),
            "outputs": request.dataset.outputs.model_dump(mode="json"),
        },
        "versions": _versions(),
        "git": _git_revision(),
    }


def _seeds(request: RunRequest) -> dict[str, int]:
    return {"job": request.job.seed, "split": request.job.data.split.seed}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # running from a plain checkout
            found[name] = importlib.metadata.version(name)
    return found


def _git_revision() -> str | None:
    """The commit the working folder is at, `+dirty` with uncommitted changes; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def silent(_: Event) -> None:
    """The listener of a caller who wants only the result."""
