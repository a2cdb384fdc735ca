"""`train` against a real Ray: results on disk, resuming, and workers that die."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import ray
import safetensors.numpy

from bigray.bundle import ModelBundle
from bigray.errors import CapacityError, TrainingFailed
from bigray.inference import Predictor
from bigray.journal import read_journal
from bigray.loading import load_job
from bigray.paths import RunPaths
from bigray.storage import open_storage
from bigray.training.commands import Event
from bigray.training.request import make_request
from bigray.training.runner import train, training_trials
from tests.integration.jobs import make_job

pytestmark = pytest.mark.usefixtures("four_cpu_ray")
SLOW = {"slow": {"factory": "tests.integration.user_models:slow_mlp"}}


def bundle_weights(bundle: ModelBundle) -> np.ndarray:
    tensors = safetensors.numpy.load(bundle.weights)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def test_training_writes_a_verified_bundle_that_predicts_the_holdout(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    board = train(job)
    bundle = ModelBundle.load(board.bundle)
    dataset = make_request(job, training_trials(job)).dataset
    labels = Predictor(bundle).run_table(dataset.holdout).labels
    assert bundle.onnx is not None
    assert bundle.manifest.origin.metrics == board.winner.metrics
    assert bundle.manifest.origin.step == board.winner.best_step
    assert np.mean(np.array(labels) == np.array(dataset.holdout_targets())) > 0.9
    assert {path.suffix for path in (tmp_path / "runs").rglob("*") if path.is_file()} <= {
        ".json",
        ".jsonl",
        ".onnx",
        ".safetensors",
    }


def test_the_same_command_reads_a_complete_run_instead_of_training_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    first, events = train(job), []
    again = train(job, listener=events.append)
    assert [event.kind for event in events] == ["complete", "ranked"]
    assert again.trials == first.trials


def test_a_killed_worker_costs_no_step_and_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    settings = {"epochs": 6, "checkpoint_every_s": 0.1}
    undisturbed = train(make_job(tmp_path, models=SLOW, **settings))
    (tmp_path / "killed").mkdir()
    killed: list[int] = []

    def kill_a_worker_in_the_third_epoch(event: Event) -> None:
        if event.kind == "epoch" and event.values["epoch"] == 2 and not killed:
            pids = worker_pids()
            killed.append(pids[-1])
            os.kill(pids[-1], signal.SIGKILL)

    disturbed = train(
        make_job(tmp_path / "killed", models=SLOW, **settings), listener=kill_a_worker_in_the_third_epoch
    )
    events = list(read_journal(RunPaths(open_storage(disturbed.run_uri), disturbed.run_id)))
    epochs = [event["epoch"] for event in events if event["kind"] == "epoch"]
    assert len(killed) == 1
    assert any(event["kind"] == "resumed" for event in events), "the group went on from a checkpoint"
    assert sorted(set(epochs)) == [1, 2, 3, 4, 5, 6]
    weights = [bundle_weights(ModelBundle.load(board.bundle)) for board in (undisturbed, disturbed)]
    assert np.array_equal(*weights)


def worker_pids() -> list[int]:
    """Process ids of the live Ray Train workers on this machine, by the name Ray gives the process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:  # ended while we looked
                continue
            if title.startswith(b"ray::RayTrainWorker") or title.startswith(b"ray::_RayTrainWorker"):
                found.append(int(entry.name))
    return sorted(found)


def test_a_model_that_raises_is_reported_and_the_other_model_still_wins(tmp_path: Path) -> None:
    models = {
        "broken": {"factory": "tests.integration.user_models:raises_in_forward"},
        "mlp": {"factory": "bigray.models:mlp"},
    }
    board = train(make_job(tmp_path, models=models))
    by_name = {trial.model_name: trial for trial in board.trials}
    assert board.winner.model_name == "mlp"
    assert by_name["broken"].status == "failed"
    assert by_name["broken"].error is not None
    assert "no forward today" in by_name["broken"].error


def test_a_run_in_which_every_model_fails_raises_with_the_workers_own_error(tmp_path: Path) -> None:
    models = {"broken": {"factory": "tests.integration.user_models:raises_in_forward"}}
    with pytest.raises(TrainingFailed, match="RuntimeError: no forward today"):
        train(make_job(tmp_path, models=models))


def test_more_workers_than_the_cluster_holds_are_refused_with_the_nearest_that_fits(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"5 workers x 1 CPU need 5 CPUs.*num_workers = 4"):
        train(make_job(tmp_path, workers=5))
    assert not list((tmp_path / "runs").rglob("*.jsonl")), "nothing was started"


def test_no_actor_or_placement_group_is_left_after_a_run(tmp_path: Path) -> None:
    train(make_job(tmp_path))
    settled = threading.Event()
    for _ in range(50):
        if ray.available_resources().get("CPU") == 4.0 and not worker_pids():
            settled.set()
            break
        threading.Event().wait(0.2)
    assert settled.is_set(), "all CPUs are free and no train worker lives"


def test_the_linear_example_ends_at_the_least_squares_solution(tmp_path: Path) -> None:
    job = load_job("examples/linear/job.toml", [f"storage='{tmp_path}/runs'"])
    board = train(job)
    arrays = make_request(job, training_trials(job)).dataset.arrays
    design = np.c_[arrays.x_train.astype(np.float64), np.ones(len(arrays.x_train))]
    expected, *_ = np.linalg.lstsq(design, arrays.y_train.astype(np.float64), rcond=None)
    tensors = safetensors.numpy.load(ModelBundle.load(board.bundle).weights)
    weights = np.r_[tensors["1.weight"].ravel(), tensors["1.bias"]]
    error = float(np.linalg.norm(weights - expected) / np.linalg.norm(expected))
    print(f"\nrelative error to numpy.linalg.lstsq: {error:.1e}")
    assert error <= 1e-2
