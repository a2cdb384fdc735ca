"""Legs: the pieces of work that a sweep is cut into, and what comes out of each. Plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from bigray.specs import TrialSpec
from bigray.training.commands import Command, Lane, ProbeStack, TakeOver, TrainStack, TrainTo, TrialState


@dataclass(frozen=True)
class Leg:
    """One piece of work for one worker group."""

    number: int
    """In the order of decision; results are applied in this order too."""
    kind: Literal["alone", "stacked", "probe"]
    trials: tuple[TrialSpec, ...]
    """One, or the lanes of a stack."""
    epoch: int
    """Train to this epoch; of a probe, 0."""
    stacks: tuple[str | None, ...] = ()
    """For each trial the stack that holds its newest state."""
    take_over: TakeOver | None = None
    num_lanes: int = 0
    """Of a probe: the lanes to time."""
    time_a_row: bool = False
    """As in `TrainTo`."""
    keep_begin: bool = False
    """As in `TrainTo`."""
    was_split: bool = False
    """Its trial ran out of memory before, and goes on in smaller passes: it is split once."""

    @property
    def name(self) -> str:
        return f"leg-{self.number:06d}"

    @property
    def command(self) -> Command:
        if self.kind == "probe":
            return ProbeStack(self.trials[0], self.num_lanes)
        if self.kind == "stacked":
            lanes = tuple(Lane(trial, stack) for trial, stack in zip(self.trials, self.stacks, strict=True))
            return TrainStack(self.name, lanes, self.epoch)
        return self.alone(0)

    def alone(self, lane: int) -> TrainTo:
        """The command for one of its trials by itself."""
        return TrainTo(
            self.trials[lane], self.epoch, self.take_over, self.stacks[lane], self.time_a_row, self.keep_begin
        )


@dataclass(frozen=True)
class Outcome:
    """What a leg came to for one of its trials."""

    trial_id: str
    epoch: int
    """Complete ones; less than the leg's where the run was told to rest."""
    value: float
    """The best value of the selection metric so far; NaN where there is none."""
    loss: float = math.inf
    """Validation loss of that best epoch."""
    ended: str | None = None
    """As in `TrialState`, or "failed"."""
    stack: str | None = None
    """The stack that holds its state now."""
    micro_batch_size: int | None = None
    """Set where it had to be split."""

    @classmethod
    def of_state(cls, trial: TrialSpec, epoch: int, state: TrialState, stack: str | None) -> Outcome:
        """Of a trial that was to be trained to `epoch`."""
        return cls(
            trial_id=trial.trial_id,
            epoch=min(epoch, state.epoch),
            value=math.nan if state.ended == "diverged" else state.best_value_at(epoch),
            loss=state.best_metrics.get("val_loss", math.inf),
            ended=state.ended if state.ended == "diverged" or state.epoch <= epoch else None,
            stack=stack,
            micro_batch_size=state.micro_batch_size,
        )

    @classmethod
    def failed(cls, trial: TrialSpec) -> Outcome:
        return cls(trial.trial_id, 0, math.nan, ended="failed")

    def to_json(self) -> dict[str, Any]:
        """Without NaN and infinity, which JSON has not."""
        document: dict[str, Any] = {"trial": self.trial_id, "epoch": self.epoch, "ended": self.ended}
        document |= {"stack": self.stack, "micro_batch_size": self.micro_batch_size}
        for name, number in (("value", self.value), ("loss", self.loss)):
            document[name] = number if math.isfinite(number) else None
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Outcome:
        value, loss = document["value"], document["loss"]
        return cls(
            trial_id=document["trial"],
            epoch=document["epoch"],
            value=math.nan if value is None else value,
            loss=math.inf if loss is None else loss,
            ended=document["ended"],
            stack=document["stack"],
            micro_batch_size=document["micro_batch_size"],
        )


@dataclass(frozen=True)
class LegResult:
    """What a whole leg came to."""

    number: int
    outcomes: tuple[Outcome, ...]
    is_stacked: bool | None = None
    """Of a probe: what it chose."""

    def to_json(self) -> dict[str, Any]:
        outcomes = [outcome.to_json() for outcome in self.outcomes]
        return {"number": self.number, "outcomes": outcomes, "is_stacked": self.is_stacked}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> LegResult:
        outcomes = tuple(Outcome.from_json(outcome) for outcome in document["outcomes"])
        return cls(document["number"], outcomes, document["is_stacked"])
