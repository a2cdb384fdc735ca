from __future__ import annotations

import pytest

from bigray.console import PlainView
from bigray.specs import ModelSpec, TrainingSpec, TrialSpec
from bigray.training.commands import Event


def test_an_epoch_line_has_a_dash_for_what_a_loop_does_not_report(capsys: pytest.CaptureFixture[str]) -> None:
    own = TrainingSpec(task="classification", loop="my.mod:train", metric="val_f1", metric_mode="max", epochs=5)
    model = ModelSpec(factory="bigray.models:mlp")
    trial = TrialSpec(trial_id="0-mlp", model_name="mlp", model=model, training=own, seed=0)
    view = PlainView(quiet=False)
    view(Event("starting", "", {"run": "r", "folder": "runs/r", "trials": (trial,)}))
    capsys.readouterr()
    values = {"epoch": 2, "train_loss": None, "metrics": {"val_f1": 0.5}, "best_metrics": {"val_f1": 0.5}}
    view(Event("epoch", "0-mlp", {**values, "samples_per_s": None, "epoch_s": 2.0}))

    assert capsys.readouterr().err == "0-mlp: epoch 2/5, loss -, val_f1 0.5000, - samples/s, 6 s left\n"
