"""A sweep as Ray Tune's search algorithm: what Tune calls a trial is a leg (driver)."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.tune.search import Searcher

from bigray.errors import TrainingFailed
from bigray.training.commands import Event
from bigray.tuning.leg import Leg, LegResult
from bigray.tuning.sweep import Sweep
from bigray.tuning.trial import FAILURE, RESULT, is_complete

MAX_TRIES = 3
"""Of one leg, where Tune's actor for it dies: killed by hand, or with its node."""


class LegSearcher(Searcher):  # type: ignore[misc]
    """Hands out the legs of a sweep that are not in the journal yet, and tells it what came out."""

    def __init__(
        self,
        sweep: Sweep,
        recorded: Iterable[Mapping[str, Any]],
        offer: Callable[[Leg], None],
        tell: Callable[[list[Event]], None],
        must_stop: Callable[[], bool],
    ) -> None:
        """`recorded`: legs of earlier attempts. `offer` makes a leg known to who carries it out. `tell` is the journal.
        `must_stop`: whether the budget is used up."""
        super().__init__()
        self._sweep, self._offer, self._tell, self._must_stop = sweep, offer, tell, must_stop
        self._recorded = _first_of_each(recorded)
        self._running: dict[str, Leg] = {}
        self._again: deque[Leg] = deque()
        self._num_tries: dict[int, int] = {}
        self.failure: str | None = None
        """Why the sweep cannot go on."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next leg, None while that depends on one that is under way, or `Searcher.FINISHED`."""
        if self.failure is not None or self._must_stop():
            self._sweep.stop()
            return str(Searcher.FINISHED)
        leg = self._again.popleft() if self._again else self._next_unrecorded()
        if leg is None:
            return None if self._sweep.is_waiting else str(Searcher.FINISHED)
        self._offer(leg)
        self._running[trial_id] = leg
        self._num_tries[leg.number] = self._num_tries.get(leg.number, 0) + 1
        return {"leg": leg.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A leg is done, or the actor that saw to it is gone."""
        leg = self._running.pop(trial_id, None)
        if leg is None:
            return
        if result is not None and FAILURE in result:
            self.failure = result[FAILURE]
            return
        if error or result is None or RESULT not in result:
            self._try_again(leg)
            return
        told = LegResult.from_json(json.loads(result[RESULT]))
        if is_complete(leg, told):
            self._sweep.tell(told)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A leg has one result, its last."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its search algorithm, to resume from; a sweep is brought back from the journal instead."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a sweep is brought back from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""

    def raise_failure(self) -> None:
        """Where the sweep could not go on.

        Raises:
            TrainingFailed: with the reason.
        """
        if self.failure is not None:
            raise TrainingFailed(self.failure)

    def _next_unrecorded(self) -> Leg | None:
        while (leg := self._sweep.next_leg()) is not None:
            news = self._sweep.take_news()
            recorded = self._recorded.pop(leg.number, None)
            if recorded is None or not _is_of(recorded, leg):
                self._tell(news)
                return leg
            self._sweep.tell(recorded)
        return None

    def _try_again(self, leg: Leg) -> None:
        if self._num_tries[leg.number] < MAX_TRIES:
            self._again.append(leg)
        else:
            ids = ", ".join(trial.trial_id for trial in leg.trials[:3])
            self.failure = f"Tune's actor died {MAX_TRIES} times under {ids}"


def _first_of_each(recorded: Iterable[Mapping[str, Any]]) -> dict[int, LegResult]:
    """A leg that is recorded twice counts as it was the first time: what came after it was decided from that."""
    found: dict[int, LegResult] = {}
    for record in recorded:
        found.setdefault(record["number"], LegResult.from_json(dict(record)))
    return found


def _is_of(result: LegResult, leg: Leg) -> bool:
    """Whether a record is of this very leg: an older bigray may have decided otherwise."""
    if leg.kind == "probe":
        return result.is_stacked is not None
    told = {outcome.trial_id for outcome in result.outcomes}
    return result.is_stacked is None and told == {trial.trial_id for trial in leg.trials} and is_complete(leg, result)
