"""Cross-validation against a real Ray: `train` over folds, whole and cut off, and a sweep's finalists on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray

from bigray.bundle import ModelBundle
from bigray.errors import TrainingFailed
from bigray.inference import Predictor
from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.report import read_report
from bigray.results import Leaderboard
from bigray.specs import JobSpec, SearchSpec
from bigray.storage import open_storage
from bigray.training.commands import Event
from bigray.training.request import make_request
from bigray.training.runner import drive_trials, train, train_request, training_trials
from bigray.training.session import LiveRun, run_trials, silent
from bigray.tuning.runner import tune
from tests.integration.jobs import make_job
from tests.processes import worker_pids
from tests.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("four_cpu_ray"), pytest.mark.timeout(300)]

MODELS = {
    "linear": {"factory": "bigray.models:linear"},
    "mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [16]}},
}
NUM_FOLDS = 3


def job_with_folds(folder: Path, **training: int) -> JobSpec:
    """One group of two workers."""
    job = make_job(folder, models=MODELS, **training)
    scaling = job.scaling.model_copy(update={"cpus_per_worker": 2.0})
    return job.model_copy(update={"data": job.data.model_copy(update={"k_folds": NUM_FOLDS}), "scaling": scaling})


def fold_names(model: str) -> list[str]:
    return [f"{model}-fold{number}" for number in range(1, NUM_FOLDS + 1)]


def trained(events: list[Event]) -> list[str]:
    """Trials in the order of their first epoch."""
    return list(dict.fromkeys(event.trial_id for event in events if event.kind == "epoch"))


def assert_exported_on_the_usual_split(board: Leaderboard, job: JobSpec) -> None:
    bundle = ModelBundle.load(board.bundle)
    dataset = make_request(job, training_trials(job)).dataset
    labels = Predictor(bundle).run_table(dataset.holdout).labels
    assert bundle.manifest.origin.trial == board.winner.trial_id
    assert board.winner.fold is None
    assert bundle.manifest.preprocessing == dataset.preprocessing, "not that of a fold"
    assert bundle.manifest.card.rows == dataset.num_rows
    assert np.mean(np.array(labels) == np.array(dataset.holdout_targets())) > 0.8


def test_each_model_is_validated_on_each_fold_by_the_same_processes_and_the_best_is_exported(tmp_path: Path) -> None:
    job = job_with_folds(tmp_path)
    events: list[Event] = []
    pids: set[tuple[int, ...]] = set()

    def listen(event: Event) -> None:
        events.append(event)
        if event.kind == "state":
            pids.add(tuple(worker_pids()))

    board = train(job, listener=listen)
    best, other = board.cross_validation
    assert trained(events) == [*fold_names("linear"), *fold_names("mlp"), best.model_name]
    assert len(pids) == 1
    assert len(pids.pop()) == 2
    assert all(len(model.values) == NUM_FOLDS and model.low <= model.mean <= model.high for model in (best, other))
    assert best.mean >= other.mean
    assert board.winner.trial_id == best.model_name
    assert (board.samples_lost, board.samples_repeated) == (0, 0)
    assert_exported_on_the_usual_split(board, job)
    assert read_report(board.run_uri).cross_validation == board.cross_validation

    again: list[Event] = []
    assert train(job, listener=again.append).trials == board.trials
    assert [event.kind for event in again] == ["complete", "ranked"]


def test_what_was_cut_off_goes_on_at_the_first_fold_that_is_missing(tmp_path: Path) -> None:
    job = job_with_folds(tmp_path)
    request = make_request(job, training_trials(job))
    whole = train_request(make_request(job.model_copy(update={"storage": f"{tmp_path}/whole"}), training_trials(job)))

    def cut_off(run: LiveRun) -> None:
        drive_trials(run.groups, run.request.trials[:2])
        raise TrainingFailed("cut off here")

    with pytest.raises(TrainingFailed, match="cut off here"):
        run_trials(request, cut_off, silent, address=None, new=False)
    wait_until(lambda: ray.available_resources().get("CPU") == 4.0, timeout_s=20.0)
    events: list[Event] = []
    board = train_request(request, listener=events.append)
    assert trained(events) == ["linear-fold3", *fold_names("mlp"), board.winner.trial_id]
    for found, expected in zip(board.cross_validation, whole.cross_validation, strict=True):
        assert found.model_name == expected.model_name
        assert found.values == pytest.approx(expected.values)
    assert_exported_on_the_usual_split(board, job)


def test_the_finalists_of_a_sweep_are_judged_by_the_folds(tmp_path: Path) -> None:
    job = job_with_folds(tmp_path)
    search = SearchSpec.model_validate(
        {"trials": 6, "space": {"lr": {"log_uniform": [1e-3, 0.3]}}, "finalists": 2, "asha": {"grace_epochs": 1}}
    )
    board = tune(job, search)

    assert len(board.finalists) == 2
    assert all(len(one.values) == NUM_FOLDS and one.over == "folds" for one in board.finalists)
    assert board.winner.trial_id == f"{board.finalists[0].trial_id}-usual"
    assert board.cross_validation == ()
    events = list(read_journal(RunPaths(open_storage(board.run_uri), board.run_id)))
    assert [event["folds"] for event in events if event["kind"] == "finalists"] == [NUM_FOLDS]
    assert_exported_on_the_usual_split(board, job)
