from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bigray.data.dataset import TrainingArrays
from bigray.paths import RunPaths
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.storage import Storage

MakeTrial = Callable[..., TrialSpec]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def paths(storage: Storage) -> RunPaths:
    return RunPaths(storage, "digits-1a2b3c")


@pytest.fixture
def make_trial() -> MakeTrial:
    """A trial of an mlp; keywords are training settings, `factory`, `params`, `seed`."""

    def make(
        factory: str = "bigray.models:mlp", params: dict[str, Any] | None = None, seed: int = 0, **training: Any
    ) -> TrialSpec:
        settings = {"task": "classification", "epochs": 4, "global_batch_size": 16, "lr": 0.05, **training}
        return TrialSpec(
            trial_id="0-net",
            model_name="net",
            model=ModelSpec(factory=factory, params={"hidden": [8]} if params is None else params),
            training=TrainingSpec.model_validate(settings),
            seed=seed,
        )

    return make


@pytest.fixture
def blobs() -> TrainingArrays:
    """Three overlapping clouds of points in four dimensions: 70 rows to train on, so batches of 16 leave a last 6."""
    generator = np.random.default_rng(0)
    centres = generator.normal(scale=1.5, size=(3, 4))

    def draw(rows: int) -> tuple[Any, Any]:
        y = np.arange(rows, dtype=np.int64) % 3
        return (centres[y] + generator.normal(size=(rows, 4))).astype(np.float32), y

    (x_train, y_train), (x_val, y_val) = draw(70), draw(30)
    return TrainingArrays(x_train, y_train, x_val, y_val)


@pytest.fixture
def line() -> TrainingArrays:
    """Regression: a noisy linear function of three features."""
    generator = np.random.default_rng(1)

    def draw(rows: int) -> tuple[Any, Any]:
        x = generator.normal(size=(rows, 3)).astype(np.float32)
        noise = generator.normal(scale=0.1, size=rows)
        return x, (x @ [1.0, -2.0, 0.5] + 3.0 + noise).astype(np.float32)

    (x_train, y_train), (x_val, y_val) = draw(70), draw(30)
    return TrainingArrays(x_train, y_train, x_val, y_val)
