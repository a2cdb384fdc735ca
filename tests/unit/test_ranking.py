from __future__ import annotations

from typing import Any

import pytest

from bigray.ranking import rank, trial_results
from bigray.results import Leaderboard, TrialResult
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


def test_the_winner_of_a_leaderboard_is_its_first_trial(storage: Storage) -> None:
    trials = rank([_result("a", val_loss=2.0), _result("b", val_loss=1.0)], "val_loss", "min")
    board = Leaderboard("run", "runs/run", "val_loss", "min", trials, storage.child("bundle"), 1.234)

    assert board.winner.trial_id == "b"
    assert board.to_json()["winner"]["trial_id"] == "b"
    assert [trial["trial_id"] for trial in board.to_json()["trials"]] == ["b", "a"]
