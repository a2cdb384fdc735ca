from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bigray.data.dataset import TrainingArrays
from bigray.specs import METRICS, TrainingSpec
from bigray.training.loop import Worker
from bigray.training.stacked_validation import StackedValidation
from bigray.training.tasks import load_task
from bigray.training.validation import Validation

ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))
LANES, ROWS = 7, 300
GENERATOR = np.random.default_rng(0)
TARGETS: dict[str, np.ndarray[Any, Any]] = {
    "classification": GENERATOR.integers(4, size=ROWS),
    "regression": GENERATOR.normal(size=ROWS).astype(np.float32),
    "binary": (GENERATOR.random(ROWS) < 0.2).astype(np.int64),
    "multilabel": (GENERATOR.random((ROWS, 4)) < 0.4).astype(np.int8),
}


class _Given:
    """A network that answers what it is told for the row that its input names."""

    def __init__(self, outputs: torch.Tensor) -> None:
        self._outputs = outputs

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        return self._outputs[:, x[:, 0].long()]


@pytest.mark.parametrize("task", TARGETS)
def test_the_metrics_of_each_lane_are_those_of_its_outputs_alone(task: str) -> None:
    """Lanes that say the same of every row, and one that is sure of all, among them."""
    y = TARGETS[task]
    spec, num_outputs = TrainingSpec(task=task), 1 if task in ("regression", "binary") else 4
    outputs = torch.from_numpy(GENERATOR.normal(scale=3, size=(LANES, ROWS, num_outputs)).astype(np.float32))
    outputs[3], outputs[4], outputs[5], outputs[6] = 0, 40, -40, outputs[6] * 50
    rows = np.arange(ROWS, dtype=np.float32)[:, None]
    made, data = load_task(spec, num_outputs, y), TrainingArrays(rows, y, rows, y)

    stacked = StackedValidation(spec, made, num_outputs, data, ALONE.device)
    found = stacked.measure(_Given(outputs), LANES)  # type: ignore[arg-type]
    alone = Validation(made, num_outputs, data, ALONE.device)

    for lane, metrics in zip(outputs, found, strict=True):
        expected = alone.measure(lambda places, _, lane=lane: lane[places], ALONE, same_passes=False)
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert set(metrics) == set(METRICS[task])


def test_a_single_validation_row_of_a_regression_is_no_error() -> None:
    x, y = np.zeros((1, 1), np.float32), np.ones(1, np.float32)
    spec, data = TrainingSpec(task="regression"), TrainingArrays(x, y, x, y)
    task, outputs = load_task(spec, 1, y), torch.full((2, 1, 1), 3.0)

    expected = {"val_loss": 4.0, "val_mse": 4.0, "val_mae": 2.0, "val_r2": 0.0}
    alone = Validation(task, 1, data, ALONE.device)
    assert alone.measure(lambda places, _: outputs[0][places], ALONE, same_passes=False) == expected
    stacked = StackedValidation(spec, task, 1, data, ALONE.device)
    assert stacked.measure(_Given(outputs), 2) == [expected] * 2  # type: ignore[arg-type]
