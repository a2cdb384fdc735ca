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


def test_a_paused_trial_was_halted_once_its_group_takes_another(progress: RunProgress) -> None:
    progress.update(Event("started", "0", {"group": 0}))
    progress.update(_state("0", 2, None))
    assert progress.trials["0"].status == "paused"

    progress.update(Event("started", "1", {"group": 0}))

    assert [row.status for row in progress.trials.values()] == ["halted", "running"]


def test_a_failed_trial_counts_as_ended(progress: RunProgress) -> None:
    progress.update(Event("failed", "1", {"error": "boom"}))

    assert progress.num_ended == 1


def test_events_that_change_nothing_shown_are_passed_over(progress: RunProgress) -> None:
    progress.update(Event("checkpoint", "0", {"step": 3}))

    assert {row.status for row in progress.trials.values()} == {"waiting"}
