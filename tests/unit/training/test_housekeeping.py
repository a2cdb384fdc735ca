from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigray.paths import RunPaths
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.storage import open_storage
from bigray.training.checkpoint import Progress
from bigray.training.checkpoint_writer import save_checkpoint
from bigray.training.commands import Event
from bigray.training.housekeeping import Housekeeping

TRAINING = TrainingSpec.model_validate({"task": "classification", "epochs": 4})


def _trial(name: str) -> TrialSpec:
    model = ModelSpec(factory="bigray.models:mlp")
    return TrialSpec(trial_id=name, model_name="mlp", model=model, training=TRAINING, seed=0)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(open_storage(tmp_path), "run")


def _saved(paths: RunPaths, *names: str) -> tuple[TrialSpec, ...]:
    """Trials with a checkpoint of step 9 each."""
    trials = tuple(_trial(name) for name in names)
    for trial in trials:
        save_checkpoint(paths, trial, 1, Progress(epoch=3, step=9), {"model.safetensors": b"weights"})
    return trials


def _state(name: str, accuracy: float, ended: str | None = "finished") -> list[Event]:
    values: dict[str, Any] = {"epoch": 4, "ended": ended, "best_epoch": 4, "best_step": 9}
    values["best_metrics"] = {"val_accuracy": accuracy, "val_loss": 1 - accuracy}
    return [Event("checkpoint", name, {"step": 9}), Event("state", name, values)]


def _is_trimmed(paths: RunPaths, name: str) -> bool:
    return not paths.storage.exists(f"{paths.checkpoint(name, 9)}/model.safetensors") and not [
        found for found in paths.storage.list_names(paths.checkpoint(name, 9)) if found.startswith("model")
    ]


def _names_trimmed(paths: RunPaths) -> set[str]:
    return {name for name in paths.storage.list_names("trials") if _is_trimmed(paths, name)}


def test_of_the_trials_that_have_ended_the_best_keeps_its_weights(paths: RunPaths) -> None:
    housekeeping = Housekeeping(paths, _saved(paths, "a", "b", "c"), 1, 1, [])
    for name, accuracy in (("a", 0.8), ("b", 0.9), ("c", 0.7)):
        housekeeping.note(_state(name, accuracy))

    assert _names_trimmed(paths) == {"a", "c"}


def test_a_trial_that_may_go_on_is_left_alone_until_the_run_is_complete(paths: RunPaths) -> None:
    housekeeping = Housekeeping(paths, _saved(paths, "a", "b"), 1, 1, [])
    housekeeping.note([*_state("a", 0.9), *_state("b", 0.1, ended=None)])
    assert _names_trimmed(paths) == set()

    housekeeping.finish()
    assert _names_trimmed(paths) == {"b"}


@pytest.mark.parametrize(("one", "other"), [("a-seed1", "a-seed2"), ("a-fold1", "a-usual")])
def test_finalists_seeds_and_folds_keep_their_weights_until_one_has_won(paths: RunPaths, one: str, other: str) -> None:
    trials = _saved(paths, "a", one, other)
    housekeeping = Housekeeping(paths, trials, 1, 1, [])
    housekeeping.note([*_state("a", 0.9), Event("finalists", "", {"trials": ["a"]})])
    housekeeping.note([*_state(one, 0.8), *_state(other, 0.7)])
    assert _names_trimmed(paths) == set()


def test_a_trial_that_was_proposed_on_the_way_is_looked_after_too(paths: RunPaths) -> None:
    first, late = _saved(paths, "a", "late")
    housekeeping = Housekeeping(paths, [first], 1, 1, [])
    housekeeping.note([Event("proposed", "", {"trials": [late.model_dump(mode="json")]})])
    housekeeping.note([*_state("a", 0.9), *_state("late", 0.5)])

    assert _names_trimmed(paths) == {"late"}


def test_the_trials_of_a_stack_have_nothing_to_trim_and_the_stack_goes_when_the_run_is_complete(
    paths: RunPaths,
) -> None:
    paths.storage.write_bytes(f"{paths.stack('leg-000001')}/0/model.safetensors", b"lanes")
    housekeeping = Housekeeping(paths, [_trial("a"), _trial("b")], 1, 1, [])
    housekeeping.note([_state("a", 0.9)[1], _state("b", 0.5)[1]])
    assert paths.storage.exists("stacks")

    housekeeping.finish()
    assert not paths.storage.exists("stacks")
    assert not paths.storage.exists("trials")


def test_a_run_that_goes_on_trims_by_what_earlier_attempts_found(paths: RunPaths) -> None:
    trials = _saved(paths, "a", "b")
    earlier = [{"kind": event.kind, "trial": event.trial_id, **event.values} for event in _state("a", 0.9)]
    Housekeeping(paths, trials, 1, 1, earlier).note(_state("b", 0.5))

    assert _names_trimmed(paths) == {"b"}


def test_who_has_won_keeps_its_weights_whatever_its_own_metric(paths: RunPaths) -> None:
    housekeeping = Housekeeping(paths, _saved(paths, "a", "b", "c"), 1, 1, [])
    housekeeping.note([*_state("a", 0.9, None), *_state("b", 0.8, None), *_state("c", 0.7, None)])
    housekeeping.finish({"c"})

    assert _names_trimmed(paths) == {"b"}


def test_of_a_population_nothing_goes_before_the_run_is_complete(paths: RunPaths) -> None:
    housekeeping = Housekeeping(paths, _saved(paths, "a", "b"), 1, 1, [], is_population=True)
    housekeeping.note([*_state("a", 0.9), *_state("b", 0.8)])
    assert _names_trimmed(paths) == set()

    housekeeping.finish()
    assert _names_trimmed(paths) == {"b"}
