"""A run's folder -> what `bigray show` tells of it: from its journal alone, without Ray."""

from __future__ import annotations

import difflib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bigray.cross_validation import cross_validate
from bigray.errors import StorageError
from bigray.journal import read_journal
from bigray.paths import RUN_FILE, RunPaths
from bigray.ranking import (
    proposed_trials,
    rank,
    searched_names,
    slots,
    training_wall_s,
    trial_results,
)
from bigray.results import CrossValidation, Finalist, Leaderboard, Ledger, TrialResult
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, Storage, open_storage
from bigray.tuning.evidence import judge_run, why_it_won

Mode = Literal["max", "min"]
RunStatus = Literal["complete", "budget used up", "not complete"]

LEDGER_PARTS = ("start_s", "data_s", "compute_s", "evaluation_s", "checkpoint_s", "reporting_s", "other_s")
"""They add up to a trial's wall."""


@dataclass(frozen=True)
class Totals:
    """Over all trials of a run."""

    ledger: Ledger
    waiting_s: float
    slots: int
    """Worker groups that trained at once."""
    training_wall_s: float
    """From the first trial's start to the last one's end, over all attempts."""

    @property
    def efficiency(self) -> float | None:
        """Seconds of forward, backward and optimizer steps over all groups, for each second of each group."""
        available_s = self.training_wall_s * self.slots
        return self.ledger.compute_s / available_s if available_s else None

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self.ledger), "wall_s": self.ledger.wall_s, "waiting_s": self.waiting_s}
        wall = {"slots": self.slots, "training_wall_s": self.training_wall_s, "efficiency": self.efficiency}
        return {**values, **wall}


@dataclass(frozen=True)
class RunReport:
    """What a run's journal says."""

    run_id: str
    folder: str
    job: str
    status: RunStatus
    idle_s: float
    """Since the newest event, by this machine's clock: a run that is not complete may still be going on."""
    budget: str | None
    """The budget that was used up last."""
    metric: str
    mode: Mode
    winner: str | None
    """The trial that was exported."""
    bundle: str | None
    num_planned: int
    trials: tuple[TrialResult, ...]
    """Those that were begun and have been heard of, best first."""
    statuses: dict[str, str]
    """Of `trials`; while a run is not complete, a trial that may go on is paused."""
    totals: Totals
    probes: tuple[dict[str, Any], ...]
    events: dict[str, int]
    """How often what happened: retried, recycled, lost, promoted, exploited."""
    finalists: tuple[Finalist, ...]
    cross_validation: tuple[CrossValidation, ...] = ()
    """Of a training with `data.k_folds`: each model, the best mean first."""
    notes: tuple[str, ...] = ()
    """What was left out of the data, one line each."""

    @property
    def why(self) -> str | None:
        """What decided between the finalists, in one line."""
        return why(self.finalists, self.trials, self.metric, self.mode)

    @property
    def counts(self) -> dict[str, int]:
        """Trials by status."""
        found = Counter(self.statuses.values())
        waiting = self.num_planned - len(self.trials)
        return dict(found) | ({"waiting": waiting} if waiting > 0 else {})

    def to_json(self) -> dict[str, Any]:
        trials = [trial_document(trial) | {"status": self.statuses[trial.trial_id]} for trial in self.trials]
        return {
            "run": self.run_id,
            "folder": self.folder,
            "job": self.job,
            "status": self.status,
            "idle_s": round(self.idle_s, 1),
            "budget": self.budget,
            "metric": self.metric,
            "mode": self.mode,
            "winner": self.winner,
            "bundle": self.bundle,
            "notes": list(self.notes),
            "trials_planned": self.num_planned,
            "counts": self.counts,
            "totals": self.totals.to_json(),
            "probes": list(self.probes),
            "events": self.events,
            "finalists": [asdict(finalist) for finalist in self.finalists],
            "why": self.why,
            "cross_validation": [asdict(model) for model in self.cross_validation],
            "trials": trials,
        }


def read_report(location: str | Path) -> RunReport:
    """Read a run's folder; raises as `find_run`."""
    paths, document = find_run(location)
    return make_report(paths, document, list(read_journal(paths)))


def find_run(location: str | Path) -> tuple[RunPaths, dict[str, Any]]:
    """A run's folder, and its run.json.

    Raises:
        StorageError: there is no run; names what is near.
    """
    storage = open_storage(location)
    if not storage.exists(RUN_FILE):
        raise StorageError(f"{storage.uri}: no run here{_near(storage)}")
    try:
        document = json.loads(storage.read_bytes(RUN_FILE))
    except ValueError as error:
        raise StorageError(f"{storage.uri}/{RUN_FILE}: not valid JSON: {error}") from error
    return RunPaths(storage, document["run"]), document


