from __future__ import annotations

from typing import Any

import pytest

from bigray.results import TrialResult
from bigray.training.retention import checkpoints_to_drop, trials_to_trim


@pytest.mark.parametrize(
    ("committed", "saved", "keep_last", "dropped"),
    [
        ([4], 4, 2, ()),
        ([4, 3], 4, 2, ()),
        ([4, 3, 2, 1], 4, 2, (1, 2)),
        ([4, 3, 2, 1], 4, 1, (1, 2, 3)),
        ([9, 4, 3], 4, 2, ()),
        ([9, 8, 4, 3, 2], 4, 1, (2, 3)),
    ],
)
def test_the_newest_up_to_the_saved_step_stay_and_what_is_further_on_is_left_alone(
    committed: list[int], saved: int, keep_last: int, dropped: tuple[int, ...]
) -> None:
    assert checkpoints_to_drop(committed, saved, keep_last) == dropped


def test_what_the_trial_went_back_behind_is_not_counted_among_those_kept() -> None:
    assert checkpoints_to_drop([4, 3, 2, 1], 4, 2, stale=[2, 3]) == (2, 3)


def test_what_is_further_on_goes_where_the_trial_went_back_behind_it() -> None:
    assert checkpoints_to_drop([9, 8, 4, 3], 4, 2, stale=[9]) == (9,)


def test_a_step_saved_again_is_not_stale_any_more() -> None:
    assert checkpoints_to_drop([3, 2], 3, 2, stale=[3]) == ()


def _result(trial_id: str, value: float | None, status: Any = "finished") -> TrialResult:
    metrics = {} if value is None else {"val_accuracy": value, "val_loss": 1.0}
    return TrialResult(trial_id, "net", {}, status, 3, 3, 30, metrics)


def test_all_but_the_best_trials_are_trimmed() -> None:
    results = [_result("a", 0.7), _result("b", 0.9), _result("c", 0.8), _result("d", None, "diverged")]

    assert trials_to_trim(results, 1, "val_accuracy", "max") == ("c", "a", "d")
    assert trials_to_trim(results, 2, "val_accuracy", "max") == ("a", "d")
    assert trials_to_trim(results, 1, "val_accuracy", "min") == ("c", "b", "d")
    assert trials_to_trim(results, 9, "val_accuracy", "max") == ()


def test_a_failed_trial_keeps_its_checkpoint_since_it_can_go_on() -> None:
    results = [_result("a", 0.9), _result("b", None, "failed")]

    assert trials_to_trim(results, 1, "val_accuracy", "max") == ()


def test_who_is_trimmed_early_would_be_trimmed_at_the_end() -> None:
    """Trimming while the sweep runs never takes a trial that the whole sweep would keep."""
    results = [_result(str(number), value) for number, value in enumerate([0.5, 0.5, 0.9, 0.1, 0.9, 0.7])]
    at_the_end = set(trials_to_trim(results, 2, "val_accuracy", "max"))

    for number in range(len(results)):
        assert set(trials_to_trim(results[:number], 2, "val_accuracy", "max")) <= at_the_end
