from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from bigray.cross_validation import of_fold
from bigray.specs import TrialSpec
from bigray.training.commands import TrainStack, TrainTo
from bigray.tuning.leg import Leg, LegResult, Outcome
from tests.unit.tuning.simulated import Simulation, curve, make_job, make_search

SEARCHES = {
    "random, asha": {},
    "random, none": {"scheduler": "none", "trials": 9},
    "random, median": {"scheduler": "median"},
    "random, pbt": {"scheduler": "pbt", "trials": 8},
    "tpe, asha": {"search": "tpe"},
    "tpe, median": {"search": "tpe", "scheduler": "median", "trials": 12},
    "finalists": {"finalists": 2, "seeds": 2},
}


def _settings(simulation: Simulation) -> dict[str, tuple[float, int]]:
    return {t.trial_id: (t.training.lr, t.training.batch_size) for leg in simulation.legs for t in leg.trials}


def test_asha_with_one_slot_promotes_the_best_third_of_each_rung() -> None:
    simulation = Simulation(make_job(), make_search()).run()

    trials = {trial.trial_id: trial for leg in simulation.legs for trial in leg.trials}
    for rung in (2, 6, 18):
        there = sorted((t for t, e in simulation.epochs.items() if e >= rung), key=lambda t: -curve(trials[t], rung))
        assert all(simulation.epochs[trial_id] > rung for trial_id in there[: len(there) // 3])
    assert Counter(simulation.epochs.values())[2] > 27 / 2, "and few that only seemed to be"


@pytest.mark.parametrize("fate", ["failed", "diverged"])
def test_one_that_ends_after_its_promotion_takes_nobody_elses_place(fate: str) -> None:
    job, search = make_job(), make_search()
    promoted = next(leg.trials[0] for leg in Simulation(job, search).run().legs if leg.epoch == 6)

    class EndsAfterItsPromotion(Simulation):
        def _outcome(self, trial: TrialSpec, leg: Leg) -> Outcome:
            self._fate = {promoted.trial_id: fate} if leg.epoch == 6 else {}
            return super()._outcome(trial, leg)

    simulation = EndsAfterItsPromotion(job, search).run()
    sent_to_6 = {leg.trials[0].trial_id for leg in simulation.legs if leg.epoch == 6}
    assert promoted.trial_id in sent_to_6
    assert len(sent_to_6) <= len(
        {leg.trials[0].trial_id for leg in Simulation(job, search).run().legs if leg.epoch == 6}
    )


def test_where_the_one_that_came_to_the_end_diverged_there_another_is_trained_to_the_end() -> None:
    job, search = make_job(), make_search(trials=12)
    winner = Simulation(job, search).run().winner

    class DivergesAtTheEnd(Simulation):
        def _outcome(self, trial: TrialSpec, leg: Leg) -> Outcome:
            outcome = super()._outcome(trial, leg)
            if trial.trial_id == winner and leg.epoch == 20:
                return replace(outcome, value=math.nan, ended="diverged")
            return outcome

    simulation = DivergesAtTheEnd(job, search).run()
    others = [epoch for trial_id, epoch in simulation.epochs.items() if trial_id != winner]
    assert max(others) == 20


@pytest.mark.parametrize("trials", [1, 2, 5, 12])
def test_of_few_trials_too_the_winner_is_trained_to_the_end(trials: int) -> None:
    simulation = Simulation(make_job(), make_search(trials=trials)).run()

    assert simulation.epochs[simulation.winner] == 20
    assert list(simulation.epochs.values()).count(20) == 1


def test_a_promoted_trial_is_the_same_trial_and_goes_on_to_the_next_rung() -> None:
    simulation = Simulation(make_job(), make_search()).run()

    for trial_id in simulation.epochs:
        epochs = [leg.epoch for leg in simulation.legs if leg.trials[0].trial_id == trial_id]
        assert epochs == [2, 6, 18, 20][: len(epochs)]


def test_a_trial_is_promoted_as_soon_as_it_is_among_the_best_third_of_its_rung() -> None:
    simulation = Simulation(make_job(), make_search()).run()

    first_promotion = next(number for number, leg in enumerate(simulation.legs) if leg.epoch == 6)
    assert first_promotion == 3, "after three trials there is one best third"


def test_nothing_is_promoted_that_is_not_among_the_best_third_of_what_was_known() -> None:
    simulation = Simulation(make_job(), make_search()).run()
    known: dict[int, list[float]] = {2: [], 6: [], 18: []}

    for leg in simulation.legs:
        trial, rung = leg.trials[0], {6: 2, 18: 6, 20: 18}.get(leg.epoch)
        if rung is not None:
            better = [value for value in known[rung] if value > curve(trial, rung)]
            assert len(better) < len(known[rung]) // 3
        if leg.epoch in known:
            known[leg.epoch].append(curve(trial, leg.epoch))


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
@pytest.mark.parametrize("slots", [1, 3])
def test_what_a_sweep_decides_does_not_depend_on_which_leg_ends_first(search: dict[str, object], slots: int) -> None:
    job, spec = make_job(epochs=8), make_search(**search)
    one = Simulation(job, spec, slots=slots, at_once=1).run()

    for order_seed in range(3):
        other = Simulation(job, spec, slots=slots, order_seed=order_seed).run()
        assert _settings(other) == _settings(one)
        assert {leg.number: leg for leg in other.legs} == {leg.number: leg for leg in one.legs}
        assert other.winner == one.winner


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_a_sweep_that_is_killed_anywhere_goes_on_as_if_it_had_not_been(search: dict[str, object]) -> None:
    job, spec = make_job(epochs=8), make_search(**search)
    whole = Simulation(job, spec, slots=2).run()

    for killed_after in range(0, len(whole.legs), 3):
        killed = Simulation(job, spec, slots=2, order_seed=killed_after).run(max_legs=killed_after)
        resumed = Simulation(job, spec, slots=2, recorded=killed.results).run()
        assert len(killed.legs) + len(resumed.legs) == len(whole.legs), "no leg is run twice"
        assert resumed.epochs == whole.epochs
        assert resumed.winner == whole.winner


def test_the_seed_decides_about_the_trials() -> None:
    for search in ({}, {"search": "tpe"}):
        one, other = (Simulation(make_job(seed=seed), make_search(**search)).run() for seed in (0, 1))
        assert _settings(one) != _settings(other)


def test_every_trial_of_a_search_begins_once() -> None:
    for search in ({}, {"search": "tpe"}, {"scheduler": "median"}):
        simulation = Simulation(make_job("mlp", "cnn"), make_search(**search), slots=3).run()
        begun = Counter(leg.trials[0].trial_id for leg in simulation.legs if leg.epoch == 2)
        assert len(begun) == 27
        assert set(begun.values()) == {1}


def test_the_models_of_a_job_share_the_trials_and_one_scheduler() -> None:
    simulation = Simulation(make_job("mlp", "cnn"), make_search(trials=18)).run()

    models = Counter(trial_id.partition("-")[2] for trial_id in simulation.epochs)
    assert models == {"mlp": 9, "cnn": 9}
    assert 8 <= Counter(simulation.epochs.values())[2] <= 12


def test_a_model_searches_its_own_space_where_it_has_one() -> None:
    spaces = {"cnn": {"lr": {"choice": [0.5]}, "weight_decay": {"choice": [0.1]}}}
    simulation = Simulation(make_job("mlp", "cnn"), make_search(spaces=spaces, trials=8)).run()

    trials = {trial.trial_id: trial.training for leg in simulation.legs for trial in leg.trials}
    assert {t.lr for name, t in trials.items() if name.endswith("cnn")} == {0.5}
    assert {t.weight_decay for t in trials.values()} == {0.0, 0.1}
    assert all(t.lr <= 0.1 for name, t in trials.items() if name.endswith("mlp"))


@pytest.mark.parametrize("fate", ["failed", "diverged"])
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_a_trial_that_fails_or_diverges_ends_and_never_wins(search: dict[str, object], fate: str) -> None:
    job, spec = make_job(epochs=8), make_search(**search)
    best = Simulation(job, spec).run().winner.partition("-seed")[0].partition("-at")[0]

    simulation = Simulation(job, spec, fate={best: fate}).run()
    assert sum(best in (trial.trial_id for trial in leg.trials) for leg in simulation.legs) == 1
    assert not simulation.winner.startswith(best) or "-at" in simulation.winner
    assert not any(trial_id.startswith(f"{best}-seed") for trial_id in simulation.epochs)


def test_the_median_rule_ends_what_is_worse_than_half_of_the_others() -> None:
    simulation = Simulation(make_job(epochs=8), make_search(scheduler="median", trials=20)).run()

    ended_early = [trial_id for trial_id, epoch in simulation.epochs.items() if epoch < 8]
    assert len(ended_early) >= 6
    finished = [simulation.values[t] for t, epoch in simulation.epochs.items() if epoch == 8]
    assert max(finished) == max(simulation.values.values())
    first_four = sorted(simulation.epochs)[:4]
    assert all(simulation.epochs[trial_id] > 2 for trial_id in first_four), "four must have come as far first"


def test_tpe_proposes_nearer_to_the_best_than_chance() -> None:
    job = make_job(epochs=2)
    search = {"trials": 60, "scheduler": "none"}

    def share_near_the_best(**more: object) -> float:
        late = sorted(_settings(Simulation(job, make_search(**search, **more)).run()).items())[30:]
        return sum(3e-3 < lr < 3e-2 for _, (lr, _) in late) / len(late)

    assert share_near_the_best(search="tpe") > share_near_the_best(search="random") + 0.1


@pytest.mark.parametrize("stack", [True, False])
def test_tpe_proposes_the_same_trials_whatever_the_probes_find(stack: bool) -> None:
    probed = Simulation(make_job(), make_search(search="tpe", trials=24, scheduler="none"), stack=True)
    probed._stack = stack
    other = Simulation(make_job(), make_search(search="tpe", trials=24, scheduler="none"), stack=True).run()

    assert sorted(_settings(probed.run()).items())[:8] == sorted(_settings(other).items())[:8]


def test_no_leg_waits_for_a_result_that_it_cannot_use() -> None:
    """With as many slots as trials, all begin before any has ended."""
    sweep = Simulation(make_job(), make_search(trials=9), slots=9).sweep

    legs = [sweep.next_leg() for _ in range(9)]
    assert all(leg is not None for leg in legs)
    assert sweep.next_leg() is None
    assert sweep.is_waiting


def test_a_sweep_told_to_stop_decides_nothing_more() -> None:
    sweep = Simulation(make_job(), make_search()).sweep
    assert sweep.next_leg() is not None

    sweep.stop()
    assert sweep.next_leg() is None
    assert not sweep.is_waiting


class TestStacks:
    def test_trials_that_differ_in_numbers_only_go_together(self) -> None:
        simulation = Simulation(make_job(), make_search(trials=60), stack=True).run()

        stacked = [leg for leg in simulation.legs if leg.kind == "stacked"]
        assert stacked
        for leg in stacked:
            assert isinstance(leg.command, TrainStack)
            assert len({trial.training.batch_size for trial in leg.trials}) == 1
        assert Counter(simulation.epochs.values())[2] <= 40
        assert max(simulation.epochs.values()) == 20

    def test_one_probe_for_each_model_and_batch_size_comes_first(self) -> None:
        simulation = Simulation(make_job("mlp", "cnn"), make_search(trials=60), slots=3, stack=True).run()

        probes = [leg for leg in simulation.legs if leg.kind == "probe"]
        kinds = [(leg.trials[0].model_name, leg.trials[0].training.batch_size) for leg in probes]
        assert sorted(kinds) == [(name, size) for name in ("cnn", "mlp") for size in (32, 64, 128)]

    def test_what_the_probe_refuses_is_trained_alone(self) -> None:
        simulation = Simulation(make_job(), make_search(trials=12), stack=True)
        simulation._stack = False

        legs = simulation.run().legs
        assert {leg.kind for leg in legs} == {"probe", "alone"}
        assert all(isinstance(leg.command, TrainTo) for leg in legs if leg.kind == "alone")

    def test_stack_off_probes_nothing(self) -> None:
        legs = Simulation(make_job(), make_search(trials=12, stack="off"), stack=True).run().legs

        assert {leg.kind for leg in legs} == {"alone"}

    def test_a_lane_is_taken_over_from_the_stack_that_held_it_last(self) -> None:
        simulation = Simulation(make_job(), make_search(trials=60), stack=True).run()

        for trial_id in simulation.epochs:
            path = [(leg.name, leg.stacks[place], leg.kind) for leg, place in _appearances(simulation, trial_id)]
            for (before, _, kind), (_, stack, _) in pairwise(path):
                assert stack == (before if kind == "stacked" else None)

    def test_how_a_sweep_is_stacked_does_not_depend_on_timing_nor_on_kills(self) -> None:
        job, search = make_job("mlp", "cnn"), make_search(trials=60)
        whole = Simulation(job, search, slots=2, stack=True).run()
        killed = Simulation(job, search, slots=2, stack=True, order_seed=5).run(max_legs=7)
        resumed = Simulation(job, search, slots=2, stack=True, recorded=killed.results, order_seed=9).run()

        legs = {leg.number: leg for leg in (*killed.legs, *resumed.legs)}
        assert legs == {leg.number: leg for leg in whole.legs}

    def test_a_split_trial_is_not_stacked_again(self) -> None:
        simulation = Simulation(make_job(), make_search(trials=27), stack=True)
        sweep = simulation.sweep
        probe = sweep.next_leg()
        assert probe is not None
        sweep.tell(LegResult(probe.number, (), True))
        leg = sweep.next_leg()
        assert leg is not None
        outcomes = tuple(Outcome(t.trial_id, 2, curve(t, 2), micro_batch_size=8) for t in leg.trials)
        sweep.tell(LegResult(leg.number, outcomes))
        simulation.run()

        promoted = [leg for leg in simulation.legs if leg.trials[0].trial_id in {o.trial_id for o in outcomes}]
        assert promoted
        assert all(leg.kind == "alone" and leg.trials[0].training.micro_batch_size == 8 for leg in promoted)
        assert all(leg.was_split for leg in promoted), "so that it is not split again"


class TestFinalists:
    def test_the_best_are_trained_again_to_the_end_once_for_each_seed(self) -> None:
        simulation = Simulation(make_job(), make_search(finalists=3, seeds=4)).run()

        again = [trial_id for trial_id in simulation.epochs if "-seed" in trial_id]
        assert len(again) == 12
        assert {simulation.epochs[trial_id] for trial_id in again} == {20}
        sources = {trial_id.partition("-seed")[0] for trial_id in again}
        first = {t: v for t, v in simulation.values.items() if "-seed" not in t}
        assert sources == set(sorted(first, key=lambda t: -first[t])[:3]) == set(simulation.sweep.finalists)

    def test_they_differ_in_their_seed_alone(self) -> None:
        simulation = Simulation(make_job(), make_search(finalists=1, seeds=3)).run()

        trials: dict[str, TrialSpec] = {t.trial_id: t for leg in simulation.legs for t in leg.trials}
        again = [trial for trial_id, trial in trials.items() if "-seed" in trial_id]
        source = trials[simulation.sweep.finalists[0]]
        assert len({trial.seed for trial in [*again, source]}) == 4
        assert {trial.training.lr for trial in again} == {source.training.lr}

    def test_with_folds_each_is_trained_on_them_and_on_the_usual_split_instead(self) -> None:
        folds = [partial(of_fold, fold=number) for number in range(3)]
        simulation = Simulation(make_job(), make_search(finalists=2), folds=folds).run()

        trials = {t.trial_id: t for leg in simulation.legs for t in leg.trials}
        for finalist in simulation.sweep.finalists:
            again = {name: trial.fold for name, trial in trials.items() if name.startswith(f"{finalist}-")}
            names = (f"{finalist}-fold1", f"{finalist}-fold2", f"{finalist}-fold3", f"{finalist}-usual")
            assert again == dict(zip(names, (0, 1, 2, None), strict=True))
            assert {simulation.epochs[name] for name in names} == {20}
            assert all(trials[name].training == trials[finalist].training for name in names)
        assert [event.values["folds"] for event in simulation.news if event.kind == "finalists"] == [3]

    def test_no_other_seed_changes_what_the_scheduler_knows(self) -> None:
        plain = Simulation(make_job(), make_search()).run()
        with_finalists = Simulation(make_job(), make_search(finalists=2, seeds=2)).run()

        assert {t: e for t, e in with_finalists.epochs.items() if "-seed" not in t} == plain.epochs


class TestExtension:
    @pytest.mark.parametrize("search", [{}, {"search": "tpe"}, {"scheduler": "median"}, {"finalists": 2, "seeds": 2}])
    def test_more_trials_are_added_and_none_is_repeated(self, search: dict[str, object]) -> None:
        job, spec = make_job(), make_search(**search)
        first = Simulation(job, spec, slots=2).run()
        second = Simulation(job, spec, slots=2, recorded=first.results, chapters=(40,)).run()

        begun = {t.trial_id for leg in second.legs for t in leg.trials if leg.epoch == 2 and "-seed" not in t.trial_id}
        assert len(begun - set(first.epochs)) == 13
        assert not begun & set(first.epochs)
        assert len({t for t in second.epochs if "-seed" not in t}) == 40

    def test_old_trials_are_promoted_beside_the_new_ones(self) -> None:
        job, spec = make_job(), make_search()
        first = Simulation(job, spec).run()
        second = Simulation(job, spec, recorded=first.results, chapters=(81,)).run()

        assert Counter(second.epochs.values())[2] <= 54
        assert any(second.epochs[t] > first.epochs[t] for t in first.epochs)

    def test_finalists_are_chosen_anew_and_never_among_the_seeds_of_the_old_ones(self) -> None:
        job, spec = make_job(), make_search(finalists=2, seeds=3)
        first = Simulation(job, spec).run()
        second = Simulation(job, spec, recorded=first.results, chapters=(40,)).run()

        assert not any("-seed" in trial_id for trial_id in second.sweep.finalists)
        assert not any(trial_id.count("-seed") > 1 for trial_id in second.epochs)

    def test_one_that_was_killed_goes_on(self) -> None:
        job, spec = make_job(), make_search()
        first = Simulation(job, spec).run()
        whole = Simulation(job, spec, recorded=first.results, chapters=(40,)).run()
        killed = Simulation(job, spec, recorded=first.results, chapters=(40,)).run(max_legs=4)
        resumed = Simulation(job, spec, recorded=killed.results, chapters=(40,)).run()

        assert resumed.epochs == whole.epochs
        assert len(killed.legs) + len(resumed.legs) == len(whole.legs)

    def test_trials_that_begin_anew_share_no_stack_with_those_that_go_on(self) -> None:
        job, spec = make_job(seed=1), make_search(trials=100)
        first = Simulation(job, spec, stack=True).run()
        second = Simulation(job, spec, stack=True, recorded=first.results, chapters=(900,)).run()

        promoted = [leg for leg in second.legs if leg.epoch > 2]
        old = set(first.epochs)
        assert any(trial.trial_id in old for leg in promoted for trial in leg.trials)
        for leg in promoted:
            assert len({stack is None for stack in leg.stacks}) == 1

    def test_a_second_extension_goes_on_from_the_first(self) -> None:
        job, spec = make_job(), make_search()
        first = Simulation(job, spec).run()
        second = Simulation(job, spec, recorded=first.results, chapters=(30,)).run()
        third = Simulation(job, spec, recorded=second.results, chapters=(30, 33)).run()

        assert len(third.epochs) == 33
        assert len({t.trial_id for leg in third.legs for t in leg.trials if leg.epoch == 2}) == 3


def test_a_decision_costs_the_same_with_ten_times_the_trials() -> None:
    """Counted in comparisons of values, not in time."""
    comparisons = []
    for trials in (300, 3000):
        _Counted.count = 0
        Simulation(make_job(), make_search(trials=trials), reached=lambda t, e: _Counted(curve(t, e))).run()
        comparisons.append(_Counted.count / trials)
    assert comparisons[1] < 2 * comparisons[0], "n log n in all: a constant more for each doubling"


class _Counted(float):
    count = 0

    def __neg__(self) -> _Counted:
        return _Counted(super().__neg__())

    def __lt__(self, other: object) -> bool:
        _Counted.count += 1
        return float.__lt__(self, other)  # type: ignore[operator]


def _appearances(simulation: Simulation, trial_id: str) -> list[tuple[object, int]]:
    found = []
    for leg in sorted(simulation.legs, key=lambda leg: leg.number):
        for place, trial in enumerate(leg.trials):
            if trial.trial_id == trial_id and leg.kind != "probe":
                found.append((leg, place))
    return found