def make_report(paths: RunPaths, document: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> RunReport:
    """What the events of a run come to; `document` is its run.json."""
    trials = [TrialSpec.model_validate(trial) for trial in document["trials"]]
    training = trials[0].training if trials else _first_proposed(events).training
    metric, mode = training.selection_metric, training.selection_mode
    results = rank(trial_results(trials, events, searched_names(document.get("search"))), metric, mode)
    status = run_status(events, is_exported=paths.bundle.exists(MANIFEST))
    return RunReport(
        run_id=document["run"],
        folder=paths.storage.uri,
        job=document["job"]["name"],
        status=status,
        idle_s=max(time.time() - events[-1]["time"], 0.0) if events else 0.0,
        budget=next((event.get("text", "") for event in reversed(events) if event["kind"] == "budget"), None),
        metric=metric,
        mode=mode,
        winner=next((event["trial"] for event in reversed(events) if event["kind"] == "completed"), None),
        bundle=paths.bundle.uri if paths.bundle.exists(MANIFEST) else None,
        num_planned=_num_planned(document, trials, events),
        trials=results,
        statuses=_statuses(results, events, is_over=status == "complete"),
        totals=totals_of(results, slots(events), training_wall_s(events)),
        probes=tuple(_without_frame(event) for event in events if event["kind"] == "probe"),
        events={kind: sum(event["kind"] == kind for event in events) for kind in _COUNTED},
        finalists=judge_run(results, events, metric, mode),
        cross_validation=_cross_validated(document, results, metric, mode),
        notes=tuple(document.get("data", {}).get("notes", ())),
    )


def _cross_validated(
    document: Mapping[str, Any], results: Sequence[TrialResult], metric: str, mode: Mode
) -> tuple[CrossValidation, ...]:
    num_folds = document["job"].get("data", {}).get("k_folds")
    if num_folds is None or document.get("search") is not None:
        return ()
    return cross_validate(results, num_folds, metric, mode)


def run_status(events: Sequence[Mapping[str, Any]], *, is_exported: bool) -> RunStatus:
    """Of the newest attempt: an extended run is not complete because it once was."""
    newest = max((event["attempt"] for event in events), default=0)
    kinds = {event["kind"] for event in events if event["attempt"] == newest}
    if "budget" in kinds:
        return "budget used up"
    return "complete" if "completed" in kinds and is_exported else "not complete"


def totals_of(trials: Iterable[TrialResult], num_slots: int, wall_s: float) -> Totals:
    """What all trials took together."""
    ledger, waiting_s = Ledger(), 0.0
    for trial in trials:
        ledger, waiting_s = ledger.plus(trial.ledger), waiting_s + trial.waiting_s
    return Totals(ledger, waiting_s, num_slots, wall_s)


def trial_document(trial: TrialResult) -> dict[str, Any]:
    """One trial as JSON, with the wall that the parts of its ledger add up to."""
    values = asdict(trial)
    return {**values, "ledger": {**values["ledger"], "wall_s": trial.ledger.wall_s}}


def board_document(board: Leaderboard) -> dict[str, Any]:
    """A leaderboard as JSON, with what the sweep as a whole took."""
    totals = totals_of(board.trials, board.slots, board.training_wall_s)
    finalists = [asdict(finalist) for finalist in board.finalists]
    reason = why(board.finalists, board.trials, board.metric, board.mode)
    return {**board.to_json(), "totals": totals.to_json(), "finalists": finalists, "why": reason}


def why(finalists: Sequence[Finalist], trials: Iterable[TrialResult], metric: str, mode: Mode) -> str | None:
    """What decided between the finalists, in one line; None where there are none."""
    return why_it_won(finalists, metric, mode, {t.trial_id: t.model_name for t in trials}) if finalists else None


_COUNTED = ("retried", "recycled", "lost", "promoted", "exploited")
_FRAME = ("time", "attempt", "kind", "trial")


def _statuses(results: Sequence[TrialResult], events: Iterable[Mapping[str, Any]], *, is_over: bool) -> dict[str, str]:
    halted = {event["trial"] for event in events if event["kind"] == "halted"}
    return {
        trial.trial_id: "paused"
        if trial.status == "halted" and not is_over and trial.trial_id not in halted
        else trial.status
        for trial in results
    }


def _first_proposed(events: Iterable[Mapping[str, Any]]) -> TrialSpec:
    for event in events:
        if event["kind"] == "proposed" and event["trials"]:
            return proposed_trials(event)[0]
    raise StorageError("the run has no trials yet")


def _num_planned(document: Mapping[str, Any], trials: Sequence[TrialSpec], events: Iterable[Mapping[str, Any]]) -> int:
    known = {trial.trial_id for trial in trials}
    asked = (document.get("search") or {}).get("trials") or 0
    for event in events:
        if event["kind"] == "proposed":
            known |= {trial["trial_id"] for trial in event["trials"]}
        elif event["kind"] in ("extended", "completed"):  # with --extend it is more than the search file says
            asked = max(asked, event.get("trials") or 0)
    return max(len(known), asked)


def _without_frame(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in _FRAME}


def _near(storage: Storage) -> str:
    """Runs beside the one that is not there: of the same job, or with a name like it."""
    siblings, name = storage.parent, storage.root.rpartition("/")[2]
    names = [found for found in siblings.list_names() if siblings.exists(f"{found}/{RUN_FILE}")] if name else []
    near = [found for found in names if found.startswith(f"{name}-")] or difflib.get_close_matches(name, names, n=3)
    shown = [storage.uri_beside(found) for found in near]
    if not shown and name:  # the folder of all runs, perhaps
        inside = [found for found in storage.list_names() if storage.exists(f"{found}/{RUN_FILE}")]
        shown = [storage.uri_of(found) for found in inside[-3:]]
    return f"; did you mean {' or '.join(shown)}?" if shown else ""
