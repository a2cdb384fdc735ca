"""`train` against a real Ray: results on disk, resuming, and workers that die."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import safetensors.numpy

from bigray.bundle import ModelBundle
from bigray.errors import CapacityError
from bigray.inference import Predictor
from bigray.journal import read_journal
from bigray.loading import load_job
from bigray.paths import RunPaths
from bigray.storage import open_storage
from bigray.training import groups
from bigray.training.commands import Event
from bigray.training.request import make_request
from bigray.training.runner import train, training_trials
from tests.integration.jobs import last_weights, make_job
from tests.processes import worker_pids
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("four_cpu_ray")


def test_training_writes_a_verified_bundle_is_not_repeated_and_leaves_no_process(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    board = train(job)
    bundle = ModelBundle.load(board.bundle)
    dataset = make_request(job, training_trials(job)).dataset
    labels = Predictor(bundle).run_table(dataset.holdout).labels
    assert bundle.onnx is not None
    assert bundle.manifest.origin.metrics == board.winner.metrics
    assert bundle.manifest.origin.step == board.winner.best_step
    assert np.mean(np.array(labels) == np.array(dataset.holdout_targets())) > 0.9
    suffixes = {path.suffix for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert suffixes <= {".arrow", ".json", ".jsonl", ".onnx", ".safetensors"}, "nothing is pickled"

    events: list[Event] = []
    again = train(job, listener=events.append)
    assert [event.kind for event in events] == ["complete", "ranked"]
    assert again.trials == board.trials

    wait_until(lambda: ray.available_resources().get("CPU") == 4.0 and not worker_pids(), timeout_s=20.0)


def test_a_killed_worker_costs_no_step_and_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    slow = {"factory": "tests.integration.user_models:slow_mlp"}
    killed: list[int] = []

    def kill_a_worker_of_the_second_model(event: Event) -> None:
        if event.kind == "epoch" and event.trial_id == "killed" and event.values["epoch"] == 2 and not killed:
            killed.append(worker_pids()[-1])
            os.kill(killed[0], signal.SIGKILL)

    job = make_job(tmp_path, models={"undisturbed": slow, "killed": slow}, epochs=6, checkpoint_every_s=0.1)
    one_group = job.model_copy(update={"scaling": job.scaling.model_copy(update={"cpus_per_worker": 2.0})})
    board = train(one_group, listener=kill_a_worker_of_the_second_model)
    paths = RunPaths(open_storage(board.run_uri), board.run_id)
    events = [event for event in read_journal(paths) if event["trial"] == "killed"]
    assert len(killed) == 1
    assert any(event["kind"] == "resumed" for event in events), "the group went on from a checkpoint"
    assert {event["epoch"] for event in events if event["kind"] == "epoch"} == {1, 2, 3, 4, 5, 6}
    undisturbed, disturbed = (last_weights(paths, name) for name in ("undisturbed", "killed"))
    assert undisturbed.keys() == disturbed.keys()
    assert all(np.array_equal(undisturbed[name], disturbed[name]) for name in undisturbed)


def test_no_thread_of_a_run_is_left_that_could_use_ray_after_the_driver_has_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray ends a process with code 1 on the spot where one does: a command that had succeeded would say it failed."""

    def slow_to_end(_: object, is_over: threading.Event) -> None:
        is_over.wait()
        time.sleep(2.0)

    monkeypatch.setattr(groups, "_watch_drains", slow_to_end)
    before = set(threading.enumerate())
    train(make_job(tmp_path))

    assert [thread.name for thread in threading.enumerate() if thread not in before] == []


def test_more_workers_than_the_cluster_holds_are_refused_with_the_nearest_that_fits(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"5 workers x 1 CPU need 5 CPUs.*num_workers = 4"):
        train(make_job(tmp_path, workers=5))
    assert not list((tmp_path / "runs").rglob("*.jsonl")), "nothing was started"


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
