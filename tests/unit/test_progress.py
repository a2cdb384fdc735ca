from __future__ import annotations

from typing import Any

import pytest

from bigray.progress import RunProgress
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.training.commands import Event, TrialState


def _trial(trial_id: str) -> TrialSpec:
    return TrialSpec(
        trial_id=trial_id,
        model_name="mlp",
        model=ModelSpec(factory="bigray.models:mlp"),
        training=TrainingSpec(task="classification", epochs=10, metric="val_loss"),
        seed=0,
    )


def _epoch(trial_id: str, epoch: int, loss: float) -> Event:
    metrics = {"val_loss": loss}
    values: dict[str, Any] = {"epoch": epoch, "train_loss": loss, "metrics": metrics, "best_metrics": metrics}
    return Event("epoch", trial_id, {**values, "samples_per_s": 100.0, "epoch_s": 2.0})


def _state(trial_id: str, epoch: int, ended: str | None) -> Event:
    return Event.of_state(trial_id, TrialState(epoch, epoch * 5, ended, {}, epoch, epoch * 5, {"val_loss": 1.0}))


@pytest.fixture
def progress() -> RunProgress:
    progress = RunProgress()
    progress.update(Event("starting", "", {"trials": (_trial("0"), _trial("1"))}))
    return progress


def test_a_run_begins_with_every_trial_waiting(progress: RunProgress) -> None:
    assert {row.status for row in progress.trials.values()} == {"waiting"}
    assert (progress.metric, progress.mode, progress.num_ended, progress.leader) == ("val_loss", "min", 0, None)


def test_the_leader_has_the_best_value_so_far(progress: RunProgress) -> None:
    progress.update(_epoch("0", 1, 0.5))
    progress.update(_epoch("1", 1, 0.25))

    assert progress.leader is progress.trials["1"]


def test_a_leader_may_have_a_value_of_zero(progress: RunProgress) -> None:
    progress.update(_epoch("0", 1, 0.0))
    progress.update(_epoch("1", 1, 0.25))

    assert progress.leader is progress.trials["0"]


def test_the_remaining_time_is_that_of_the_epochs_left_at_the_newest_pace(progress: RunProgress) -> None:
    assert progress.trials["0"].remaining_s is None
    progress.update(_epoch("0", 4, 0.5))

    assert progress.trials["0"].remaining_s == 12.0


def test_an_ended_trial_has_no_time_left_and_counts_as_ended(progress: RunProgress) -> None:
    progress.update(_epoch("0", 4, 0.5))
    progress.update(_state("0", 10, "finished"))

    assert (progress.trials["0"].status, progress.trials["0"].remaining_s) == ("finished", None)
    assert progress.num_ended == 1


def test_a_trial_goes_through_the_statuses_that_its_events_tell(progress: RunProgress) -> None:
    seen = []
    for event in (
        Event("started", "0", {"group": 0}),
        _state("0", 2, None),
        Event("promoted", "0", {"epoch": 6}),
        _epoch("0", 3, 0.5),
        _state("0", 6, None),
        Event("halted", "0"),
    ):
        progress.update(event)
        seen.append(progress.trials["0"].status)

    assert seen == ["running", "paused", "promoted", "running", "paused", "halted"]
    assert (progress.num_ended, progress.happened["promoted"]) == (1, 1)


def test_the_counts_by_status_are_those_of_the_rows() -> None:
    progress = RunProgress()
    progress.update(Event("starting", "", {"trials": tuple(_trial(str(number)) for number in range(5))}))
    for event in (
        Event("started", "0", {"group": 0}),
        _epoch("1", 1, 0.5),
        _state("1", 2, None),
        _state("2", 10, "diverged"),
        Event("failed", "3", {"error": "boom"}),
        Event("exporting", "1"),
    ):
        progress.update(event)
    rows = [row.status for row in progress.trials.values()]

    assert rows == ["running", "halted", "diverged", "failed", "waiting"]
    assert {status: count for status, count in progress.counts.items() if count} == dict.fromkeys(rows, 1)
    assert list(progress.running) == ["0"]


