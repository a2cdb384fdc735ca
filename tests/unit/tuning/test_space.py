from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bigray.specs import JobSpec, RangeSpec, SearchSpec, TrialSpec
from bigray.tuning.space import grid, sample, search_trials

SPACE = {"lr": {"log_uniform": [1e-4, 1e-1]}, "global_batch_size": {"choice": [32, 64, 128]}}


def _job(*models: str, seed: int = 0, **training: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "digits",
            "seed": seed,
            "data": {"source": "rows.csv", "target": "label"},
            "models": {name: {"factory": f"bigray.models:{name}"} for name in models or ("mlp", "cnn")},
            "training": {"task": "classification", "epochs": 20, **training},
        }
    )


def _search(**document: Any) -> SearchSpec:
    return SearchSpec.model_validate({"space": SPACE, "trials": 24, **document})


def _settings(trials: tuple[TrialSpec, ...]) -> list[tuple[float, int]]:
    return [(trial.training.lr, trial.training.global_batch_size) for trial in trials]


def test_the_same_job_and_search_give_the_same_trials() -> None:
    assert search_trials(_job(), _search()) == search_trials(_job(), _search())


def test_another_seed_gives_other_trials() -> None:
    assert _settings(search_trials(_job(seed=1), _search())) != _settings(search_trials(_job(), _search()))


def test_the_models_of_a_job_draw_their_own_numbers() -> None:
    trials = search_trials(_job(), _search())

    assert len({trial.training.lr for trial in trials}) == 24


def test_more_trials_begin_with_the_same_draws() -> None:
    few, many = search_trials(_job("mlp"), _search(trials=4)), search_trials(_job("mlp"), _search(trials=9))

    assert _settings(many)[:4] == _settings(few)


@pytest.mark.parametrize(("trials", "shares"), [(24, (12, 12)), (7, (4, 3)), (1, (1, 0))])
def test_the_trials_are_dealt_out_evenly_and_the_models_take_turns(trials: int, shares: tuple[int, int]) -> None:
    names = [trial.model_name for trial in search_trials(_job(), _search(trials=trials))]

    assert (names.count("mlp"), names.count("cnn")) == shares
    assert names == (["mlp", "cnn"] * 12)[:trials]


def test_trial_ids_sort_in_the_order_they_run() -> None:
    ids = [trial.trial_id for trial in search_trials(_job(), _search())]

    assert ids == sorted(ids)
    assert len(set(ids)) == 24
    assert ids[:2] == ["0000-mlp", "0001-cnn"]


def test_what_is_not_searched_stays_as_the_job_says() -> None:
    job = _job(optimizer="sgd", momentum=0.9)
    trial = search_trials(job, _search())[0]

    assert (trial.training.optimizer, trial.training.momentum, trial.training.epochs) == ("sgd", 0.9, 20)
    assert (trial.model, trial.seed) == (job.models["mlp"], job.seed)


def test_the_searchs_metric_overrides_the_jobs() -> None:
    trials = search_trials(_job(metric="val_macro_f1"), _search(metric="val_loss"))

    assert {trial.training.selection_metric for trial in trials} == {"val_loss"}
    assert search_trials(_job(metric="val_macro_f1"), _search())[0].training.selection_metric == "val_macro_f1"


def test_a_grid_is_the_product_of_its_choices_for_every_model() -> None:
    space = {"lr": {"choice": [0.1, 0.2]}, "global_batch_size": {"choice": [8, 16, 32]}}
    trials = search_trials(_job(), SearchSpec.model_validate({"space": space, "search": "grid"}))
    product = [(lr, size) for lr in (0.1, 0.2) for size in (8, 16, 32)]

    for name in ("mlp", "cnn"):
        assert _settings(tuple(trial for trial in trials if trial.model_name == name)) == product


def test_a_grid_of_one_key_is_its_choices() -> None:
    assert grid({"lr": RangeSpec(choice=(0.1, 0.2))}) == [{"lr": 0.1}, {"lr": 0.2}]


RANGES = [
    RangeSpec(uniform=(0.0, 1.0)),
    RangeSpec(log_uniform=(1e-4, 1e-1)),
    RangeSpec(uniform=(0.12344, 0.12346)),
    RangeSpec(log_uniform=(1.00004e-3, 1.00006e-3)),
    RangeSpec(uniform=(0.99, 0.99999)),
]


@pytest.mark.parametrize("range_", RANGES, ids=lambda range_: str(range_.uniform or range_.log_uniform))
def test_draws_stay_inside_their_bounds(range_: RangeSpec) -> None:
    low, high = range_.uniform or range_.log_uniform or (0.0, 0.0)
    generator = np.random.default_rng(0)

    draws = [sample({"lr": range_}, generator)["lr"] for _ in range(2000)]

    assert low <= min(draws)
    assert max(draws) <= high


def test_draws_have_four_digits_so_that_what_is_printed_is_what_was_used() -> None:
    generator = np.random.default_rng(0)
    draws = [sample({"lr": RangeSpec(log_uniform=(1e-4, 1e-1))}, generator)["lr"] for _ in range(200)]

    assert all(float(f"{draw:.4g}") == draw for draw in draws)
    assert len(set(draws)) > 190


def test_a_logarithmic_range_gives_every_decade_its_share() -> None:
    generator = np.random.default_rng(0)
    draws = np.array([sample({"lr": RangeSpec(log_uniform=(1e-4, 1e-1))}, generator)["lr"] for _ in range(3000)])
    decades = np.histogram(np.log10(draws), bins=[-4, -3, -2, -1])[0]

    assert np.all(abs(decades - 1000) < 150)


def test_a_choice_keeps_its_values_as_they_are() -> None:
    generator = np.random.default_rng(0)
    draws = [sample({"optimizer": RangeSpec(choice=("sgd", "adamw"))}, generator)["optimizer"] for _ in range(50)]

    assert set(draws) == {"sgd", "adamw"}


def test_a_rate_that_is_scaled_by_the_search_is_meant_for_the_batch_of_the_job() -> None:
    space = {"lr_scaling": {"choice": ["none", "linear", "sqrt"]}, "global_batch_size": {"choice": [64, 256]}}
    trials = search_trials(_job("mlp", global_batch_size=64, lr=0.1), _search(space=space, search="grid", trials=None))

    rates = {(t.training.lr_scaling, t.training.batch_size): t.training.scaled_lr for t in trials}
    expected = {("none", 64): 0.1, ("linear", 64): 0.1, ("sqrt", 64): 0.1}
    expected |= {("none", 256): 0.1, ("linear", 256): 0.4, ("sqrt", 256): 0.2}
    assert rates == pytest.approx(expected)


def test_a_search_may_switch_the_scaling_of_the_job_off() -> None:
    space = {"lr_scaling": {"choice": ["none"]}}
    job = _job("mlp", lr_scaling="linear", lr_batch_size=32)

    (trial,) = search_trials(job, _search(space=space, search="grid", trials=None))
    assert trial.training.scaled_lr == trial.training.lr
