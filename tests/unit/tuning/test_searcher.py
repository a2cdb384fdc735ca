from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from bigray.errors import TrainingFailed
from bigray.training.commands import Event
from bigray.tuning.leg import Leg, LegResult, Outcome
from bigray.tuning.searcher import MAX_TRIES, LegSearcher
from bigray.tuning.trial import FAILURE, RESULT
from tests.unit.tuning.simulated import Simulation, curve, make_job, make_search


class Driver:
    """What Tune does with a searcher, without Tune."""

    def __init__(self, *, recorded: list[dict[str, Any]] | None = None, slots: int = 1) -> None:
        self.offered: list[Leg] = []
        self.told: list[Event] = []
        self.is_used_up = False
        sweep = Simulation(make_job(epochs=4), make_search(trials=6), slots=slots).sweep
        self.searcher = LegSearcher(
            sweep, recorded or [], self.offered.append, self.told.extend, lambda: self.is_used_up
        )
        self.records: list[dict[str, Any]] = []

    def suggest(self, name: str) -> Leg | str | None:
        suggested = self.searcher.suggest(name)
        if isinstance(suggested, dict):
            assert suggested["leg"] == self.offered[-1].number
            return self.offered[-1]
        return suggested

    def complete(self, name: str, leg: Leg, epoch: int | None = None) -> None:
        trial = leg.trials[0]
        reached = leg.epoch if epoch is None else epoch
        ended = "finished" if reached == trial.training.epochs else None
        result = LegResult(leg.number, (Outcome(trial.trial_id, reached, curve(trial, reached), ended=ended),))
        self.records.append(result.to_json())
        self.searcher.on_trial_complete(name, {RESULT: json.dumps(result.to_json())})

    def run(self) -> list[Leg]:
        legs = []
        while isinstance(leg := self.suggest(f"t{len(legs)}"), Leg):
            legs.append(leg)
            self.complete(f"t{len(legs) - 1}", leg)
        assert leg == "FINISHED"
        return legs


def test_a_sweep_is_handed_out_leg_by_leg_and_then_finished() -> None:
    legs = Driver().run()

    assert [leg.number for leg in legs] == list(range(len(legs)))
    assert len({leg.trials[0].trial_id for leg in legs}) == 6


def test_while_a_decision_depends_on_a_leg_under_way_there_is_none() -> None:
    driver = Driver()
    first = driver.suggest("a")
    assert isinstance(first, Leg)
    assert driver.suggest("b") is None

    driver.complete("a", first)
    assert isinstance(driver.suggest("b"), Leg)


def test_what_is_in_the_journal_is_not_handed_out_again() -> None:
    first = Driver()
    legs = first.run()
    half = first.records[: len(legs) // 2]

    second = Driver(recorded=half)
    assert [leg.number for leg in second.run()] == [leg.number for leg in legs[len(half) :]]


def test_a_leg_that_is_recorded_twice_counts_as_it_was_first() -> None:
    first = Driver()
    legs = first.run()
    forged = [{**record, "outcomes": [{**record["outcomes"][0], "value": 9.0}]} for record in first.records]

    assert Driver(recorded=[*first.records, *forged]).run() == []
    assert len(legs) == len(first.records)


def test_a_record_of_other_trials_is_not_taken_for_the_leg() -> None:
    first = Driver()
    legs = first.run()
    record = first.records[0]
    foreign = {**record, "outcomes": [{**record["outcomes"][0], "trial": "0099-other"}]}

    assert Driver(recorded=[foreign]).run() == legs


def test_decisions_that_were_told_before_are_not_told_again() -> None:
    first = Driver()
    first.run()
    promoted = [event for event in first.told if event.kind == "promoted"]
    assert promoted

    second = Driver(recorded=first.records)
    second.run()
    assert second.told == []


def test_a_leg_whose_actor_was_killed_is_handed_out_again_before_any_other() -> None:
    driver = Driver(slots=2)
    first = driver.suggest("a")
    driver.suggest("b")

    driver.searcher.on_trial_complete("a", None, error=True)
    assert driver.suggest("c") == first


def test_a_leg_that_kills_every_actor_ends_the_sweep_with_its_trials_named() -> None:
    driver = Driver()
    for attempt in range(MAX_TRIES):
        leg = driver.suggest(str(attempt))
        assert isinstance(leg, Leg)
        driver.searcher.on_trial_complete(str(attempt), None, error=True)

    assert driver.suggest("last") == "FINISHED"
    with pytest.raises(TrainingFailed, match=leg.trials[0].trial_id):
        driver.searcher.raise_failure()


def test_where_no_group_is_left_the_sweep_ends_and_no_trial_is_blamed() -> None:
    driver = Driver()
    driver.suggest("a")
    driver.searcher.on_trial_complete("a", {FAILURE: "no worker group is left: it was lost"})

    assert driver.suggest("b") == "FINISHED"
    with pytest.raises(TrainingFailed, match="no worker group is left"):
        driver.searcher.raise_failure()


def test_a_leg_that_rests_is_neither_told_nor_tried_again() -> None:
    driver = Driver()
    leg = driver.suggest("a")
    assert isinstance(leg, Leg)
    driver.complete("a", leg, epoch=leg.epoch - 1)

    assert driver.suggest("b") is None, "what comes next depends on how it ends"
    driver.is_used_up = True
    assert driver.suggest("c") == "FINISHED"
    driver.searcher.raise_failure()


def test_tune_may_pickle_it() -> None:
    assert isinstance(pickle.loads(pickle.dumps(Driver().searcher)), LegSearcher)