def test_a_trial_that_diverges_gives_up_the_lead(progress: RunProgress) -> None:
    progress.update(_epoch("0", 1, 0.1))
    progress.update(_epoch("1", 1, 0.5))
    progress.update(_state("0", 2, "diverged"))

    assert progress.leader is progress.trials["1"]
    assert progress.best_rows(9) == [progress.trials["1"]]


def test_trials_that_are_proposed_on_the_way_join_the_others() -> None:
    progress = RunProgress()
    progress.update(Event("starting", "", {"trials": (), "total": 3}))
    progress.update(Event("proposed", "", {"trials": [_trial("0").model_dump(mode="json")]}))
    progress.update(_epoch("0", 1, 0.5))

    assert (progress.num_trials, progress.num_waiting, progress.metric) == (3, 2, "val_loss")
    assert progress.leader is progress.trials["0"]


def test_trials_that_ended_in_an_attempt_before_count_as_ended() -> None:
    progress = RunProgress()
    progress.update(Event("resuming", "", {"trials": tuple(map(_trial, "012")), "ended": 2, "step": 9}))
    progress.update(_state("2", 10, "finished"))

    assert (progress.num_ended, progress.num_waiting) == (3, 0)


def test_pace_and_time_left_are_not_told_before_they_mean_something() -> None:
    now = 0.0
    progress = RunProgress(lambda: now)
    names = [str(number) for number in range(30)]
    progress.update(Event("starting", "", {"trials": tuple(map(_trial, names))}))
    assert progress.trials_per_s is None
    for name in names[:10]:
        progress.update(Event("started", name, {"group": 0}))
        now += 0.5
        progress.update(_state(name, 2, None))
        if name == "3":
            assert progress.trials_per_s is None and progress.remaining_s is None

    assert progress.trials_per_s == 2.0
    assert progress.remaining_s == 10.0


def test_the_pace_is_that_of_the_last_minute() -> None:
    now = 0.0
    progress = RunProgress(lambda: now)
    names = [str(number) for number in range(100)]
    progress.update(Event("starting", "", {"trials": tuple(map(_trial, names))}))
    for number, name in enumerate(names[:60]):
        progress.update(Event("started", name, {"group": 0}))
        now += 10.0 if number < 30 else 1.0
        progress.update(_state(name, 2, None))
    now += 30.0

    assert progress.trials_per_s == pytest.approx(0.5, abs=0.02)


def test_a_split_and_a_takeover_are_remembered(progress: RunProgress) -> None:
    progress.update(Event("retried", "0", {"error": "no memory", "micro_batch_size": 16}))
    progress.update(Event("exploited", "1", {"source": "0", "epoch": 2, "sha256": "ab"}))

    assert progress.trials["0"].micro_batch_size == 16
    assert progress.trials["1"].source == "0"
    assert (progress.happened["retried"], progress.happened["exploited"]) == (1, 1)


def test_a_budget_that_is_used_up_is_remembered(progress: RunProgress) -> None:
    assert progress.budget is None
    progress.update(Event("budget", "", {"text": "10m"}))

    assert progress.budget == "10m"


def test_trials_that_a_larger_budget_would_go_on_with_have_not_ended(progress: RunProgress) -> None:
    for event in (_state("0", 2, None), Event("budget", "", {"text": "10m"}), Event("exporting", "0")):
        progress.update(event)

    assert progress.trials["0"].status == "paused"
    assert progress.num_ended == 0


def test_a_failed_trial_counts_as_ended(progress: RunProgress) -> None:
    progress.update(Event("failed", "1", {"error": "boom"}))

    assert progress.num_ended == 1


def test_events_that_change_nothing_shown_are_passed_over(progress: RunProgress) -> None:
    progress.update(Event("checkpoint", "0", {"step": 3}))

    assert {row.status for row in progress.trials.values()} == {"waiting"}
