"""Pruned weights trained on against a real Ray: by the way of `bigray train`, two workers, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.numpy

from bigray import cli
from bigray.bundle import ModelBundle
from bigray.loading import load_job
from bigray.training.runner import train

pytestmark = [pytest.mark.usefixtures("four_cpu_ray"), pytest.mark.timeout(300)]

JOB = """
name    = "digits"
storage = "{storage}"

[data]
source    = "examples.digits.data:load"
target    = "label"
split     = {{ validation = 0.15, holdout = 0.3 }}
normalize = "standard"

[models.mlp]
factory = "bigray.models:mlp"
params  = {{ hidden = [64] }}

[training]
task   = "classification"
epochs = 6
global_batch_size = 64
lr     = 3e-3
weight_decay = 0.01

[scaling]
num_workers = 2
"""


def test_zeros_stay_through_training_and_the_holdout_metric_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB.format(storage=tmp_path / "runs"))
    board = train(load_job(file))
    capsys.readouterr()

    command = ["compress", board.bundle.uri, "--prune", "0.8", "--fine-tune", str(file), "--epochs", "2"]
    cli.app([*command, "--max-drop", "0.2", "--json"], standalone_mode=False)
    made = json.loads(capsys.readouterr().out)

    old, new = ModelBundle.load(board.bundle), ModelBundle.load(made["location"])
    weights = safetensors.numpy.load(new.weights)
    zeros = sum(int((weights[name] == 0).sum()) for name in ("1.weight", "3.weight"))
    assert zeros / (64 * 64 + 64 * 10) == pytest.approx(0.8, abs=1e-3)
    assert made["zeros"] == [0.0, made["pruned"]["zeros"]]
    assert made["score"]["after"] >= made["pruned"]["metric"]
    assert made["score"]["rows"] > 500
    assert new.onnx is not None
    assert new.manifest.origin.run != old.manifest.origin.run
    assert new.manifest.origin.config["epochs"] == 2
    assert new.manifest.derived_from is not None
    assert new.manifest.derived_from.version == old.version
    assert not list(Path(made["location"]).parent.glob("*-scratch"))
