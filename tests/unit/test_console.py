from __future__ import annotations

import pytest

from bigray.console import PlainView, print_verification
from bigray.results import (
    Kill,
    MetricDifference,
    ModelVerification,
    Resize,
    SampleCounts,
    Verification,
    WeightDifference,
)
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


def test_a_verification_shows_the_faults_in_their_order_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    kills = (
        Kill(1, 70, "10.0.0.1", step=900, recovery_s=1.25, went_on_at_step=890, went_on_from="memory"),
        Kill(0, 71, "10.0.0.1", step=2100),
    )
    none = SampleCounts(0, 0)
    model = ModelVerification(
        model_name="mlp",
        kills=kills,
        kills_planned=2,
        resize=Resize(step=1500, workers_before=2, workers_after=1),
        weights=WeightDifference(False, 3e-4, "0.bias"),
        metrics=MetricDifference(20, 0.0, ()),
        samples=none,
        reference_samples=none,
        verdict="DIFFERENT",
        reasons=("weights are not bit-equal",),
    )
    print_verification(Verification("digits", "runs/verify-1a2b3c-1", exact=True, models=(model,), wall_s=9.0))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    assert [line for line in lines if line.startswith(("SIGKILL", "resize"))] == [
        "SIGKILL 1 ~900 890 memory 1.2 s",
        "resize 2 -> 1 workers - 1,500 1,500 storage -",
        "SIGKILL 0 ~2,100 - - -",
    ]
    assert "weights relative difference 3.0e-04, most in '0.bias'" in lines
    assert "metrics 20 epochs, all equal" in lines
    assert "verdict mlp: DIFFERENT" in lines
