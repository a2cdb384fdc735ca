from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bigray.errors import TrainingFailed
from bigray.results import Finalist, TrialResult, TrialStatus
from bigray.tuning.evidence import judge, judge_run, why_it_won

CLEAR = (0.990, 0.991, 0.992, 0.991, 0.990)
CLOSE = (0.985, 0.995, 0.990, 0.996, 0.987)
POOR = (0.90, 0.91, 0.90, 0.91, 0.90)


def _result(trial_id: str, value: float | None, status: TrialStatus = "finished") -> TrialResult:
    metrics = {} if value is None else {"val_accuracy": value}
    return TrialResult(trial_id, trial_id.split("-")[1], {}, status, 5, 5, 50, metrics)


def _judge(values: Mapping[str, Sequence[float]], sizes: Mapping[str, int] | None = None, **more: Any) -> Any:
    by_seed = {trial: {f"{trial}-seed{n}": value for n, value in enumerate(found)} for trial, found in values.items()}
    arguments = {"mode": "max", "num_parameters": {trial: (sizes or {}).get(trial, 100) for trial in values}} | more
    return judge(by_seed, model_names=_models(values), **arguments)


def _models(trials: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    return {trial: trial.split("-")[1] for trial in trials}


def _why(finalists: Sequence[Finalist], mode: Any = "max") -> str:
    return why_it_won(finalists, "val_accuracy", mode, _models([one.trial_id for one in finalists]))


def _journal(*finalists: str, **latency_ms: float) -> list[dict[str, Any]]:
    timed = [
        {"kind": "latency", "trial": name.replace("_", "-"), "latency_ms": value} for name, value in latency_ms.items()
    ]
    return [{"kind": "finalists", "trials": list(finalists), "seeds": 2}, *timed]


def _seeds(trial_id: str, *values: float, status: TrialStatus = "finished") -> list[TrialResult]:
    return [_result(f"{trial_id}-seed{number}", value, status) for number, value in enumerate(values, start=1)]


def test_a_run_is_judged_by_the_seeds_of_the_finalists_in_its_journal() -> None:
    results = [_result("000-mlp", 0.8), _result("001-cnn", 0.9), _result("002-mlp", 0.99)]
    results += [*_seeds("000-mlp", 0.90, 0.91), *_seeds("001-cnn", 0.70, 0.71)]

    found = judge_run(results, _journal("001-cnn", "000-mlp"), "val_accuracy", "max")
    assert [one.trial_id for one in found] == ["000-mlp", "001-cnn"]
    assert found[0].best_seed_trial == "000-mlp-seed2"


def test_a_seed_that_failed_or_diverged_does_not_count_whatever_it_had_reached() -> None:
    results = [_result("000-mlp", 0.8), *_seeds("000-mlp", 0.9, 0.91)]
    results += [_result("001-mlp", 0.8), *_seeds("001-mlp", 0.99, status="diverged")]

    (winner, other) = judge_run(results, _journal("000-mlp", "001-mlp"), "val_accuracy", "max")
    assert winner.trial_id == "000-mlp"
    assert other.values == ()


def test_without_finalists_or_before_a_seed_has_a_value_nobody_is_judged() -> None:
    results = [_result("000-mlp", 0.8), *_seeds("000-mlp", math.nan)]

    assert judge_run(results, [], "val_accuracy", "max") == ()
    assert judge_run(results, _journal("000-mlp"), "val_accuracy", "max") == ()


def _folds(trial_id: str, *values: float, usual: float = 0.9) -> list[TrialResult]:
    of_folds = [_result(f"{trial_id}-fold{number}", value) for number, value in enumerate(values, start=1)]
    return [_result(trial_id, 0.8), *of_folds, _result(f"{trial_id}-usual", usual)]


def test_finalists_on_folds_are_judged_by_them_and_deployed_as_trained_on_the_usual_split() -> None:
    results = [*_folds("000-mlp", 0.90, 0.91, usual=0.5), *_folds("001-cnn", 0.70, 0.71)]
    journal = [{"kind": "finalists", "trials": ["000-mlp", "001-cnn"], "folds": 2}]
    (winner, other) = judge_run(results, journal, "val_accuracy", "max")

    assert (winner.trial_id, winner.values, winner.over) == ("000-mlp", (0.90, 0.91), "folds")
    assert winner.best_seed_trial == "000-mlp-usual"
    assert other.trial_id == "001-cnn"


def test_a_finalist_on_folds_whose_trial_on_the_usual_split_diverged_cannot_win() -> None:
    results = [*_folds("000-mlp", 0.90, 0.91, usual=math.nan), *_folds("001-cnn", 0.70, 0.71)]
    journal = [{"kind": "finalists", "trials": ["000-mlp", "001-cnn"], "folds": 2}]

    assert judge_run(results, journal, "val_accuracy", "max")[0].trial_id == "001-cnn"


def test_a_finalist_that_failed_on_a_fold_cannot_win_beside_one_that_has_them_all() -> None:
    results = [*_folds("000-mlp", 0.90, 0.91, usual=0.9), *_folds("001-cnn", 0.70, 0.71, 0.72, usual=0.7)]
    journal = [{"kind": "finalists", "trials": ["000-mlp", "001-cnn"], "folds": 3}]
    judged = judge_run(results, journal, "val_accuracy", "max")

    assert judged[0].trial_id == "001-cnn"
    assert "too few folds to win" in _why(judged)


def test_the_latency_of_a_finalist_is_the_median_of_its_seeds() -> None:
    results = [_result("000-mlp", 0.8), *_seeds("000-mlp", 0.9, 0.91), _result("001-cnn", 0.8)]
    results += _seeds("001-cnn", 0.9, 0.91)
    journal = _journal("000-mlp", "001-cnn", **{"000_mlp_seed1": 3.0, "000_mlp_seed2": 5.0, "001_cnn_seed1": 1.0})

    found = judge_run(results, journal, "val_accuracy", "max")
    assert {one.trial_id: one.latency_ms for one in found} == {"000-mlp": 4.0, "001-cnn": 1.0}
    assert found[0].trial_id == "001-cnn", "as good, as small, and faster"


def test_the_interval_is_student_s() -> None:
    # mean 3, standard deviation sqrt(2.5), t(4) = 2.776445
    (finalist,) = _judge({"000-mlp": (1, 2, 3, 4, 5)})

    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert finalist.mean == 3.0
    assert (finalist.low, finalist.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_the_better_mean_wins_where_the_intervals_do_not_overlap_whatever_it_costs() -> None:
    finalists = _judge({"000-mlp": POOR, "001-cnn": CLEAR}, {"000-mlp": 10, "001-cnn": 10_000})

    assert [one.trial_id for one in finalists] == ["001-cnn", "000-mlp"]
    assert [one.is_tied for one in finalists] == [True, False]
    assert _why(finalists) == (
        "001-cnn: val_accuracy 0.991 ± 0.001 against 0.904 ± 0.007 of 000-mlp; the intervals do not overlap"
    )


def test_of_tied_finalists_the_smaller_wins() -> None:
    finalists = _judge({"007-cnn": CLOSE, "012-mlp": CLEAR}, {"007-cnn": 61_322, "012-mlp": 9_610})

    assert [one.trial_id for one in finalists] == ["012-mlp", "007-cnn"]
    assert all(one.is_tied for one in finalists)
    assert _why(finalists) == (
        "012-mlp: tied with 007-cnn on val_accuracy (0.991 ± 0.001, 0.991 ± 0.006) and has fewer parameters "
        "(9,610 < 61,322)"
    )


def test_the_smaller_wins_a_tie_also_with_the_worse_mean() -> None:
    finalists = _judge({"000-cnn": CLOSE, "001-mlp": (0.98, 0.99, 0.995)}, {"000-cnn": 500})

    assert finalists[0].trial_id == "001-mlp" and finalists[0].mean < finalists[1].mean


def test_after_the_winner_they_are_sorted_by_mean() -> None:
    finalists = _judge({"000-mlp": POOR, "001-mlp": CLEAR, "002-mlp": CLOSE}, {"002-mlp": 1})

    assert [one.trial_id for one in finalists] == ["002-mlp", "001-mlp", "000-mlp"]


def test_of_a_metric_that_is_minimised_the_lower_mean_wins() -> None:
    finalists = _judge({"000-mlp": (1.0, 1.1, 1.2), "001-mlp": (0.1, 0.11, 0.12)}, mode="min")

    assert [one.trial_id for one in finalists] == ["001-mlp", "000-mlp"]
    assert finalists[0].best_seed_trial == "001-mlp-seed0"


def test_latency_decides_between_equally_large_models_only_beyond_ten_per_cent() -> None:
    values = {"000-mlp": CLEAR, "001-cnn": CLOSE}
    clearly = _judge(values, latency_ms={"000-mlp": 1.2, "001-cnn": 1.0})
    hardly = _judge(values, latency_ms={"000-mlp": 1.09, "001-cnn": 1.0})

    assert clearly[0].trial_id == "001-cnn" and clearly[0].latency_ms == 1.0
    assert _why(clearly).endswith("and is faster (1 ms < 1.2 ms a row)")
    assert hardly[0].trial_id == "000-mlp"  # by its mean
    assert _why(hardly).endswith("and has the better mean")


def test_trials_of_one_model_are_never_told_apart_by_latency() -> None:
    assert (
        _judge({"000-mlp": CLEAR, "001-mlp": CLOSE}, latency_ms={"000-mlp": 9, "001-mlp": 1})[0].trial_id == "000-mlp"
    )


def test_identical_values_are_a_tie_of_no_width_and_the_earlier_trial_wins() -> None:
    finalists = _judge({"000-mlp": (1.0, 1.0), "001-mlp": (1.0, 1.0), "002-mlp": (0.999, 0.999)})

    assert [one.trial_id for one in finalists] == ["000-mlp", "001-mlp", "002-mlp"]
    assert [one.is_tied for one in finalists] == [True, True, False]
    assert (finalists[0].low, finalists[0].high) == (1.0, 1.0)
    assert _why(finalists) == "000-mlp: tied with 001-mlp on val_accuracy (1 ± 0, 1 ± 0) and came first"


def test_two_seeds_are_enough_for_an_interval_and_it_is_wide() -> None:
    finalists = _judge({"000-mlp": (0.90, 0.92), "001-mlp": (0.95, 0.96)}, {"000-mlp": 1})

    assert finalists[0].trial_id == "000-mlp"  # 0.91 +- 0.13 reaches 0.955: no evidence against the smaller one


def test_a_finalist_with_one_seed_left_cannot_win_beside_those_with_more() -> None:
    finalists = _judge({"000-mlp": (0.999,), "001-mlp": CLEAR}, {"000-mlp": 1})

    assert [one.trial_id for one in finalists] == ["001-mlp", "000-mlp"]
    assert not finalists[1].is_tied
    assert _why(finalists).endswith("against 0.999, one seed of 000-mlp, which has too few seeds to win")


def test_where_all_have_one_seed_left_nothing_tells_them_apart_but_the_cost() -> None:
    finalists = _judge({"000-mlp": (0.99,), "001-mlp": (0.5,)}, {"001-mlp": 1})

    assert finalists[0].trial_id == "001-mlp" and all(one.is_tied for one in finalists)


def test_seeds_that_diverged_do_not_count() -> None:
    finalists = _judge({"000-mlp": (math.nan, 0.9, 0.9), "001-mlp": (math.inf, math.nan), "002-mlp": ()})

    assert [one.trial_id for one in finalists] == ["000-mlp", "001-mlp", "002-mlp"]
    assert finalists[0].values == (0.9, 0.9)
    assert finalists[1].values == () and finalists[1].best_seed_trial == ""
    assert _why(finalists) == "000-mlp: the only finalist with a val_accuracy (0.9 ± 0)"


def test_without_any_value_there_is_no_winner() -> None:
    with pytest.raises(TrainingFailed, match="every seed of every finalist failed or diverged"):
        _judge({"000-mlp": (math.nan,), "001-mlp": ()})


def test_the_best_seed_is_what_would_be_deployed() -> None:
    (finalist,) = _judge({"000-mlp": (0.90, 0.93, 0.91)})

    assert finalist.best_seed_trial == "000-mlp-seed1"
    assert pickle.loads(pickle.dumps(finalist)) == finalist
