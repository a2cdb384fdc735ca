from __future__ import annotations

from typing import Any

import pytest

from bigray.ranking import rank, searched_names, slots, training_wall_s, trial_results
from bigray.results import Leaderboard, Ledger, TrialResult
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.storage import Storage


def _result(trial_id: str, **metrics: float) -> TrialResult:
    return TrialResult(trial_id, "mlp", {}, "finished" if metrics else "diverged", 3, 3, 30, metrics)


def _trial(trial_id: str) -> TrialSpec:
    return TrialSpec(
        trial_id=trial_id,
        model_name="mlp",
        model=ModelSpec(factory="bigray.models:mlp"),
        training=TrainingSpec(task="classification", lr=0.01, global_batch_size=32),
        seed=0,
    )


def _state(trial_id: str, **values: Any) -> dict[str, Any]:
    usual = {"epoch": 2, "step": 20, "ended": None, "best_epoch": 2, "best_step": 20, "best_metrics": {"val_loss": 1.0}}
    return {"kind": "state", "trial": trial_id, **usual, **values}


def _ids(results: tuple[TrialResult, ...]) -> list[str]:
    return [result.trial_id for result in results]


def test_the_highest_is_first_where_more_is_better() -> None:
    results = [_result("a", val_accuracy=0.7, val_loss=1), _result("b", val_accuracy=0.9, val_loss=2)]

    assert _ids(rank(results, "val_accuracy", "max")) == ["b", "a"]


def test_the_lowest_is_first_where_less_is_better() -> None:
    results = [_result("a", val_mse=0.7, val_loss=1), _result("b", val_mse=0.2, val_loss=2)]

    assert _ids(rank(results, "val_mse", "min")) == ["b", "a"]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_equal_metrics_are_told_apart_by_the_loss_then_by_the_trial(mode: Any) -> None:
    results = [
        _result("c", val_accuracy=0.9, val_loss=0.5),
        _result("b", val_accuracy=0.9, val_loss=0.5),
        _result("a", val_accuracy=0.9, val_loss=0.6),
    ]

    assert _ids(rank(results, "val_accuracy", mode)) == ["b", "c", "a"]


def test_a_trial_whose_loop_reports_no_loss_ranks_by_its_metric_alone() -> None:
    results = [_result("b", val_f1=0.9), _result("a", val_f1=0.9), _result("c", val_f1=0.9, val_loss=0.5)]

    assert _ids(rank(results, "val_f1", "max")) == ["c", "a", "b"]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_trials_without_a_metric_come_last(mode: Any) -> None:
    results = [_result("a"), _result("b", val_r2=-50.0, val_loss=9.0)]

    assert _ids(rank(results, "val_r2", mode)) == ["b", "a"]


def test_the_last_state_of_a_trial_counts() -> None:
    events = [_state("a", epoch=1, best_metrics={"val_loss": 3.0}), _state("a", epoch=4, ended="finished")]

    (result,) = trial_results([_trial("a")], events)

    assert (result.status, result.epochs, result.metrics) == ("finished", 4, {"val_loss": 1.0})
    assert result.config == {"lr": 0.01, "global_batch_size": 32}


def test_a_trial_that_could_have_gone_on_was_halted() -> None:
    (result,) = trial_results([_trial("a")], [_state("a")])

    assert result.status == "halted"


def test_a_trial_that_never_started_has_no_result() -> None:
    assert trial_results([_trial("a"), _trial("b")], [_state("b")])[0].trial_id == "b"
    assert len(trial_results([_trial("a"), _trial("b")], [_state("b")])) == 1


def test_a_failed_trial_keeps_its_error() -> None:
    (result,) = trial_results([_trial("a")], [{"kind": "failed", "trial": "a", "error": "ValueError: boom"}])

    assert (result.status, result.error, result.metrics) == ("failed", "ValueError: boom", {})


def test_a_state_after_a_failure_means_the_trial_was_taken_up_again() -> None:
    events = [{"kind": "failed", "trial": "a", "error": "boom"}, _state("a", ended="finished")]

    (result,) = trial_results([_trial("a")], events)

    assert (result.status, result.error) == ("finished", None)


def test_other_events_leave_the_results_as_they_are() -> None:
    events = [{"kind": "attempt", "trial": ""}, _state("a"), {"kind": "checkpoint", "trial": "a", "step": 99}]

    assert [result.best_step for result in trial_results([_trial("a")], events)] == [20]


