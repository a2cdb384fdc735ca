from __future__ import annotations

import pytest

from bigray.results import Kill
from bigray.training.commands import Event
from bigray.training.faults import Watch, other_size, plan_faults


def _kill(step: int) -> Kill:
    return Kill(rank=0, pid=1, node="10.0.0.1", step=step)


def _event(kind: str, step: int, trial_id: str = "mlp") -> Event:
    return Event(kind, trial_id, {"step": step, "from": "memory"})


def _lost_and_back(watch: Watch, *, step: int, at_s: float) -> None:
    watch.note(Event("regrouped", "mlp", {"workers": 2}), at_s)
    watch.note(_event("resumed", step), at_s)


@pytest.mark.parametrize("seed", range(20))
def test_there_is_a_kill_in_each_part_of_the_trial_and_the_resize_in_its_middle(seed: int) -> None:
    plan = plan_faults(1000, 3, str(seed))
    steps = [kill.step for kill in (*plan.before, *plan.after)]

    assert [step // 300 for step in steps] == [0, 1, 2]
    assert 400 <= plan.resize_step <= 600
    assert all(kill.step < plan.resize_step for kill in plan.before)
    assert all(kill.step >= plan.resize_step for kill in plan.after)
    assert all(0 <= kill.seat < 1 for kill in (*plan.before, *plan.after))


def test_faults_follow_from_the_seed() -> None:
    assert plan_faults(1000, 3, "0 mlp") == plan_faults(1000, 3, "0 mlp")
    assert len({plan_faults(1000, 3, f"{seed} mlp") for seed in range(10)}) == 10


def test_without_kills_there_is_a_resize_only() -> None:
    plan = plan_faults(1000, 0, "0")

    assert (plan.before, plan.after) == ((), ())
    assert plan.resize_step > 0


@pytest.mark.parametrize(
    ("now", "most", "after"), [(4, 4, 2), (3, 3, 1), (2, 2, 1), (1, 2, 2), (1, 8, 2), (1, 1, 1), (2, 0, 1)]
)
def test_a_group_goes_on_with_half_its_workers_or_two_in_the_place_of_one(now: int, most: int, after: int) -> None:
    assert other_size(now, most) == after


def test_the_step_is_known_from_the_first_event_on_and_carried_on_at_the_undisturbed_pace() -> None:
    watch = Watch("mlp", steps_per_s=10)
    assert watch.step(1.0) is None

    watch.note(_event("epoch", 20), 2.0)
    assert watch.step(2.5) == 25


def test_events_of_another_trial_and_old_checkpoints_change_nothing() -> None:
    watch = Watch("mlp", steps_per_s=0)
    watch.note(_event("epoch", 20), 1.0)
    watch.note(_event("checkpoint", 15), 2.0)
    watch.note(_event("epoch", 99, trial_id="cnn"), 2.0)

    assert watch.step(3.0) == 20


def test_a_group_recovers_when_it_goes_on_after_it_was_formed_again() -> None:
    watch = Watch("mlp", steps_per_s=10)
    watch.note(_event("epoch", 20), 1.0)
    watch.strike(_kill(25), 1.5)
    watch.note(_event("epoch", 30), 1.6)  # was on its way when the worker was killed
    assert watch.is_recovering
    assert watch.step(100.0) == 30, "nothing moves meanwhile"

    _lost_and_back(watch, step=31, at_s=4.0)
    (kill,) = watch.kills
    assert not watch.is_recovering
    assert (kill.recovery_s, kill.went_on_at_step, kill.went_on_from) == (2.5, 31, "memory")
    assert watch.step(4.5) == 36


def test_a_trial_that_began_anew_has_recovered_when_it_is_past_the_kill() -> None:
    """Killed before its first checkpoint, it has nothing to go on from, and tells of no resumption."""
    watch = Watch("mlp", steps_per_s=0)
    watch.strike(_kill(5), 1.0)
    watch.note(Event("regrouped", "mlp", {"workers": 1}), 2.0)
    watch.note(_event("checkpoint", 4), 3.0)
    assert watch.is_recovering

    watch.note(_event("checkpoint", 6), 4.0)
    assert not watch.is_recovering
    assert watch.kills[0].recovery_s == 3.0
    assert watch.kills[0].went_on_from is None


def test_a_kill_that_the_trial_did_not_outlive_has_no_recovery() -> None:
    watch = Watch("mlp", steps_per_s=0)
    watch.strike(_kill(5), 1.0)

    assert watch.kills[0].recovery_s is None


def test_where_a_run_first_went_on_is_remembered() -> None:
    watch = Watch("mlp", steps_per_s=0)
    watch.note(_event("resumed", 100), 1.0)
    watch.strike(_kill(110), 2.0)
    _lost_and_back(watch, step=108, at_s=3.0)

    assert watch.went_on_at_step == 100
