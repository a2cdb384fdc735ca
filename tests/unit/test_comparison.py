from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bigray.comparison import Outcome, compare_metrics, compare_weights, judge
from bigray.results import Kill, ModelVerification, Resize, SampleCounts, Verification
from bigray.specs import TrainingSpec

WEIGHTS = {"0.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "0.bias": torch.tensor([0.5, -0.5, 2.0])}
EPOCHS = ((1, {"val_loss": 0.5, "val_accuracy": 0.8}), (2, {"val_loss": 0.25, "val_accuracy": 0.9}))
KILL = Kill(rank=1, pid=77, node="10.0.0.1", step=12, recovery_s=1.5, went_on_at_step=12, went_on_from="memory")
RESIZE = Resize(step=20, workers_before=2, workers_after=1)


def _training(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"task": "classification", **settings})


def _outcome(**values: Any) -> Outcome:
    return Outcome(**{"status": "finished", "weights": WEIGHTS, "epochs": EPOCHS, "steps": 40, **values})


def _scaled(factor: float) -> dict[str, torch.Tensor]:
    return {name: (tensor.double() * factor).float() for name, tensor in WEIGHTS.items()}


def _judge(training: TrainingSpec, found: Outcome, **faults: Any) -> ModelVerification:
    return judge(training, _outcome(), found, model_name="mlp", **{"resize": RESIZE, **faults})


def test_equal_weights_are_bit_equal() -> None:
    copies = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    difference = compare_weights(WEIGHTS, copies)

    assert difference.is_bit_equal
    assert difference.relative == 0
    assert difference.worst is None


def test_a_zero_of_the_other_sign_is_no_longer_bit_equal() -> None:
    difference = compare_weights({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([-0.0, 1.0])})

    assert not difference.is_bit_equal
    assert difference.relative == 0


def test_a_nan_in_both_at_the_same_place_is_bit_equal_and_in_one_is_not_comparable() -> None:
    broken = {"w": torch.tensor([math.nan, 1.0])}

    assert compare_weights(broken, {"w": broken["w"].clone()}).is_bit_equal
    assert compare_weights(broken, {"w": torch.ones(2)}).relative is None


def test_the_relative_difference_is_that_of_all_weights_and_names_the_worst_tensor() -> None:
    expected = {"big": torch.full((4,), 10.0), "small": torch.tensor([1.0])}
    difference = compare_weights(expected, {"big": torch.full((4,), 10.0), "small": torch.tensor([1.5])})

    assert difference.relative == pytest.approx(0.5 / math.sqrt(401))
    assert difference.worst == "small"


@pytest.mark.parametrize(
    "other",
    [{"w": torch.ones(3)}, {"w": torch.ones(2, dtype=torch.float64)}, {"v": torch.ones(2)}, {}],
    ids=["shape", "dtype", "name", "none"],
)
def test_weights_of_another_form_are_not_comparable(other: dict[str, torch.Tensor]) -> None:
    difference = compare_weights({"w": torch.ones(2)}, other)

    assert not difference.is_bit_equal
    assert difference.relative is None


def test_no_tolerance_applies_to_a_counter() -> None:
    expected = {"w": torch.full((1000,), 1e3), "num_batches": torch.tensor(100)}

    assert compare_weights(expected, {**expected, "num_batches": torch.tensor(101)}).relative is None


def test_an_epoch_that_was_reported_twice_has_to_be_right_twice() -> None:
    again = (1, {"val_loss": 0.75, "val_accuracy": 0.8})

    assert compare_metrics(EPOCHS, (*EPOCHS, EPOCHS[0])).largest == 0
    assert compare_metrics(EPOCHS, (EPOCHS[0], again, EPOCHS[1])).largest == 0.25


def test_an_epoch_that_one_run_does_not_report_is_told_and_the_others_are_compared() -> None:
    difference = compare_metrics(EPOCHS, EPOCHS[1:])

    assert (difference.num_epochs, difference.largest, difference.missing) == (1, 0, (1,))


