"""Small jobs on real files for the integration tests."""

from pathlib import Path
from typing import Any

import numpy as np

from bigray.specs import JobSpec


def write_blobs(path: Path, rows: int = 250, classes: int = 3, features: int = 4) -> str:
    """A learnable NPZ of Gaussian blobs: columns f0.. and `label`."""
    generator = np.random.default_rng(7)
    labels = np.arange(rows) % classes
    points = generator.normal(size=(rows, features)) + 3.0 * generator.normal(size=(classes, features))[labels]
    columns = {f"f{number}": points[:, number] for number in range(features)}
    np.savez(path, label=labels, **columns)
    return str(path)


def make_job(folder: Path, *, models: dict[str, Any] | None = None, workers: int = 2, **training: Any) -> JobSpec:
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
            "scaling": {"num_workers": workers},
        }
    )
