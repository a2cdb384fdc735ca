"""Where a sweep's trials come from: a list drawn up front, or Optuna, which learns from those before (driver)."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, Protocol

from bigray.specs import JobSpec, RangeSpec, SearchSpec, TrialSpec
from bigray.tuning.leg import Outcome
from bigray.tuning.policy import badness
from bigray.tuning.space import make_trial, models_in_turn, rounded, search_trials


class Proposer(Protocol):
    """The same calls in the same order give the same trials."""

    def propose(self, count: int) -> list[TrialSpec]:
        """Up to `count` new trials, at least one while there are any; none where there are no more."""

    def tell(self, trial: TrialSpec, outcome: Outcome) -> None:
        """What a trial came to at its newest pause or end."""

    def extend(self, total: int) -> None:
        """Go on to this many trials in all."""


class Drawn:
    """Random and grid search: every trial is known before the first one runs."""

    def __init__(self, job: JobSpec, search: SearchSpec) -> None:
        self._job, self._search = job, search
        self._left = search_trials(job, search)

    def propose(self, count: int) -> list[TrialSpec]:
        """All that are left: a stack takes its lanes from wherever they are."""
        taken, self._left = self._left, ()
        return list(taken)

    def tell(self, trial: TrialSpec, outcome: Outcome) -> None:
        pass

    def extend(self, total: int) -> None:
        before = len(search_trials(self._job, self._search))
        self._search = self._search.model_copy(update={"trials": total})
        self._left = search_trials(self._job, self._search)[before:]


class Tpe:
    """Optuna's TPE through Ray Tune's `OptunaSearch`, one study for each model.

    A trial that was paused for good, or failed, still teaches: its newest value counts, a failed one's is the worst.
    """

    STARTUP_TRIALS = 10
    """Optuna draws as many at random first."""

    def __init__(self, job: JobSpec, search: SearchSpec, mode: Literal["max", "min"]) -> None:
        assert search.trials is not None, "SearchSpec requires trials for tpe"
        self._job, self._search, self._mode = job, search, mode
        self._total, self._number = search.trials, 0
        self._models = models_in_turn(job)
        self._studies = {name: _study(search, name, job.seed + number) for number, name in enumerate(job.models)}
        self._told: dict[str, float] = {}
        """Badness of those that Optuna has not heard of yet."""
        self._worst: float | None = None
        self._open: dict[str, TrialSpec] = {}
        """Proposed, and not told to Optuna yet."""

    def propose(self, count: int) -> list[TrialSpec]:
        self._tell_optuna()
        proposed = []
        for _ in range(min(count, self._total - self._number)):
            name = next(self._models)
            trial_number, self._number = self._number, self._number + 1
            point = self._studies[name].suggest(str(trial_number))
            assert point is not None, "OptunaSearch always has a suggestion"
            space = self._search.space_of(name)
            config = {key: _plain(space[key], point[key]) for key in space}
            proposed.append(make_trial(self._job, self._search, trial_number, name, config))
        self._open |= {trial.trial_id: trial for trial in proposed}
        return proposed

    def extend(self, total: int) -> None:
        self._total = total

    def tell(self, trial: TrialSpec, outcome: Outcome) -> None:
        value = badness(outcome.value, self._mode)
        if value != math.inf:
            self._worst = value if self._worst is None else max(self._worst, value)
        if trial.trial_id in self._open:
            self._told[trial.trial_id] = value

    def _tell_optuna(self) -> None:
        """Values as they are now: Optuna takes one value of a trial, once."""
        for trial_id, value in self._told.items():
            trial = self._open.pop(trial_id)
            number = str(int(trial_id.partition("-")[0]))
            self._studies[trial.model_name].on_trial_complete(number, {"badness": min(value, self._worst or 0.0)})
        self._told = {}


def _study(search: SearchSpec, model_name: str, seed: int) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
    space = {key: _distribution(values) for key, values in search.space_of(model_name).items()}
    # within one round of proposals no result comes in between: the unfinished ones count as bad, so that they spread
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=Tpe.STARTUP_TRIALS, multivariate=True, constant_liar=True
    )
    return OptunaSearch(space, metric="badness", mode="min", sampler=sampler)


def _distribution(values: RangeSpec) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if values.choice is not None:
        return CategoricalDistribution(range(len(values.choice)))  # by index: a choice may be anything
    if values.uniform is not None:
        return FloatDistribution(*values.uniform)
    assert values.log_uniform is not None, "RangeSpec has exactly one kind"
    return FloatDistribution(*values.log_uniform, log=True)


def _plain(values: RangeSpec, value: Any) -> Any:
    if values.choice is not None:
        return values.choice[value]
    low, high = values.uniform or values.log_uniform or (value, value)
    return rounded(value, low, high)


def make_proposer(job: JobSpec, search: SearchSpec, mode: Literal["max", "min"]) -> Proposer:
    return Tpe(job, search, mode) if search.search == "tpe" else Drawn(job, search)