def test_other_metrics_are_not_comparable() -> None:
    assert compare_metrics(EPOCHS, ((1, {"val_mse": 1.0}),)).largest is None
    assert compare_metrics(EPOCHS, ()).largest is None


def test_bit_equal_weights_and_equal_metrics_are_identical_whatever_the_job_asks_for() -> None:
    for training in (_training(exact=True), _training(optimizer="sgd")):
        model = _judge(training, _outcome())
        assert model.verdict == "identical"
        assert model.is_same


@pytest.mark.parametrize(
    ("optimizer", "factor", "verdict"),
    [
        ("sgd", 1 + 5e-6, "equal within 1e-05"),
        ("sgd", 1 + 5e-5, "DIFFERENT"),
        ("adamw", 1 + 5e-4, "equal within 0.001"),
        ("adamw", 1 + 5e-3, "DIFFERENT"),
    ],
)
def test_without_exact_the_optimizer_has_a_tolerance(optimizer: str, factor: float, verdict: str) -> None:
    model = _judge(_training(optimizer=optimizer), _outcome(weights=_scaled(factor)))

    assert model.verdict == verdict
    assert model.is_same == (verdict != "DIFFERENT")


def test_an_exact_job_has_no_tolerance() -> None:
    model = _judge(_training(exact=True), _outcome(weights=_scaled(1 + 1e-6)))

    assert model.verdict == "DIFFERENT"
    assert "weights are not bit-equal" in model.reasons[0]


def test_an_exact_job_has_the_same_metrics_to_the_last_bit() -> None:
    epochs = (EPOCHS[0], (2, {"val_loss": math.nextafter(0.25, 1), "val_accuracy": 0.9}))
    model = _judge(_training(exact=True), _outcome(epochs=epochs))

    assert model.reasons == ("validation metrics differ by up to 5.6e-17",)


@pytest.mark.parametrize("samples", [SampleCounts(1, 0), SampleCounts(0, 1)])
def test_a_sample_that_was_lost_or_repeated_makes_it_different(samples: SampleCounts) -> None:
    model = _judge(_training(), _outcome(samples=samples))

    assert model.reasons == (f"the disturbed run lost {samples.lost} samples and repeated {samples.repeated}",)


def test_a_run_that_failed_or_ended_otherwise_is_different() -> None:
    failed = _judge(_training(), Outcome("failed", error="its workers died 4 times"))
    stopped = _judge(_training(), _outcome(status="stopped early"))

    assert failed.reasons == ("the disturbed run failed: its workers died 4 times",)
    assert stopped.reasons == ("it is stopped early, undisturbed finished",)


def test_what_the_verdict_does_not_cover_is_noted() -> None:
    late = _judge(_training(), _outcome(), kills=[KILL], kills_planned=3, resize=None)
    same_size = _judge(_training(), _outcome(), kills=[KILL], kills_planned=1, resize=Resize(20, 1, 1))
    at_the_end = _judge(_training(), _outcome(), resize=Resize(40, 2, 1))
    whole = _judge(_training(), _outcome(), kills=[KILL], kills_planned=1)

    assert [note.partition(":")[0] for note in late.notes] == ["1 of 3 kills landed", "no resize"]
    assert [note.partition(":")[0] for note in same_size.notes] == ["restarted with 1 workers"]
    assert [note.partition(":")[0] for note in at_the_end.notes] == ["resized after the last step"]
    assert whole.notes == ()


def test_differences_are_told_in_one_line() -> None:
    models = (_judge(_training(), _outcome()), _judge(_training(), _outcome(status="diverged")))
    found = Verification("digits", "runs/verify-1a2b3c-1", exact=False, models=models, wall_s=1.0)

    assert not found.is_same
    assert found.describe_differences() == "digits: DIFFERENT after faults: mlp: it is diverged, undisturbed finished"
