from __future__ import annotations

from typing import Any

import pytest

from tests.unit.tuning.simulated import Simulation, make_job, make_search


def _population(job: Any = None, **search: Any) -> Simulation:
    return Simulation(job or make_job(epochs=8), make_search(scheduler="pbt", trials=8, **search)).run()


def test_at_the_end_of_each_interval_the_worst_take_over_the_best() -> None:
    simulation = _population()

    exploits = [leg for leg in simulation.legs if leg.take_over is not None]
    assert [leg.take_over.epoch for leg in exploits if leg.take_over] == [2, 2, 4, 4, 6, 6]
    for leg in exploits:
        assert leg.take_over is not None
        before = {
            outcome.trial_id: outcome.value
            for result in simulation.results.values()
            for outcome in result.outcomes
            if outcome.epoch == leg.take_over.epoch
        }
        better = [value for value in before.values() if value > before[leg.take_over.source.trial_id]]
        assert len(better) < 2, "of eight, the best two"


def test_who_takes_over_goes_on_under_a_name_of_its_own_and_the_old_one_ends() -> None:
    simulation = _population()

    clones = {leg.trials[0].trial_id for leg in simulation.legs if leg.take_over is not None}
    assert all("-at" in name for name in clones)
    at_the_end = [name for name, epoch in simulation.epochs.items() if epoch == 8]
    assert len(at_the_end) == 8, "the population keeps its size"


def test_what_a_leg_begins_from_is_kept_where_others_may_take_it_over_only() -> None:
    others = Simulation(make_job(epochs=8), make_search(scheduler="asha", trials=8)).run()

    assert all(leg.keep_begin for leg in _population().legs)
    assert not any(leg.keep_begin for leg in others.legs)


def test_settings_are_changed_within_the_space() -> None:
    simulation = _population()

    for leg in simulation.legs:
        if leg.take_over is not None:
            training, source = leg.trials[0].training, leg.take_over.source.training
            assert 1e-4 <= training.lr <= 1e-1
            assert training.batch_size in (32, 64, 128)
            assert (training.lr, training.batch_size) != (source.lr, source.batch_size)


@pytest.mark.parametrize(
    "choice",
    [
        {"weight_decay": {"choice": [0, 1e-4, 1e-3]}},
        {"optimizer": {"choice": ["AdamW", "SGD", "Adam"]}},
        {"class_weights": {"choice": ["none", [1.0, 2.0]]}},
    ],
)
def test_a_choice_may_be_written_otherwise_than_it_is_kept(choice: dict[str, Any]) -> None:
    simulation = _population(space={"lr": {"log_uniform": [1e-4, 1e-1]}, **choice})

    assert any(leg.take_over is not None for leg in simulation.legs)


def test_a_diverged_member_is_replaced_and_a_failed_one_is_not() -> None:
    job, search = make_job(epochs=8), make_search(scheduler="pbt", trials=8)
    for fate, size in (("diverged", 8), ("failed", 7)):
        simulation = Simulation(job, search, fate={"0003-mlp": fate}).run()
        assert list(simulation.epochs.values()).count(8) == size


def test_over_several_models_a_clone_is_named_after_the_model_it_has() -> None:
    simulation = _population(make_job("mlp", "cnn", epochs=8))

    for leg in simulation.legs:
        assert f"-{leg.trials[0].model_name}" in leg.trials[0].trial_id
