"""Small jobs on real files for the integration tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from bigray.paths import RunPaths
from bigray.specs import JobSpec
from bigray.storage import read_folder
from bigray.training.checkpoint import SnapshotBuffers

if TYPE_CHECKING:
    import torch


def write_blobs(path: Path, rows: int = 250, classes: int = 3, features: int = 4) -> str:
    """A learnable NPZ of Gaussian blobs: columns f0.. and `label`."""
    generator = np.random.default_rng(7)
    labels = np.arange(rows) % classes
    points = generator.normal(size=(rows, features)) + 3.0 * generator.normal(size=(classes, features))[labels]
    columns = {f"f{number}": points[:, number] for number in range(features)}
    np.savez(path, label=labels, **columns)
    return str(path)


def make_job(
    folder: Path,
    *,
    models: dict[str, Any] | None = None,
    workers: int | tuple[int, int] = 2,
    max_failures: int = 3,
    **training: Any,
) -> JobSpec:
    """A classification job on blobs, stored under `folder`."""
    source = write_blobs(folder / "blobs.npz")
    settings = {"task": "classification", "epochs": 4, "global_batch_size": 32, "lr": 0.05, **training}
    return JobSpec.model_validate(
        {
            "name": "blobs",
            "storage": str(folder / "runs"),
            "data": {"source": source, "target": "label", "normalize": "standard"},
            "models": models or {"mlp": {"factory": "bigray.models:mlp", "params": {"hidden": [16]}}},
            "training": settings,
            "scaling": {"num_workers": workers, "max_failures": max_failures},
        }
    )


def weights_of_one_process(job: JobSpec) -> dict[str, torch.Tensor]:
    """The job's first model after all its epochs, trained here, without Ray and without disturbance."""
    import torch

    from bigray.training.context import make_training
    from bigray.training.loop import Worker
    from bigray.training.request import make_request
    from bigray.training.runner import training_trials
    from tests.loop_hooks import RecordingHooks

    request = make_request(job, training_trials(job)[:1])
    outputs, worker = request.dataset.outputs.num_outputs, Worker(0, 1, torch.device("cpu"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker with one CPU: sums depend on it
    try:
        training = make_training(request.trials[0], request.dataset.arrays, outputs, worker, RecordingHooks())
        training.train_to(job.training.epochs)
    finally:
        torch.set_num_threads(num_threads)
    return dict(training.snapshot(SnapshotBuffers()).tensors["model"])


def last_weights(paths: RunPaths, trial_id: str) -> dict[str, np.ndarray]:
    """Weights of a trial's newest checkpoint on storage."""
    folder = paths.checkpoint(trial_id, paths.checkpoint_steps(trial_id)[0])
    return safetensors.numpy.load(read_folder(paths.storage, folder).files["model.safetensors"])
