"""A sweep run without groups: legs end at once or in any order, by a formula for what a trial reaches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigray.specs import JobSpec, SearchSpec, TrialSpec
from bigray.training.commands import Event
from bigray.tuning.leg import Leg, LegResult, Outcome
from bigray.tuning.policies import make_policy
from bigray.tuning.proposals import make_proposer
from bigray.tuning.sweep import FoldOf, Sweep

SPACE = {"lr": {"log_uniform": [1e-4, 1e-1]}, "global_batch_size": {"choice": [32, 64, 128]}}
Curve = Callable[[TrialSpec, int], float]


def make_job(*models: str, epochs: int = 20, seed: int = 0, **training: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "digits",
            "seed": seed,
            "data": {"source": "rows.csv", "target": "label"},
            "models": {name: {"factory": f"bigray.models:{name}"} for name in models or ("mlp",)},
            "training": {"task": "classification", "epochs": epochs, **training},
        }
    )


def make_search(**document: Any) -> SearchSpec:
    return SearchSpec.model_validate({"space": SPACE, "trials": 27, **document})


def curve(trial: TrialSpec, epoch: int) -> float:
    """Best at lr 0.01, better with every epoch; no two trials are equal."""
    distance = abs(math.log10(trial.training.lr) + 2)
    return 1.0 - 0.3 * distance - 0.2 / epoch - trial.training.batch_size * 1e-6


class Simulation:
    """Runs a sweep with `at_once` legs under way; which of them ends next is drawn from `order_seed`."""

    def __init__(
        self,
        job: JobSpec,
        search: SearchSpec,
        *,
        slots: int = 1,
        at_once: int | None = None,
        order_seed: int = 0,
        stack: bool = False,
        fate: Mapping[str, str] | None = None,
        reached: Curve = curve,
        recorded: Mapping[int, LegResult] | None = None,
        chapters: tuple[int, ...] = (),
        folds: Sequence[FoldOf] = (),
    ) -> None:
        self.sweep = Sweep(
            search,
            "max",
            make_proposer(job, search, "max"),
            make_policy(search, "max", job.seed),
            slots=slots,
            can_stack=stack,
            chapters=chapters,
            folds=folds,
        )
        self._at_once, self._random = at_once or slots, random.Random(order_seed)
        self._stack, self._fate, self._reached = stack, fate or {}, reached
        self._recorded = dict(recorded or {})
        self._epochs: dict[str, int] = {}
        self.legs: list[Leg] = []
        """Those that were run here, in the order of decision."""
        self.results: dict[int, LegResult] = {}
        self.news: list[Event] = []

    def run(self, max_legs: int | None = None) -> Simulation:
        """To the end, or until so many legs were run: what is under way then is lost."""
        under_way: list[Leg] = []
        while True:
            while len(under_way) < self._at_once and (leg := self.sweep.next_leg()) is not None:
                self.news += self.sweep.take_news()
                if leg.number in self._recorded:
                    self._tell(self._recorded.pop(leg.number))
                else:
                    under_way.append(leg)
            if not under_way or (max_legs is not None and len(self.legs) >= max_legs):
                return self
            leg = under_way.pop(self._random.randrange(len(under_way)))
            self.legs.append(leg)
            self._tell(self._carry_out(leg))

    @property
    def epochs(self) -> dict[str, int]:
        """How far each trial came."""
        found: dict[str, int] = {}
        for result in self.results.values():
            for outcome in result.outcomes:
                found[outcome.trial_id] = max(outcome.epoch, found.get(outcome.trial_id, 0))
        return found

    @property
    def values(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for _, result in sorted(self.results.items()):
            found |= {outcome.trial_id: outcome.value for outcome in result.outcomes}
        return found

    @property
    def winner(self) -> str:
        values = {trial_id: value for trial_id, value in self.values.items() if not math.isnan(value)}
        return max(values, key=lambda trial_id: values[trial_id])

    def _tell(self, result: LegResult) -> None:
        self.results[result.number] = result
        self.sweep.tell(result)

    def _carry_out(self, leg: Leg) -> LegResult:
        if leg.kind == "probe":
            return LegResult(leg.number, (), self._stack)
        return LegResult(leg.number, tuple(self._outcome(trial, leg) for trial in leg.trials))

    def _outcome(self, trial: TrialSpec, leg: Leg) -> Outcome:
        fate = self._fate.get(trial.trial_id)
        if fate == "failed":
            return Outcome.failed(trial)
        stack = leg.name if leg.kind == "stacked" else None
        if fate == "diverged":
            return Outcome(trial.trial_id, 1, math.nan, ended="diverged", stack=stack)
        ended = "finished" if leg.epoch == trial.training.epochs else None
        return Outcome(trial.trial_id, leg.epoch, self._reached(trial, leg.epoch), ended=ended, stack=stack)
