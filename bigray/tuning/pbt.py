"""Population based training (Jaderberg et al. 2017, arXiv 1711.09846), in rounds. Pure.

When the whole population has reached the end of an interval, the worst take over the weights of the best, with changed
settings. One that does so goes on under a new name, so that a trial has one set of settings all its life; the lineage
is in the `exploited` events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from bigray.specs import RangeSpec, SearchSpec, TrainingSpec, TrialSpec
from bigray.training.commands import TakeOver
from bigray.tuning.leg import Outcome
from bigray.tuning.policy import Advance, badness
from bigray.tuning.space import draw, rounded, trial_name

PERTURBATIONS = (0.8, 1.2)


class Pbt:
    """Rounds wait for the slowest, so the same seed gives the same lineage, whatever the timing."""

    def __init__(self, search: SearchSpec, mode: Literal["max", "min"], seed: int) -> None:
        self._search, self._mode, self._seed = search, mode, seed
        self._round: dict[str, tuple[TrialSpec, Outcome]] = {}
        self._num_out = 0
        """Sent out and not yet told."""
        self._is_closed = False
        self._ready: deque[Advance] = deque()

    def begin(self, trial: TrialSpec) -> Advance:
        self._num_out += 1
        return Advance(trial, min(self._search.pbt.interval_epochs, trial.training.epochs))

    def tell(self, trial: TrialSpec, outcome: Outcome) -> None:
        self._num_out -= 1
        self._round[trial.trial_id] = (trial, outcome)
        if self._is_closed and self._num_out == 0:
            self._end_round()

    def take(self) -> Advance | None:
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        """The population is complete: rounds can end."""
        if not self._is_closed:
            self._is_closed = True
            if self._num_out == 0:
                self._end_round()

    def _end_round(self) -> None:
        members = sorted(self._round.values(), key=lambda pair: (badness(pair[1].value, self._mode), pair[0].trial_id))
        self._round = {}
        alive = [(trial, outcome) for trial, outcome in members if outcome.ended is None]
        if not alive:
            return
        epoch = max(outcome.epoch for _, outcome in alive)
        num = min(int(len(members) * self._search.pbt.quantile + 0.5), len(members) // 2)
        best, worst = alive[:num], members[len(members) - num :]
        replaced = {trial.trial_id for trial, outcome in worst if outcome.ended in (None, "diverged")}
        best = [(trial, outcome) for trial, outcome in best if trial.trial_id not in replaced]
        if not best:
            replaced = set()
        for number, (trial, _) in enumerate(pair for pair in worst if pair[0].trial_id in replaced):
            source = best[number % len(best)][0]
            # before their sources go on: a source keeps its last two checkpoints
            self._send(self._explored(trial, source, epoch), epoch, TakeOver(source, epoch))
        for trial, _ in alive:
            if trial.trial_id not in replaced:
                self._send(trial, epoch, None)

    def _send(self, trial: TrialSpec, epoch: int, take_over: TakeOver | None) -> None:
        self._num_out += 1
        until = min(epoch + self._search.pbt.interval_epochs, trial.training.epochs)
        self._ready.append(Advance(trial, until, take_over))

    def _explored(self, trial: TrialSpec, source: TrialSpec, epoch: int) -> TrialSpec:
        """The source with changed settings, under the number of the trial whose place it takes."""
        number = int(trial.trial_id.partition("-")[0])
        generator = np.random.default_rng([self._seed, epoch, number])
        settings = source.training.model_dump()
        for key, values in self._search.space_of(source.model_name).items():
            if key != "epochs":  # its length of life is the population's
                settings[key] = self._perturbed(key, values, source.training, generator)
        return source.model_copy(
            update={
                "trial_id": f"{trial_name(number, source.model_name)}-at{epoch}",
                "training": TrainingSpec.model_validate(settings),
            }
        )

    def _perturbed(self, key: str, values: RangeSpec, training: TrainingSpec, generator: np.random.Generator) -> Any:
        if generator.random() < self._search.pbt.resample_probability:
            return draw(values, generator)
        if values.choice is not None:
            place = _place_of(key, values.choice, training) + int(generator.choice([-1, 1]))
            return values.choice[min(max(place, 0), len(values.choice) - 1)]
        low, high = values.uniform or values.log_uniform or (0.0, 0.0)
        return rounded(getattr(training, key) * float(generator.choice(PERTURBATIONS)), low, high)


def _place_of(key: str, choices: Sequence[Any], training: TrainingSpec) -> int:
    """Which of the choices a trial has: a specification may write one otherwise than the file, such as 0 as 0.0."""
    settings = training.model_dump()
    as_written = [TrainingSpec.model_validate({**settings, key: choice}).model_dump()[key] for choice in choices]
    return as_written.index(settings[key])
