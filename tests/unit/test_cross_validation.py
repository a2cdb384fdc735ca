from __future__ import annotations

import math
from typing import Literal

import pytest

from bigray.cross_validation import cross_validate, of_fold, trials_of_folds
from bigray.errors import SpecError
from bigray.intervals import mean_interval
from bigray.ranking import trial_results
from bigray.results import CrossValidation, TrialResult
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec


def _trial(name: str) -> TrialSpec:
    training = TrainingSpec(task="classification")
    return TrialSpec(
        trial_id=name, model_name=name, model=ModelSpec(factory="bigray.models:mlp"), training=training, seed=0
    )


def _results(model: str, *values: float) -> list[TrialResult]:
    """One for each fold; a NaN is a trial that failed."""

    def result(fold: int, value: float) -> TrialResult:
        name = f"{model}-fold{fold + 1}"
        if not math.isfinite(value):
            return TrialResult(name, model, {}, "failed", 0, 0, 0, {}, fold=fold)
        return TrialResult(name, model, {}, "finished", 3, 3, 30, {"val_accuracy": value}, num_parameters=9, fold=fold)

    return [result(fold, value) for fold, value in enumerate(values)]


def _order(*results: TrialResult, mode: Literal["max", "min"] = "max") -> list[str]:
    return [one.model_name for one in cross_validate(results, 3, "val_accuracy", mode)]


def test_every_model_has_a_trial_for_each_fold_and_all_else_is_the_same() -> None:
    trials = trials_of_folds([_trial("linear"), _trial("mlp")], 2)

    assert [(trial.trial_id, trial.model_name, trial.fold) for trial in trials] == [
        ("linear-fold1", "linear", 0),
        ("linear-fold2", "linear", 1),
        ("mlp-fold1", "mlp", 0),
        ("mlp-fold2", "mlp", 1),
    ]
    assert all(trial.training == _trial("mlp").training and trial.seed == 0 for trial in trials)


def test_a_model_that_is_called_what_a_fold_of_another_is_is_refused() -> None:
    with pytest.raises(SpecError, match=r"models\.mlp-fold2: is what a fold of another model is called"):
        trials_of_folds([_trial("mlp"), _trial("mlp-fold2")], 2)


def test_a_fold_trains_something_of_its_own_and_the_usual_split_what_it_always_did() -> None:
    trial = _trial("mlp")

    assert len({trial.config_hash, of_fold(trial, 0).config_hash, of_fold(trial, 1).config_hash}) == 3
    document = trial.model_dump(mode="json", exclude={"fold"})
    assert TrialSpec.model_validate(document).config_hash == trial.config_hash, "one of before there were folds"


def test_the_fold_of_a_trial_is_told_with_its_result() -> None:
    trial = of_fold(_trial("mlp"), 1)
    state = {"kind": "state", "trial": trial.trial_id, "ended": "finished", "best_metrics": {"val_accuracy": 0.5}}

    assert [result.fold for result in trial_results([trial], [state])] == [1]


def test_a_model_is_its_mean_with_deviation_and_interval_over_the_folds() -> None:
    (found,) = cross_validate(_results("mlp", 0.7, 0.8, 0.9), 3, "val_accuracy", "max")

    low, high = mean_interval((0.7, 0.8, 0.9))
    assert found == CrossValidation(
        "mlp", (0.7, 0.8, 0.9), 3, pytest.approx(0.8), pytest.approx(0.1), low, high, 9, "mlp"
    )


def test_the_best_mean_is_first_whichever_way_is_better() -> None:
    lucky, steady = _results("lucky", 0.5, 0.5, 0.99), _results("steady", 0.8, 0.8, 0.8)

    assert _order(*lucky, *steady) == ["steady", "lucky"]
    assert _order(*lucky, *steady, mode="min") == ["lucky", "steady"]


def test_equals_are_in_one_order_whatever_that_of_the_results_is() -> None:
    one, other = _results("one", 0.5, 0.6, 0.7), _results("other", 0.7, 0.6, 0.5)

    assert _order(*one, *other) == _order(*reversed(other), *one) == ["one", "other"]


def test_a_model_that_failed_in_a_fold_comes_after_those_with_all_of_them() -> None:
    assert _order(*_results("holed", 0.9, math.nan, 0.9), *_results("whole", 0.5, 0.6, 0.7)) == ["whole", "holed"]


def test_the_trial_on_the_usual_split_is_no_fold() -> None:
    usual = TrialResult("mlp", "mlp", {}, "finished", 3, 3, 30, {"val_accuracy": 0.1})
    (found,) = cross_validate([usual, *_results("mlp", 0.7, 0.8, 0.9)], 3, "val_accuracy", "max")

    assert found.values == (0.7, 0.8, 0.9)
    assert cross_validate([usual], 3, "val_accuracy", "max") == ()


def test_where_every_fold_failed_there_is_no_mean() -> None:
    (found,) = cross_validate(_results("mlp", math.nan, math.nan), 2, "val_accuracy", "max")

    assert found.values == ()
    assert math.isnan(found.mean)
