from __future__ import annotations

import math

import pytest

from bigray.training.record import TrialRecord


def _record(**values: float) -> TrialRecord:
    """A record of one report for each value, of epochs 1, 2, ..."""
    record = TrialRecord("val_f1", "max")
    for epoch, value in enumerate(values.values(), start=1):
        record.add(epoch, 10 * epoch, {"val_f1": value})
    return record


def test_the_best_report_is_remembered_with_its_step_and_metrics() -> None:
    record = TrialRecord("val_f1", "max")
    was_best = [
        record.add(epoch, 10 * epoch, {"val_f1": value, "train_loss": 1.0 / epoch})
        for epoch, value in [(1, 0.5), (2, 0.8), (3, 0.7)]
    ]
    progress = record.to_progress()

    assert was_best == [True, True, False]
    assert (progress.epoch, progress.step, progress.best_epoch, progress.best_step) == (3, 30, 2, 20)
    assert progress.best_metrics == {"val_f1": 0.8, "train_loss": 0.5}
    assert progress.metrics["val_f1"] == 0.7
    assert progress.improvements == ((1, 0.5), (2, 0.8))


def test_less_is_better_where_the_mode_says_so() -> None:
    record = TrialRecord("val_mse", "min")
    for epoch, value in [(1, 0.5), (2, 0.8), (3, 0.2)]:
        record.add(epoch, epoch, {"val_mse": value})

    assert record.best_epoch == 3


def test_equal_values_are_told_apart_by_the_loss_where_both_have_one() -> None:
    record = TrialRecord("val_f1", "max")
    record.add(1, 1, {"val_f1": 0.5})
    assert not record.add(2, 2, {"val_f1": 0.5})
    assert record.add(3, 3, {"val_f1": 0.5, "val_loss": 0.4})
    assert not record.add(4, 4, {"val_f1": 0.5, "val_loss": 0.6})
    assert record.add(5, 5, {"val_f1": 0.5, "val_loss": 0.3})


def test_a_value_that_is_not_finite_is_no_best_one_and_leaves_no_metrics() -> None:
    record = _record(a=0.5)
    assert not record.add(2, 20, {"val_f1": math.nan, "train_loss": 0.1})

    assert record.is_diverged
    assert record.to_progress("diverged").metrics == {}
    assert record.to_progress("diverged").best_metrics == {"val_f1": 0.5}


def test_another_value_that_is_not_finite_is_left_out() -> None:
    record = TrialRecord("val_f1", "max")
    record.add(1, 1, {"val_f1": 0.5, "grad_norm": math.inf})

    assert not record.is_diverged
    assert record.best_metrics == {"val_f1": 0.5}


def test_several_reports_of_an_epoch_leave_one_improvement() -> None:
    record = TrialRecord("val_f1", "max")
    for step in range(1, 1001):
        record.add(1 + step // 600, step, {"val_f1": float(step)})

    assert record.to_progress().improvements == ((1, 599.0), (2, 1000.0))


def test_a_scheduler_is_told_the_better_value_of_an_epoch_that_was_trained_again() -> None:
    record = _record(a=0.4, b=0.6)
    record.add(1, 10, {"val_f1": 0.7})  # started again from the top, with more luck

    assert record.to_progress().to_state().best_value_at(2) == 0.7


def test_patience_is_counted_in_epochs_since_the_best_one() -> None:
    record = _record(a=0.9, b=0.1, c=0.1)

    assert record.is_stale(2)
    assert not record.is_stale(3)
    assert not TrialRecord("val_f1", "max").is_stale(1)


@pytest.mark.parametrize("ended", [None, "finished", "diverged"])
def test_a_record_comes_back_from_progress(ended: str | None) -> None:
    record = _record(a=0.4, b=0.6, c=0.5)
    progress = record.to_progress(ended)
    again = TrialRecord.of(progress, "val_f1", "max")

    assert again.to_progress(ended) == progress
    assert again.is_diverged == (ended == "diverged")
    assert not again.is_empty
