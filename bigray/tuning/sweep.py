"""A sweep as a state machine: which leg comes next, given what the legs before it came to. Pure; starts nothing.

Legs are decided one after another, leg n from the results of exactly the legs up to n - `slots`, in their order,
whenever each of them really ended. So a sweep depends on its seed and on `slots` alone, not on timing; and one whose
driver was killed is brought back by telling a new one the legs of its journal, as it decides them again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bigray.cross_validation import on_usual_split
from bigray.specs import SearchSpec, TrialSpec
from bigray.training.commands import Event
from bigray.training.stack_key import stack_key
from bigray.tuning.leg import Leg, LegResult, Outcome
from bigray.tuning.policy import Advance, Policy, ToTheEnd, badness
from bigray.tuning.proposals import Proposer
from bigray.tuning.space import reseeded

STACK_LANES = 64
"""Most lanes of a stack: by then a step of a small model is bound by its arithmetic."""
TPE_LANES = 8
"""Trials proposed in one go by a search that learns from the ones before, where they may be stacked."""
FULL_SHARE = 0.5
"""A stack of promoted trials waits, while new ones can begin, until it is filled by this much."""
MIN_LANES = 4
"""For fewer trials of a kind, stacking cannot save what the probe costs."""


FoldOf = Callable[[TrialSpec], TrialSpec]


class _Queue(NamedTuple):
    """Trials that may go on together."""

    epoch: int
    """Where they go."""
    kind: str
    at_epoch: int
    """Where they are: the lanes of a stack begin at one place."""


@dataclass(frozen=True)
class _Seat:
    """Where a trial is now."""

    trial: TrialSpec
    epoch: int
    """Where its state on storage stands; 0 where there is none."""
    stack: str | None = None


class Sweep:
    """Ask `next_leg`, run it, `tell` what came out; until `is_done`."""

    def __init__(
        self,
        search: SearchSpec,
        mode: Literal["max", "min"],
        proposer: Proposer,
        policy: Policy,
        *,
        slots: int,
        can_stack: bool,
        chapters: Sequence[int] = (),
        folds: Sequence[FoldOf] = (),
    ) -> None:
        """`slots`: legs under way at once, at most. `can_stack`: where probes may choose so. `chapters`: trials in all,
        for each time the sweep was extended when it had ended. `folds`: where the data has some, a trial -> the same of
        each fold; finalists are trained on them instead of with other seeds."""
        self._search, self._mode, self._proposer, self._policy = search, mode, proposer, policy
        self._slots, self._chapters, self._folds = slots, deque(chapters), tuple(folds)
        self._can_stack = can_stack and search.stack == "auto" and search.scheduler != "pbt"
        self._legs: list[Leg] = []
        self._results: dict[int, LegResult] = {}
        self._num_applied = 0
        self._fresh: dict[str, deque[TrialSpec]] = {}
        """Proposed and not begun, by kind."""
        self._probing: set[str] = set()
        """Kinds whose probe is under way."""
        self._begun: set[str] = set()
        self._waiting: dict[_Queue, deque[Advance]] = {}
        """Decided and not sent out."""
        self._seats: dict[str, _Seat] = {}
        self._split: set[str] = set()
        """Trials that ran out of memory once, and go on in smaller passes, by themselves."""
        self._best: dict[str, Outcome] = {}
        """The newest outcome of each trial."""
        self._choices: dict[str, bool] = {}
        """By kind: whether its trials are stacked."""
        self._is_exhausted = False
        self._is_stopped = False
        self._finalists: tuple[str, ...] | None = None
        self._news: list[Event] = []

    @property
    def is_waiting(self) -> bool:
        """After `next_leg` gave none: whether there may be another once a leg under way is told."""
        return not self._is_stopped and self._num_applied < len(self._legs)

    @property
    def finalists(self) -> tuple[str, ...]:
        """Ids of the trials that were trained again with several seeds or on each fold; none before it is so far."""
        return self._finalists or ()

    def stop(self) -> None:
        """Decide no more legs: the budget is used up."""
        self._is_stopped = True

    def tell(self, result: LegResult) -> None:
        """What a leg came to; in any order."""
        self._results[result.number] = result

    def take_news(self) -> list[Event]:
        """Decisions since the last call, for the journal and the screen."""
        news, self._news = self._news, []
        return news

    def next_leg(self) -> Leg | None:
        """The next leg; None where one that is under way must be told first, or where the sweep is over."""
        while not self._is_stopped:
            if len(self._legs) - self._num_applied < self._slots:
                leg = self._decide()
                if leg is not None:
                    self._legs.append(leg)
                    return leg
            if not self._apply_next():
                return None
        return None

    def _apply_next(self) -> bool:
        """Take in the oldest leg that was not, if it has been told."""
        if self._num_applied == len(self._legs) or self._num_applied not in self._results:
            return False
        leg, result = self._legs[self._num_applied], self._results.pop(self._num_applied)
        self._num_applied += 1
        if leg.kind == "probe":
            kind = self._kind_of(leg.trials[0])
            self._choices[kind] = bool(result.is_stacked)
            self._probing.discard(kind)
            return True
        trials = {trial.trial_id: trial for trial in leg.trials}
        for outcome in result.outcomes:
            self._apply(trials[outcome.trial_id], outcome)
        return True

    def _apply(self, trial: TrialSpec, outcome: Outcome) -> None:
        if outcome.micro_batch_size is not None:
            training = trial.training.model_copy(update={"micro_batch_size": outcome.micro_batch_size})
            trial = trial.model_copy(update={"training": training})
            self._split.add(trial.trial_id)
        self._seats[trial.trial_id] = _Seat(trial, outcome.epoch, outcome.stack)
        if self._finalists is None:
            self._best[trial.trial_id] = outcome
            self._proposer.tell(trial, outcome)
            self._policy.tell(trial, outcome)
        self._collect()

    def _collect(self) -> None:
        """Line up what the policy has decided."""
        while (advance := self._policy.take()) is not None:
            self._line_up(advance)

    def _line_up(self, advance: Advance) -> None:
        trial = advance.trial
        if trial.trial_id not in self._begun:  # made by the policy
            self._begun.add(trial.trial_id)
            self._news.append(Event("proposed", "", {"trials": [trial.model_dump(mode="json")]}))
        if advance.is_promotion:
            self._news.append(Event("promoted", trial.trial_id, {"epoch": advance.epoch}))
        key = trial.trial_id if trial.trial_id in self._split else self._kind_of(trial)
        seat = self._seats.get(trial.trial_id)
        queue = _Queue(advance.epoch, key, 0 if seat is None else seat.epoch)
        self._waiting.setdefault(queue, deque()).append(advance)

    def _decide(self) -> Leg | None:
        for decide in (self._promote, self._begin, self._flush, self._end_search, self._flush):
            if (leg := decide()) is not None:
                return leg
        return None

    def _promote(self) -> Leg | None:
        """Those that go furthest first; of trials that can be stacked, not before a stack is worth it."""
        for queue in sorted(self._waiting, key=lambda queue: -queue.epoch):
            num = len(self._waiting[queue])
            if not self._choices.get(queue.kind, False) or num >= FULL_SHARE * self._most_lanes():
                return self._send_waiting(queue)
        return None

    def _begin(self) -> Leg | None:
        """New trials: the first, and where its kind is stacked, others of its kind; or a probe of that.

        While a kind is being probed, others may begin.
        """
        self._propose()
        kinds = [kind for kind in self._fresh if kind not in self._probing]
        if not kinds:
            return None
        key = min(kinds, key=lambda kind: int(self._fresh[kind][0].trial_id.partition("-")[0]))
        if self._needs_probe(key):
            self._probing.add(key)
            lanes = min(len(self._fresh[key]), self._most_lanes())
            return Leg(len(self._legs), "probe", (self._fresh[key][0],), 0, num_lanes=lanes)
        queue = self._fresh[key]
        num = min(len(queue), self._most_lanes()) if self._choices.get(key, False) else 1
        advances = [self._policy.begin(queue.popleft()) for _ in range(num)]
        self._begun |= {advance.trial.trial_id for advance in advances}
        if not queue:
            del self._fresh[key]
        begun = _Queue(advances[0].epoch, key, 0)
        self._waiting.setdefault(begun, deque()).extend(advances)
        return self._send_waiting(begun)

    def _propose(self) -> None:
        if self._fresh or self._is_exhausted:
            return
        # not by what the probes found: the same seed proposes the same trials on a faster machine
        trials = self._proposer.propose(self._most_lanes() if self._can_stack else 1)
        self._is_exhausted = not trials
        if self._search.search == "tpe" and trials:
            self._news.append(Event("proposed", "", {"trials": [trial.model_dump(mode="json") for trial in trials]}))
        for trial in trials:
            self._fresh.setdefault(self._kind_of(trial), deque()).append(trial)

    def _kind_of(self, trial: TrialSpec) -> str:
        """Trials of one kind may share a stack. Where nothing is stacked, all are of one."""
        return stack_key(trial) if self._can_stack else ""

    def _flush(self) -> Leg | None:
        """Nothing new can begin: send what waits, the shortest way first, since others may join the longer ones."""
        if not self._waiting:
            return None
        return self._send_waiting(min(self._waiting))

    def _end_search(self) -> Leg | None:
        """Once all is told: let the policy end its round, train the finalists with other seeds, begin a new chapter."""
        if self._num_applied < len(self._legs):
            return None
        if self._finalists is None:
            self._policy.close()
            self._collect()
            if not self._waiting:
                self._choose_finalists()
        if not self._waiting and self._chapters:
            self._proposer.extend(self._chapters.popleft())
            self._is_exhausted, self._finalists = False, None
            # the stacks went when the sweep was complete: a trial that is promoted now trains again from the start
            self._seats = {trial_id: _Seat(seat.trial, 0) for trial_id, seat in self._seats.items()}
            return self._begin()
        return None

    def _choose_finalists(self) -> None:
        """Each of the best once more for every seed, to the end; with folds, for each of them and the usual split."""
        named = [o for o in self._best.values() if math.isfinite(o.value) and o.ended not in ("failed", "diverged")]
        named.sort(key=lambda o: (badness(o.value, self._mode), o.loss, o.trial_id))
        self._finalists = tuple(outcome.trial_id for outcome in named[: self._search.finalists])
        if not self._finalists:
            return
        over = {"folds": len(self._folds)} if self._folds else {"seeds": self._search.seeds}
        self._news.append(Event("finalists", "", {"trials": list(self._finalists), **over}))
        everywhere = ToTheEnd()
        for trial_id in self._finalists:
            for trial in self._again(self._seats[trial_id].trial):
                self._line_up(everywhere.begin(trial))

    def _again(self, finalist: TrialSpec) -> list[TrialSpec]:
        if self._folds:
            return [*(of_fold(finalist) for of_fold in self._folds), on_usual_split(finalist)]
        return [reseeded(finalist, number) for number in range(1, self._search.seeds + 1)]

    def _needs_probe(self, key: str) -> bool:
        return self._can_stack and key not in self._choices and len(self._fresh[key]) >= MIN_LANES

    def _most_lanes(self) -> int:
        return TPE_LANES if self._search.search == "tpe" else STACK_LANES

    def _send_waiting(self, queue: _Queue) -> Leg:
        waiting = self._waiting[queue]
        is_stacked = self._choices.get(queue.kind, False) and len(waiting) > 1
        num = min(len(waiting), self._most_lanes()) if is_stacked else 1
        advances = [waiting.popleft() for _ in range(num)]
        if not waiting:
            del self._waiting[queue]
        trials = tuple(advance.trial for advance in advances)
        return Leg(
            number=len(self._legs),
            kind="stacked" if is_stacked else "alone",
            trials=trials,
            epoch=queue.epoch,
            stacks=tuple(self._stack_of(trial) for trial in trials),
            take_over=None if is_stacked else advances[0].take_over,
            time_a_row=self._finalists is not None,
            keep_begin=self._search.scheduler == "pbt",
            was_split=trials[0].trial_id in self._split,
        )

    def _stack_of(self, trial: TrialSpec) -> str | None:
        seat = self._seats.get(trial.trial_id)
        return seat.stack if seat is not None else None
