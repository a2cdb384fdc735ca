"""Retention across a run: as trials end, all but the best of them shrink to their record (driver)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from bigray.paths import STACKS, RunPaths
from bigray.ranking import trial_results
from bigray.results import TrialResult
from bigray.specs import TrialSpec
from bigray.training.checkpoint_writer import trim_trial
from bigray.training.commands import Event
from bigray.training.retention import trials_to_trim

_ABOUT_TRIALS = ("state", "failed", "checkpoint", "proposed", "finalists")


class Housekeeping:
    """Keeps the disk of a sweep bounded by the trials that run and the best that have ended (`training.keep`).

    The cost of an event does not grow with the trials before it.
    """

    def __init__(
        self,
        paths: RunPaths,
        trials: Sequence[TrialSpec],
        attempt: int,
        keep_best: int,
        earlier: Iterable[Mapping[str, Any]],
        *,
        is_population: bool = False,
    ) -> None:
        """`earlier`: the journal of the attempts before, where the run goes on."""
        self._is_population = is_population
        self._paths, self._attempt, self._keep_best = paths, attempt, keep_best
        self._trials = {trial.trial_id: trial for trial in trials}
        self._results: dict[str, TrialResult] = {}
        """The newest of each trial that has a folder of its own: what was stacked has none."""
        self._have_folder: set[str] = set()
        self._ended: set[str] = set()
        """Ended, and not trimmed."""
        self._finalists: tuple[str, ...] = ()
        for event in earlier:
            self._take_in(event)

    def note(self, events: Sequence[Event]) -> None:
        """Take in what happened, and trim where a trial has ended.

        Raises:
            StorageError: a newer attempt has taken over this run, or its folder cannot be changed.
        """
        before = set(self._ended)
        for event in events:
            if event.kind in _ABOUT_TRIALS:
                self._take_in({"kind": event.kind, "trial": event.trial_id, **event.values})
        if self._ended != before:
            self._trim([self._results[trial_id] for trial_id in sorted(self._ended) if not self._is_needed(trial_id)])

    def finish(self, winners: Collection[str] = ()) -> None:
        """The run is complete: trials that were halted by the scheduler will not go on either.

        `winners` keep their weights, whatever their own metric: an extension may judge them again.
        """
        self._trim([result for name, result in self._results.items() if name not in winners])
        self._paths.storage.delete_folder(STACKS)

    def _take_in(self, event: Mapping[str, Any]) -> None:
        trial_id = event.get("trial", "")
        match event["kind"]:
            case "proposed":
                proposed = [TrialSpec.model_validate_json(json.dumps(document)) for document in event["trials"]]
                self._trials |= {trial.trial_id: trial for trial in proposed}
            case "finalists":
                self._finalists = tuple(event["trials"])
            case "checkpoint":
                self._have_folder.add(trial_id)
            case "state" | "failed" if trial_id in self._have_folder:
                for result in trial_results([self._trials[trial_id]], [event]):
                    self._results[trial_id] = result
                    if result.status != "halted":
                        self._ended.add(trial_id)

    def _is_needed(self, trial_id: str) -> bool:
        """A finalist's seed or fold, which is not judged by its own metric alone; a member of a population, whose
        weights another may be about to take over."""
        return self._is_population or any(trial_id.startswith(f"{finalist}-") for finalist in self._finalists)

    def _trim(self, ended: list[TrialResult]) -> None:
        training = next(iter(self._trials.values())).training
        chosen = trials_to_trim(ended, self._keep_best, training.selection_metric, training.selection_mode)
        for trial_id in chosen:
            trim_trial(self._paths, trial_id, self._attempt)
            self._ended.discard(trial_id)
            del self._results[trial_id]
