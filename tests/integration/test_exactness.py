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
            ray.get(groups.switchboard.work.remote(trial.trial_id, TrainTo(trial, EPOCHS)))
    return {trial.trial_id: checkpoint_weights(paths, trial) for trial in trials}


def checkpoint_weights(paths: RunPaths, trial: TrialSpec) -> np.ndarray:
    step = paths.checkpoint_steps(trial.trial_id)[0]
    files = read_folder(paths.storage, paths.checkpoint(trial.trial_id, step)).files
    tensors = safetensors.numpy.load(files["model.safetensors"])
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def variants(trial: TrialSpec, settings: dict[str, dict[str, object]]) -> list[TrialSpec]:
    """The same trial with other training settings, each under its own name."""
    return [
        trial.model_copy(update={"trial_id": name, "training": trial.training.model_copy(update=changes)})
        for name, changes in settings.items()
    ]


def train_at(workers: int, folder: Path, settings: dict[str, dict[str, object]]) -> dict[str, np.ndarray]:
    job = make_job(folder, workers=workers, epochs=EPOCHS)
    request = make_request(job, training_trials(job))
    paths = RunPaths(open_storage(folder / f"workers-{workers}"), "exactness")
    return weights_after_training(request, variants(request.trials[0], settings), paths)


def test_any_number_of_workers_takes_the_same_steps_and_a_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    """One test for both, since what takes time is starting the groups of one, two and four workers."""
    sgd, adamw = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}, {"optimizer": "adamw", "lr": 0.01}
    settings = {"sgd": sgd, "adamw": adamw}
    one = train_at(1, tmp_path, settings)
    two = train_at(2, tmp_path, {**settings, "sgd after another trial": sgd})
    four = train_at(4, tmp_path, settings)
    differences = {
        (name, workers): relative_difference(found[name], one[name])
        for name in settings
        for workers, found in ((2, two), (4, four))
    }
    print(f"\nrelative difference of the weights to one worker's, after {EPOCHS} epochs: {differences}")
    assert max(differences["sgd", workers] for workers in (2, 4)) <= 1e-5
    assert max(differences["adamw", workers] for workers in (2, 4)) <= 1e-3
    assert np.array_equal(two["sgd"], two["sgd after another trial"])
