"""Asynchronous successive halving with promotion (Li et al. 2020, arXiv 1810.05934, algorithm 2). Pure.

Ray Tune's `ASHAScheduler` decides about a trial once, when it reaches a rung, by what few others have shown until then,
and never takes a decision back. Here a trial waits at its rung, and is promoted when it is among the best of all that
have reached it; so it works with one slot too.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from bigray.specs import SearchSpec, TrialSpec
from bigray.tuning.leg import Outcome
from bigray.tuning.policy import Advance, badness, milestones

Key = tuple[float, float, str]
"""Badness of the metric, then the loss (metrics of small validation sets tie often), then the id."""


@dataclass
class _Rung:
    reached: set[str] = field(default_factory=set)
    results: list[Key] = field(default_factory=list)
    """Of all that have reached it, sorted."""
    waiting: list[Key] = field(default_factory=list)
    """A heap of those that could be promoted."""


class Asha:
    """Each call costs O(log n), but for an insertion into a sorted list."""

    def __init__(self, search: SearchSpec, mode: Literal["max", "min"]) -> None:
        self._grace, self._factor, self._mode = search.asha.grace_epochs, search.asha.reduction_factor, mode
        self._rungs: dict[int, _Rung] = {}
        """By index: trials with other `epochs` have the same rungs but for the last."""
        self._trials: dict[str, TrialSpec] = {}
        self._ready: deque[Advance] = deque()
        self._has_finished = False
        """Whether a trial has come to its last epoch."""

    def begin(self, trial: TrialSpec) -> Advance:
        self._trials[trial.trial_id] = trial
        return Advance(trial, self._epochs(trial)[0])

    def tell(self, trial: TrialSpec, outcome: Outcome) -> None:
        self._trials[trial.trial_id] = trial
        epochs = self._epochs(trial)
        reached = [index for index, epoch in enumerate(epochs) if epoch <= outcome.epoch]
        index = reached[-1] if reached else 0  # one that failed counts where it began
        if index == len(epochs) - 1:
            self._has_finished = self._has_finished or outcome.ended not in ("diverged", "failed")
            return
        rung = self._rungs.setdefault(index, _Rung())
        if trial.trial_id in rung.reached:
            return  # it was promoted from here, and ended before the next
        rung.reached.add(trial.trial_id)
        key = (badness(outcome.value, self._mode), outcome.loss, trial.trial_id)
        insort(rung.results, key)
        if outcome.ended is None:
            heapq.heappush(rung.waiting, key)
        self._promote(index, rung)

    def take(self) -> Advance | None:
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        """Of a rung with few results nobody is the best third: the best that has come the furthest trains to its end.

        Whoever wins has then been trained as long as the job asks for.
        """
        if self._has_finished:
            return
        furthest = max((index for index, rung in self._rungs.items() if rung.waiting), default=None)
        if furthest is not None:
            self._promote_best(furthest, self._rungs[furthest])

    def _epochs(self, trial: TrialSpec) -> tuple[int, ...]:
        return milestones(self._grace, self._factor, trial.training.epochs)

    def _promote(self, index: int, rung: _Rung) -> None:
        """Those among the best 1/factor of their rung: the best that waits tells whether there is any."""
        while rung.waiting and bisect_left(rung.results, rung.waiting[0]) < len(rung.results) // self._factor:
            self._promote_best(index, rung)

    def _promote_best(self, index: int, rung: _Rung) -> None:
        trial = self._trials[heapq.heappop(rung.waiting)[2]]
        self._ready.append(Advance(trial, self._epochs(trial)[index + 1], is_promotion=True))
