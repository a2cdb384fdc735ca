"""The Tune side of a leg: an actor that has a worker group carry it out.

It imports no torch, and holds neither a CPU nor a group: the switchboard lends a group out for the length of one
command, so an actor that is killed takes nothing with it. With `reuse_actors=True` Tune hands the same actor the next
leg through `reset_config`.
"""

from __future__ import annotations

import json
from typing import Any

from ray.tune import Trainable

from bigray.errors import GroupLost, TrainingFailed
from bigray.specs import TrialSpec
from bigray.training.commands import Event, Probe, TrialState
from bigray.training.runner import train_alone
from bigray.training.switchboard import ask
from bigray.tuning.leg import Leg, LegResult, Outcome

RESULT = "result"
"""Where a leg's result is in what Tune passes on, as JSON: Tune takes dictionaries apart."""
FAILURE = "failure"
"""Instead of it: why no leg can be carried out any more."""


class LegTrial(Trainable):  # type: ignore[misc]
    """One leg at a time, in one `step`. `config["leg"]` is its number; the driver has given it to the switchboard."""

    def setup(self, config: dict[str, Any], switchboard: Any) -> None:
        self._number, self._switchboard = config["leg"], switchboard

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._number = new_config["leg"]
        return True

    def step(self) -> dict[str, Any]:
        leg: Leg = ask(self._switchboard.offered.remote(self._number))
        try:
            result, events = carry_out(self._switchboard, leg)
        except GroupLost as error:
            return {FAILURE: str(error), "done": True}
        # one that rests is gone on with by the next attempt; where its state is, is good to know before
        kind = "leg" if is_complete(leg, result) else "rested"
        events.append(Event(kind, "", {"kind_of_leg": leg.kind, "epoch": leg.epoch, **result.to_json()}))
        result = ask(self._switchboard.conclude.remote(self._number, result, events))
        return {RESULT: json.dumps(result.to_json()), "done": True}


def is_complete(leg: Leg, result: LegResult) -> bool:
    """Whether every trial came to the leg's epoch, or ended before."""
    return all(outcome.ended is not None or outcome.epoch >= leg.epoch for outcome in result.outcomes)


def carry_out(switchboard: Any, leg: Leg) -> tuple[LegResult, list[Event]]:
    """Have a leg carried out; its result, and what is to be told of it.

    Raises:
        GroupLost, StorageError: no other leg will fare better.
    """
    if leg.kind == "probe":
        return _probe(switchboard, leg)
    events: list[Event] = []
    if leg.kind == "stacked":
        try:
            group, waited_s, states = ask(switchboard.work.remote(leg.name, leg.command))
            return _stack_result(leg, states, group, waited_s)
        except GroupLost:
            raise
        except TrainingFailed as error:  # one of them, perhaps: by themselves, each costs only itself
            text = f"a stack of {len(leg.trials)} is trained one by one: {error}"
            events.append(Event("warning", leg.trials[0].trial_id, {"text": text}))
    outcomes = []
    for lane, trial in enumerate(leg.trials):
        key = f"{leg.name}-{trial.trial_id}"
        state, told = train_alone(switchboard, key, leg.alone(lane), was_split=leg.was_split)
        outcomes.append(Outcome.failed(trial) if state is None else Outcome.of_state(trial, leg.epoch, state, None))
        events += told
    return LegResult(leg.number, tuple(outcomes)), events


def _stack_result(leg: Leg, states: list[TrialState], group: int, waited_s: float) -> tuple[LegResult, list[Event]]:
    pairs: list[tuple[TrialSpec, TrialState]] = list(zip(leg.trials, states, strict=True))
    outcomes = [Outcome.of_state(trial, leg.epoch, state, leg.name) for trial, state in pairs]
    events = [Event.of_state(trial.trial_id, state, group, waited_s / len(pairs)) for trial, state in pairs]
    return LegResult(leg.number, tuple(outcomes)), events


def _probe(switchboard: Any, leg: Leg) -> tuple[LegResult, list[Event]]:
    """One that cannot be measured is not stacked."""
    trial = leg.trials[0]
    try:
        probe: Probe = ask(switchboard.work.remote(leg.name, leg.command))[2]
    except GroupLost:
        raise
    except TrainingFailed as error:
        probe = Probe(alone_step_s=0.0, stacked_step_s=None, why_not=str(error))
    values = {
        "model": trial.model_name,
        "batch": trial.training.global_batch_size,
        "alone_step_s": probe.alone_step_s,
        "stacked_step_s": probe.stacked_step_s,
        "is_stacked": probe.is_stacked,
        "why_not": probe.why_not,
    }
    return LegResult(leg.number, (), probe.is_stacked), [Event("probe", "", values)]