def test_a_trial_that_diverged_never_wins_whatever_it_had_before() -> None:
    states = [_state("a", ended="diverged", best_metrics={"val_accuracy": 0.99}), _state("b", ended="finished")]
    results = trial_results([_trial("a"), _trial("b")], states)

    assert (results[0].status, results[0].metrics) == ("diverged", {})
    assert _ids(rank(results, "val_loss", "min")) == ["b", "a"]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_trial_with_a_metric_that_is_no_number_comes_last(mode: Any) -> None:
    results = [_result("a", val_loss=float("nan")), _result("b", val_loss=1.0)]

    assert _ids(rank(results, "val_loss", mode)) == ["b", "a"]


def test_ledgers_and_waits_of_all_legs_add_up_and_of_peaks_the_largest_counts() -> None:
    legs: list[dict[str, Any]] = [
        {"ledger": {"compute_s": 1.0, "other_s": 0.5, "peak_rss_bytes": 7}, "waited_s": 0.25},
        {"ledger": {"compute_s": 2.0, "start_s": 0.5, "peak_rss_bytes": 5, "of_a_newer_bigray_s": 1.0}},
        {"ledger": {"compute_s": 2.0}, "waited_s": 0.5},  # done again after a kill: that was work too
    ]
    (result,) = trial_results([_trial("a")], [_state("a", epoch=2, **leg) for leg in legs])

    assert result.ledger == Ledger(start_s=0.5, compute_s=5.0, other_s=0.5, peak_rss_bytes=7)
    assert (result.ledger.wall_s, result.waiting_s, result.epochs) == (6.0, 0.75, 2)


def test_a_trial_that_was_split_keeps_its_micro_batch_whoever_tells_it() -> None:
    retried: dict[str, Any] = {"kind": "retried", "trial": "a", "error": "no memory", "micro_batch_size": 16}
    events: list[dict[str, Any]] = [
        retried,
        _state("a", micro_batch_size=None),
        _state("b", micro_batch_size=8, num_parameters=850),
    ]

    first, second = trial_results([_trial("a"), _trial("b")], events)

    assert (first.micro_batch_size, second.micro_batch_size, second.num_parameters) == (16, 8, 850)


def test_a_failure_that_is_retried_is_none() -> None:
    events: list[dict[str, Any]] = [
        {"kind": "failed", "trial": "a", "error": "out of memory"},
        {"kind": "retried", "trial": "a", "error": "out of memory", "micro_batch_size": 16},
        _state("a", ended="finished"),
    ]
    (result,) = trial_results([_trial("a")], events)

    assert (result.status, result.error, result.micro_batch_size) == ("finished", None, 16)


def test_trials_that_were_proposed_on_the_way_have_results() -> None:
    proposed: dict[str, Any] = {"kind": "proposed", "trial": "", "trials": [_trial("b").model_dump(mode="json")]}

    assert [result.trial_id for result in trial_results([_trial("a")], [proposed, _state("b")])] == ["b"]


def test_a_config_has_what_the_search_varied_with_rate_and_batch_first() -> None:
    search = {"space": {"weight_decay": {}, "lr": {}}, "spaces": {"cnn": {"schedule": {}}, "mlp": {"momentum": {}}}}
    names = searched_names(search)
    (result,) = trial_results([_trial("a")], [_state("a")], names)

    assert names == ("lr", "global_batch_size", "weight_decay", "schedule", "momentum")
    assert tuple(result.config) == names
    assert result.config["schedule"]["kind"] == "constant"
    assert searched_names(None) == ("lr", "global_batch_size")


def test_training_time_is_counted_in_each_attempt_from_its_first_leg_to_its_last() -> None:
    def at(time: float, attempt: int, kind: str) -> dict[str, Any]:
        return {"time": time, "attempt": attempt, "kind": kind, "trial": "a"}

    first = [at(0.0, 1, "attempt"), at(2.0, 1, "started"), at(5.0, 1, "state"), at(9.0, 1, "bundle")]
    second = [at(100.0, 2, "started"), at(101.5, 2, "failed")]

    assert training_wall_s([*first, *second]) == 4.5
    assert training_wall_s([]) == 0.0


def test_slots_are_the_groups_of_the_largest_attempt() -> None:
    plans = [{"kind": "attempt", "plan": {"groups": count}} for count in (1, 3, 2)]

    assert slots([*plans, {"kind": "state"}]) == 3
    assert slots([]) == 1


def test_the_winner_of_a_leaderboard_is_its_first_trial(storage: Storage) -> None:
    trials = rank([_result("a", val_loss=2.0), _result("b", val_loss=1.0)], "val_loss", "min")
    board = Leaderboard("run", "runs/run", "val_loss", "min", trials, storage.child("bundle"), 1.234)

    assert board.winner.trial_id == "b"
    assert board.to_json()["winner"]["trial_id"] == "b"
    assert [trial["trial_id"] for trial in board.to_json()["trials"]] == ["b", "a"]
