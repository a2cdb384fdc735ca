"""Cross-validation over a group of one worker, which is a thread of this process: no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import ray

from bigray.cross_validation import of_fold
from bigray.data.dataset import TrainingArrays
from bigray.errors import SpecError
from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.specs import JobSpec
from bigray.training.groups import WorkerGroups
from bigray.training.request import RunRequest, make_request
from bigray.training.runner import drive, training_trials
from bigray.training.session import LiveRun, make_board
from bigray.training.stack_key import stack_key
from bigray.verification import only_models
from tests.unit.training.test_worker import Group

MakeRequest = Callable[..., RunRequest]


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., JobSpec]:
    """A job over 120 rows of two features, in three folds."""
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3
    points = generator.normal(size=(120, 2)) + 2.0 * generator.normal(size=(3, 2))[labels]
    colours = np.array(["red", "green", "blue"])[generator.integers(0, 3, 120)]
    np.savez(tmp_path / "rows.npz", a=points[:, 0], b=points[:, 1], colour=colours, y=labels)

    def make(data: dict[str, Any] | None = None, **changes: Any) -> JobSpec:
        source = {"source": str(tmp_path / "rows.npz"), "target": "y", "features": ["a", "b"], "k_folds": 3}
        document: dict[str, Any] = {
            "name": "job",
            "storage": str(tmp_path / "runs"),
            "data": {**source, **(data or {})},
            "models": {"linear": {"factory": "bigray.models:linear"}, "mlp": {"factory": "bigray.models:mlp"}},
            "training": {"task": "classification", "epochs": 2, "global_batch_size": 16, "lr": 0.05},
        }
        return JobSpec.model_validate({**document, **changes})

    return make


def _request(job: JobSpec, search: dict[str, Any] | None = None) -> RunRequest:
    return make_request(job, training_trials(job), search)


def _fold_arrays(request: RunRequest) -> tuple[TrainingArrays, ...]:
    return tuple(fold.arrays() for fold in request.folds)


class Attempt:
    """One attempt at a run, driven as `train` does it."""

    def __init__(self, request: RunRequest, paths: RunPaths) -> None:
        self.request, self.paths = request, paths
        self.group = Group(paths, request.dataset.arrays, _fold_arrays(request))

    def drive(self) -> list[Any]:
        """The events, which are also in the journal then."""
        try:
            drive(LiveRun(self.request, WorkerGroups(self.group.actor, 1), self.paths, [], lambda: False))
            events = self.group.actor.take_events.remote(0.0).result(10)
        finally:
            self.group.end()
        self.group.journal.append_all(events)
        self.group.journal.flush(force=True)
        return list(events)


@pytest.fixture
def attempt(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[RunRequest], Attempt]]:
    def get(reference: Any) -> Any:
        return reference.result(60) if isinstance(reference, Future) else reference

    monkeypatch.setattr(ray, "get", get)
    return lambda request: Attempt(request, paths)


def test_each_model_is_trained_on_each_fold_and_the_best_mean_on_the_usual_split(
    job_of: Callable[..., JobSpec], attempt: Callable[[RunRequest], Attempt], paths: RunPaths
) -> None:
    request = _request(job_of())
    events = attempt(request).drive()

    states = {event.trial_id: event.values for event in events if event.kind == "state"}
    names = [f"{model}-fold{number}" for model in ("linear", "mlp") for number in (1, 2, 3)]
    assert list(states)[:-1] == names
    board = make_board(request, paths, list(read_journal(paths)), 1.0)
    best, other = board.cross_validation
    assert best.values == tuple(states[f"{best.model_name}-fold{n}"]["best_metrics"]["val_accuracy"] for n in (1, 2, 3))
    assert best.mean == pytest.approx(fmean(best.values))
    assert best.mean >= other.mean
    assert list(states)[-1] == best.final_trial == best.model_name
    assert (board.winner.trial_id, board.winner.fold, board.winner.status) == (best.model_name, None, "finished")
    assert len(board.trials) == request.num_trials == 7
    assert board.to_json()["cross_validation"][0]["num_folds"] == 3


def test_a_fold_is_trained_and_validated_on_its_own_rows(
    job_of: Callable[..., JobSpec], attempt: Callable[[RunRequest], Attempt]
) -> None:
    request = _request(job_of(models={"mlp": {"factory": "bigray.models:mlp"}}))
    group = attempt(request).group
    try:
        own = [group.process.data_of(trial) for trial in request.trials]
        usual = group.process.data_of(request.trials[0].model_copy(update={"fold": None}))
    finally:
        group.end()

    for arrays, expected in zip(own, _fold_arrays(request), strict=True):
        assert np.array_equal(arrays.x_val, expected.x_val)
        assert np.array_equal(arrays.y_train, expected.y_train)
    assert usual is request.dataset.arrays


def test_the_same_run_again_trains_only_what_is_missing(
    job_of: Callable[..., JobSpec], attempt: Callable[[RunRequest], Attempt], paths: RunPaths
) -> None:
    request = _request(job_of(models={"mlp": {"factory": "bigray.models:mlp"}}))
    first = attempt(RunRequest(request.job, request.trials[:2], request.dataset, None, folds=request.folds))
    first.drive()
    events = attempt(request).drive()

    trained = [(event.trial_id, event.values["epoch"]) for event in events if event.kind == "epoch"]
    assert [name for name, _ in trained] == ["mlp-fold3", "mlp-fold3"], "the others are in storage"
    (best,) = make_board(request, paths, list(read_journal(paths)), 1.0).cross_validation
    assert len(best.values) == 3


def test_only_lanes_of_one_fold_share_a_stack(job_of: Callable[..., JobSpec]) -> None:
    trial = _request(job_of(data={"k_folds": None})).trials[0]

    assert len({stack_key(trial), stack_key(of_fold(trial, 0)), stack_key(of_fold(trial, 1))}) == 3
    assert stack_key(of_fold(trial, 1)) == stack_key(of_fold(trial.model_copy(update={"trial_id": "other"}), 1))


def test_a_batch_must_not_be_larger_than_what_a_fold_leaves_to_train_on(job_of: Callable[..., JobSpec]) -> None:
    training = {"task": "classification", "global_batch_size": 80}

    _request(job_of(data={"k_folds": None}, training=training))
    with pytest.raises(SpecError, match=r"global_batch_size: 80 is more than the 5\d training rows"):
        _request(job_of(data={"k_folds": 2}, training={**training, "global_batch_size": 80}))


def test_each_fold_embeds_its_own_categories(job_of: Callable[..., JobSpec]) -> None:
    data = {"features": ["a", "colour"], "categories": "embedding"}
    request = _request(job_of(data=data, models={"mlp": {"factory": "bigray.models:mlp"}}))

    for trial, fold in zip(request.trials, request.folds, strict=True):
        assert trial.model.params["embeddings"] == [list(pair) for pair in fold.preprocessing.embeddings]
    usual = request.trials[0].model_copy(update={"trial_id": "mlp", "fold": None, "model": request.job.models["mlp"]})
    assert [request.of_fold(usual, number) for number in range(3)] == list(request.trials)


def test_the_object_store_must_hold_every_fold(job_of: Callable[..., JobSpec]) -> None:
    request = _request(job_of())

    usual = request.dataset.arrays.nbytes
    assert request.data_bytes == usual + sum(arrays.nbytes for arrays in _fold_arrays(request)) > 3 * usual


def test_a_sweep_with_folds_needs_finalists(job_of: Callable[..., JobSpec]) -> None:
    job = job_of()
    search = {"search": "random", "trials": 3, "finalists": 0}

    with pytest.raises(SpecError, match=r"data\.k_folds: a sweep validates its finalists alone .* set finalists = 3"):
        _request(job, search)
    assert len(_request(job, {**search, "finalists": 2}).folds) == 3


def test_bigray_verify_trains_each_model_once(job_of: Callable[..., JobSpec]) -> None:
    assert [trial.trial_id for trial in training_trials(only_models(job_of(), ()))] == ["linear", "mlp"]
