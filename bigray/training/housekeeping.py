"""Retention across a run: as trials end, all but the best of them shrink to their record (driver)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigray.paths import RunPaths
from bigray.ranking import trial_results
from bigray.results import TrialResult
from bigray.specs import TrialSpec
from bigray.training.checkpoint_writer import trim_trial
from bigray.training.commands import Event
from bigray.training.retention import trials_to_trim


class Housekeeping:
    """Keeps the disk of a sweep bounded by the trials that run and the best that have ended (`training.keep`)."""

    def __init__(
        self,
        paths: RunPaths,
        trials: Sequence[TrialSpec],
        attempt: int,
        keep_best: int,
        earlier: Iterable[Mapping[str, Any]],
    ) -> None:
        """`earlier`: the journal of the attempts before, where the run goes on."""
        self._paths, self._trials, self._attempt, self._keep_best = paths, trials, attempt, keep_best
        self._events = [event for event in earlier if event["kind"] in ("state", "failed")]
        self._trimmed: set[str] = set()

    def note(self, events: Sequence[Event]) -> None:
        """Take in what happened, and trim where a trial has ended.

        Raises:
            StorageError: a newer attempt has taken over this run, or its folder cannot be changed.
        """
        news = [event for event in events if event.kind in ("state", "failed")]
        self._events += [{"kind": event.kind, "trial": event.trial_id, **event.values} for event in news]
        if any(event.values.get("ended") for event in news):
            self._trim([result for result in self._results() if result.status != "halted"])

    def finish(self) -> None:
        """The run is complete: trials that were halted by the scheduler will not go on either."""
        self._trim(self._results())

    def _results(self) -> list[TrialResult]:
        return trial_results(self._trials, self._events)

    def _trim(self, ended: list[TrialResult]) -> None:
        training = self._trials[0].training
        chosen = trials_to_trim(ended, self._keep_best, training.selection_metric, training.selection_mode)
        for trial_id in chosen:
            if trial_id not in self._trimmed:
                self._trimmed.add(trial_id)
                trim_trial(self._paths, trial_id, self._attempt)
