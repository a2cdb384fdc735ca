"""The same job takes the same steps at any number of workers, and in a warm group as in a fresh one."""

from pathlib import Path

import numpy as np
import pytest
import ray
import safetensors.numpy

from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import open_storage, read_folder
from bigray.training.commands import TrainTo
from bigray.training.groups import open_groups
from bigray.training.request import RunRequest, make_request
from bigray.training.runner import training_trials
from tests.integration.jobs import make_job

pytestmark = pytest.mark.usefixtures("four_cpu_ray")
EPOCHS = 3


def weights_after_training(request: RunRequest, trials: list[TrialSpec], paths: RunPaths) -> dict[str, np.ndarray]:
    """Train the trials one after another on one warm group; flat weights of each trial's last checkpoint."""
    with open_groups(1, request.job.scaling, request.dataset, paths, attempt=1) as groups:
        for trial in trials:
            ray.get(groups.switchboard.execute.remote(0, TrainTo(trial, EPOCHS)))
    return {trial.trial_id: checkpoint_weights(paths, trial) for trial in trials}


def checkpoint_weights(paths: RunPaths, trial: TrialSpec) -> np.ndarray:
    step = paths.checkpoint_steps(trial.trial_id)[0]
    files = read_folder(paths.storage, paths.checkpoint(trial.trial_id, step)).files
    tensors = safetensors.numpy.load(files["model.safetensors"])
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_one_two_and_four_workers_end_with_the_same_weights(tmp_path: Path) -> None:
    by_workers = {}
    for workers in (1, 2, 4):
        job = make_job(tmp_path, workers=workers, epochs=EPOCHS)
        request = make_request(job, training_trials(job))
        (trial,) = request.trials
        variants = [
            trial.model_copy(update={"trial_id": name, "training": trial.training.model_copy(update=settings)})
            for name, settings in {
                "sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
                "adamw": {"optimizer": "adamw", "lr": 0.01},
            }.items()
        ]
        paths = RunPaths(open_storage(tmp_path / f"workers-{workers}"), "exactness")
        by_workers[workers] = weights_after_training(request, variants, paths)
    differences = {
        (name, workers): relative_difference(by_workers[workers][name], by_workers[1][name])
        for name in ("sgd", "adamw")
        for workers in (2, 4)
    }
    print(f"\nrelative difference of the weights to one worker, after {EPOCHS} epochs: {differences}")
    assert max(differences["sgd", workers] for workers in (2, 4)) <= 1e-5
    assert max(differences["adamw", workers] for workers in (2, 4)) <= 1e-3


def test_a_job_leaves_nothing_behind_in_a_warm_group(tmp_path: Path) -> None:
    job = make_job(
        tmp_path,
        epochs=EPOCHS,
        models={"mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [16], "dropout": 0.3}}},
    )
    request = make_request(job, training_trials(job))
    (trial,) = request.trials
    first = trial.model_copy(update={"trial_id": "first", "training": trial.training.model_copy(update={"lr": 0.2})})
    alone = weights_after_training(request, [trial], RunPaths(open_storage(tmp_path / "alone"), "alone"))
    after = weights_after_training(request, [first, trial], RunPaths(open_storage(tmp_path / "after"), "after"))
    assert np.array_equal(alone[trial.trial_id], after[trial.trial_id])
