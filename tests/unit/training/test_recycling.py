"""When a process makes room for a fresh one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bigray.specs import TrialSpec
from bigray.training.commands import Lane, TrainStack, TrainTo
from bigray.training.recycling import must_be_fresh, rss_limit_bytes, subjects

GB = 10**9


def test_a_limit_that_is_given_counts_as_it_is() -> None:
    assert rss_limit_bytes(0.5, 64 * GB, 4, GB) == GB // 2


@pytest.mark.parametrize(("workers", "limit_gb"), [(1, 16.0), (4, 4.0), (0, 16.0)])
def test_without_one_the_workers_of_a_node_share_a_quarter_of_it(workers: int, limit_gb: float) -> None:
    assert rss_limit_bytes(None, 64 * GB, workers, GB) == limit_gb * GB


def test_on_a_small_node_a_process_may_still_be_twice_what_it_begins_with() -> None:
    assert rss_limit_bytes(None, 8 * GB, 8, GB) == 2 * GB


def test_with_isolate_a_process_trains_one_trial(make_trial: Callable[..., TrialSpec]) -> None:
    command = TrainTo(make_trial(), 2)
    mine, other = subjects(command), frozenset({"another"})

    assert not must_be_fresh(True, command, frozenset())
    assert not must_be_fresh(True, command, mine), "the next rung of the same trial"
    assert must_be_fresh(True, command, other)
    assert not must_be_fresh(False, command, other)


def test_fewer_lanes_of_a_stack_go_on_in_the_same_process_and_others_do_not(
    make_trial: Callable[..., TrialSpec],
) -> None:
    lanes = [Lane(make_trial().model_copy(update={"trial_id": name})) for name in "abc"]
    whole, fewer = TrainStack("first", tuple(lanes), 1), TrainStack("second", tuple(lanes[:2]), 2)

    assert subjects(whole) == {"a", "b", "c"}
    assert not must_be_fresh(True, fewer, subjects(whole))
    assert must_be_fresh(True, whole, subjects(fewer))
