"""Which lanes of a stack are trained next."""

from __future__ import annotations

import pytest

from bigray.training.checkpoint import Checkpoint, Progress
from bigray.training.lanes import next_to_train


def _at(epoch: int | None, ended: str | None = None) -> Checkpoint | None:
    return None if epoch is None else Checkpoint(Progress(epoch=epoch, step=5 * epoch, ended=ended), {})


@pytest.mark.parametrize(
    ("epochs", "lanes", "until"),
    [
        ((None, None), [0, 1], 4),
        ((2, 2, 2), [0, 1, 2], 4),
        ((2, None, 2), [1], 2),
        ((3, 1, 2, 1), [1, 3], 2),
        ((6, 1), [1], 4),
        ((4, 5), [], 4),
    ],
)
def test_those_furthest_behind_catch_up_with_the_next(epochs: tuple[int | None], lanes: list[int], until: int) -> None:
    assert next_to_train([_at(epoch) for epoch in epochs], 4) == (lanes, until)


def test_a_lane_that_has_ended_is_waited_for_by_nobody() -> None:
    assert next_to_train([_at(1, "diverged"), _at(2), _at(3, "stopped early")], 4) == ([1], 4)
