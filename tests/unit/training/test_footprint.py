from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigray.training.footprint import checkpoint_bytes, free_bytes, measure
from bigray.training.request import RunRequest, make_request
from bigray.training.runner import training_trials
from tests.integration.jobs import make_job

PARAMETERS = (4 * 16 + 16) + (16 * 3 + 3)
TENSORS = 4


def _request(folder: Path, **training: Any) -> RunRequest:
    job = make_job(folder, **training)
    return make_request(job, training_trials(job))


@pytest.mark.parametrize(
    ("training", "numbers", "steps"),
    [
        ({}, 4, TENSORS),
        ({"ema_decay": 0.9}, 5, TENSORS),
        ({"optimizer_params": {"amsgrad": True}}, 5, TENSORS),
        ({"optimizer": "sgd"}, 2, 0),
        ({"optimizer": "sgd", "momentum": 0.9}, 3, 0),
        ({"optimizer": "rmsprop"}, 3, TENSORS),
    ],
)
def test_a_checkpoint_has_the_weights_twice_and_what_the_optimizer_keeps(
    tmp_path: Path, training: dict[str, Any], numbers: int, steps: int
) -> None:
    assert checkpoint_bytes(_request(tmp_path, **training)) == 4 * (numbers * PARAMETERS + steps)


def test_what_only_running_would_tell_is_not_known(tmp_path: Path) -> None:
    loop = _request(tmp_path, loop="tests.integration.user_models:slow_mlp", metric="val_loss", metric_mode="min")

    assert checkpoint_bytes(loop) is None


def test_a_local_disk_has_an_end_and_an_object_store_none(tmp_path: Path) -> None:
    assert (free_bytes(str(tmp_path / "not" / "there")) or 0) > 0
    assert free_bytes("s3://bucket/runs?region=eu-west-1") is None
    assert measure(_request(tmp_path), to_submit=False).package_bytes is None
