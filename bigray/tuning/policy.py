"""What a scheduler decides, and the simplest one. Pure: told of outcomes, it says which trials go on, and how far."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol

from bigray.specs import SearchSpec, TrialSpec
from bigray.training.commands import TakeOver
from bigray.tuning.leg import Outcome


@dataclass(frozen=True)
class Advance:
    """A decision to train a trial (further)."""

    trial: TrialSpec
    epoch: int
    """To this epoch."""
    take_over: TakeOver | None = None
    is_promotion: bool = False


class Policy(Protocol):
    """A scheduler. The same calls in the same order give the same decisions."""

    def begin(self, trial: TrialSpec) -> Advance:
        """How far a new trial goes at first."""

    def tell(self, trial: TrialSpec, outcome: Outcome) -> None:
        """What a trial came to where it was sent."""

    def take(self) -> Advance | None:
        """The next trial to send on; None where none is ready."""

    def close(self) -> None:
        """No new trials will begin, and everything sent out has been told."""


def badness(value: float, mode: Literal["max", "min"]) -> float:
    """Ascending from the best; NaN comes last."""
    if value != value:
        return float("inf")
    return -value if mode == "max" else value


def milestones(first: int, factor: int, last: int) -> tuple[int, ...]:
    """`first` x `factor`^k below `last`, and `last`."""
    found = []
    milestone = first
    while milestone < last:
        found.append(milestone)
        milestone *= factor
    return (*found, last)


class ToTheEnd:
    """Every trial trains all its epochs."""

    def begin(self, trial: TrialSpec) -> Advance:
        return Advance(trial, trial.training.epochs)

    def tell(self, trial: TrialSpec, outcome: Outcome) -> None:
        pass

    def take(self) -> Advance | None:
        return None

    def close(self) -> None:
        pass


class MedianStopping:
    """A trial whose best value is worse than the median of the others' at the same epoch ends there.

    Looks at multiples of `grace_epochs`; of an even number of others the worse middle one counts. It compares best
    values so far, where Vizier's rule compares with the others' running averages (Golovin et al. 2017, section 3.2.2):
    they are what a trial reports at a pause.
    """

    def __init__(self, search: SearchSpec, mode: Literal["max", "min"]) -> None:
        self._grace, self._min_trials, self._mode = search.median.grace_epochs, search.median.min_trials, mode
        self._values: dict[int, list[float]] = {}
        """Badness of all that came to an epoch, sorted."""
        self._ready: deque[Advance] = deque()

    def begin(self, trial: TrialSpec) -> Advance:
        return Advance(trial, min(self._grace, trial.training.epochs))

    def tell(self, trial: TrialSpec, outcome: Outcome) -> None:
        others = self._values.setdefault(outcome.epoch, [])
        is_worse = len(others) >= self._min_trials and badness(outcome.value, self._mode) > others[len(others) // 2]
        insort(others, badness(outcome.value, self._mode))
        if outcome.ended is None and not is_worse:
            self._ready.append(Advance(trial, min(outcome.epoch + self._grace, trial.training.epochs)))

    def take(self) -> Advance | None:
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        pass
