"""What a trial tells its scheduler."""

import math

from bigray.training.commands import TrialState


def state_with(improvements: tuple[tuple[int, float], ...]) -> TrialState:
    return TrialState(
        epoch=20, step=400, ended="finished", metrics={}, best_epoch=9, best_step=180, best_metrics={},
        improvements=improvements,
    )  # fmt: skip


def test_a_resumed_trial_tells_each_rung_what_was_best_by_then() -> None:
    state = state_with(((1, 0.8), (4, 0.9), (9, 0.95)))
    assert [state.best_value_at(epoch) for epoch in (1, 2, 4, 8, 9, 20)] == [0.8, 0.8, 0.9, 0.9, 0.95, 0.95]


def test_before_the_first_validation_there_is_no_value() -> None:
    assert math.isnan(state_with(((4, 0.9),)).best_value_at(2))
