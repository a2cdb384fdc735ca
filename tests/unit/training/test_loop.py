from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from bigray.data.batches import epoch_order, global_batch, worker_share
from bigray.data.dataset import TrainingArrays
from bigray.errors import TrainingFailed
from bigray.models import build_model
from bigray.specs import METRICS, TrialSpec
from bigray.training.checkpoint import Checkpoint, SnapshotBuffers
from bigray.training.loop import TrialTraining, Worker
from tests.loop_hooks import RecordingHooks, to_checkpoint

MakeTrial = Callable[..., TrialSpec]
UserModule = Callable[[str], str]
ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))


def _begin(trial: TrialSpec, data: TrainingArrays, hooks: RecordingHooks | None = None) -> TrialTraining:
    num_outputs = 1 if trial.training.target_kind == "regression" else 3
    return TrialTraining(trial, data, num_outputs, ALONE, hooks or RecordingHooks())


def _train(trial: TrialSpec, data: TrainingArrays) -> tuple[TrialTraining, list[dict[str, Any]]]:
    hooks = RecordingHooks()
    training = _begin(trial, data, hooks)
    training.train_to(trial.training.epochs)
    return training, hooks.reports


def _checkpoint(training: TrialTraining) -> Checkpoint:
    return to_checkpoint(training.snapshot(SnapshotBuffers()))


def _resume(trial: TrialSpec, data: TrainingArrays, checkpoint: Checkpoint) -> tuple[TrialTraining, RecordingHooks]:
    """A training that knows nothing, brought to a checkpoint and trained to the end."""
    hooks = RecordingHooks()
    training = _begin(trial, data, hooks)
    training.restore(checkpoint)
    training.train_to(trial.training.epochs)
    return training, hooks


def _weights(training: TrialTraining) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in training.module.state_dict().items()}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_training_makes_the_loss_fall_and_reports_every_metric_of_the_task(
    make_trial: MakeTrial, blobs: TrainingArrays, line: TrainingArrays, task: str
) -> None:
    trial = make_trial(task=task, epochs=8, lr=0.01)
    training, reports = _train(trial, blobs if task == "classification" else line)

    assert reports[-1]["train_loss"] < 0.6 * reports[0]["train_loss"]
    assert set(reports[-1]["metrics"]) == set(METRICS[task])
    assert [report["epoch"] for report in reports] == list(range(1, 9))
    assert reports[-1]["step"] == 8 * 5
    assert training.progress.ended == "finished"


def test_the_reported_metrics_are_those_of_the_validation_rows(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    training, reports = _train(make_trial(), blobs)
    with torch.inference_mode():
        outputs = training.module(torch.from_numpy(blobs.x_val))
        targets = torch.from_numpy(blobs.y_val)
        loss = functional.cross_entropy(outputs, targets).item()

    assert reports[-1]["metrics"]["val_loss"] == pytest.approx(loss, rel=1e-5)
    expected = (outputs.argmax(dim=1) == targets).float().mean().item()
    assert reports[-1]["metrics"]["val_accuracy"] == pytest.approx(expected)


def test_the_reported_values_of_regression_are_those_of_the_validation_rows(
    make_trial: MakeTrial, line: TrainingArrays
) -> None:
    training, reports = _train(make_trial(task="regression", lr=0.01), line)
    with torch.inference_mode():
        error = training.module(torch.from_numpy(line.x_val))[:, 0].numpy().astype(np.float64) - line.y_val

    metrics = reports[-1]["metrics"]
    assert metrics["val_mse"] == pytest.approx(np.mean(error**2), rel=1e-4)
    assert metrics["val_mae"] == pytest.approx(np.mean(abs(error)), rel=1e-4)
    assert metrics["val_r2"] == pytest.approx(1 - np.mean(error**2) / line.y_val.var(dtype=np.float64), rel=1e-4)


def test_training_equals_a_loop_written_by_hand_to_the_partial_last_batch(
    make_trial: MakeTrial, line: TrainingArrays
) -> None:
    """Linear regression by SGD with momentum and weight decay, in numpy and float64."""
    trial = make_trial(
        "bigray.models:linear", {}, task="regression", optimizer="sgd", momentum=0.9, weight_decay=0.01, epochs=3
    )
    training, _ = _train(trial, line)

    x, y = np.column_stack([line.x_train, np.ones(70)]).astype(np.float64), line.y_train.astype(np.float64)
    weights, velocity = np.zeros(4), np.zeros(4)
    for epoch in range(3):
        order = epoch_order(trial.seed, epoch, 70)
        for start in range(0, 70, 16):
            rows = order[start : start + 16]
            gradient = 2 * x[rows].T @ (x[rows] @ weights - y[rows]) / len(rows) + 0.01 * weights
            velocity = 0.9 * velocity + gradient
            weights = weights - 0.05 * velocity

    trained = np.concatenate([tensor.detach().numpy().ravel() for tensor in training.module.parameters()])
    np.testing.assert_allclose(trained, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_gradients_of_the_workers_shares_average_to_that_of_the_whole_batch(
    blobs: TrainingArrays, world_size: int
) -> None:
    """By hand what DDP does: each worker scales its summed loss by world size / batch, then all are averaged."""
    torch.manual_seed(0)
    module = build_model("bigray.models:mlp", {"hidden": [8]}, (4,), 3).double()
    x, y = torch.from_numpy(blobs.x_train).double(), torch.from_numpy(blobs.y_train)
    order = epoch_order(0, 0, 70)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.ravel() for part in torch.autograd.grad(loss, tuple(module.parameters()))])

    for batch, size in ((0, 16), (23, 3)):  # the second is a last batch smaller than four workers
        rows = global_batch(order, batch, size)
        shares = [worker_share(rows, rank, world_size) for rank in range(world_size)]
        losses = [functional.cross_entropy(module(x[share]), y[share], reduction="sum") for share in shares]
        averaged = sum(gradient(loss * (world_size / len(rows))) for loss in losses) / world_size
        whole = gradient(functional.cross_entropy(module(x[rows]), y[rows]))
        torch.testing.assert_close(averaged, whole, rtol=1e-10, atol=1e-12)


OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "sgd"},
    {"optimizer": "adam"},
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"optimizer": "rmsprop", "schedule": {"kind": "cosine", "warmup_steps": 3}, "ema_decay": 0.9, "clip_norm": 0.5},
    {"exact": True, "logical_shards": 3, "micro_batch_size": 2},
]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_going_on_from_a_checkpoint_ends_in_the_same_weights_to_the_last_bit(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any]
) -> None:
    trial = make_trial(params={"hidden": [8], "dropout": 0.3}, **settings)
    uninterrupted, reports = _train(trial, blobs)

    first = _begin(trial, blobs)
    first.train_to(2)
    second, hooks = _resume(trial, blobs, _checkpoint(first))

    assert _weights(second) == _weights(uninterrupted)
    assert second.progress == uninterrupted.progress
    assert [report["train_loss"] for report in hooks.reports] == [report["train_loss"] for report in reports[2:]]


def test_images_and_convolutions_go_on_to_the_last_bit_too(make_trial: MakeTrial) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 8, 8)).astype(np.float32), np.arange(40) % 3
    data = TrainingArrays(x, y, x[:10], y[:10])
    trial = make_trial("bigray.models:cnn", {"channels": [4, 4], "dropout": 0.2}, optimizer="adamw")
    uninterrupted, _ = _train(trial, data)

    first = _begin(trial, data)
    first.train_to(2)
    second, _ = _resume(trial, data, _checkpoint(first))

    assert _weights(second) == _weights(uninterrupted)


def test_checkpoints_are_made_where_they_are_wished_for_and_the_last_of_an_epoch_after_its_validation(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    hooks = RecordingHooks(save_at={2, 5, 9, 10})
    _begin(make_trial(epochs=2), blobs, hooks).train_to(2)
    cursors = [(saved.progress.epoch, saved.progress.batch) for saved in hooks.checkpoints]

    assert cursors == [(0, 2), (1, 0), (1, 4)]  # whoever called saves the end
    assert hooks.checkpoints[1].progress.metrics == hooks.reports[0]["metrics"]


@pytest.mark.parametrize("settings", [{}, {"exact": True}, {"ema_decay": 0.9}], ids=["plain", "exact", "ema"])
def test_going_on_from_any_step_loses_and_repeats_nothing(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any]
) -> None:
    """Weights, best weights, metrics and every epoch's loss to the last bit; the samples by count."""
    trial = make_trial(params={"hidden": [8], "dropout": 0.3}, epochs=2, **settings)
    hooks = RecordingHooks(save_at=range(100))
    uninterrupted = _begin(trial, blobs, hooks)
    uninterrupted.train_to(2)
    assert len(hooks.checkpoints) == 9

    for checkpoint in hooks.checkpoints:
        resumed, later = _resume(trial, blobs, checkpoint)
        where = f"from step {checkpoint.progress.step}"
        assert resumed.progress == uninterrupted.progress, where
        assert _weights(resumed) == _weights(uninterrupted), where
        assert _checkpoint(resumed).files == _checkpoint(uninterrupted).files, where
        last, expected = later.reports[-1], hooks.reports[-1]
        assert (last["train_loss"], last["metrics"]) == (expected["train_loss"], expected["metrics"]), where
        assert (last["samples_lost"], last["samples_repeated"]) == (0, 0), where


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_wish_to_stop_is_followed_at_once_with_a_checkpoint_of_that_step(
    make_trial: MakeTrial, blobs: TrainingArrays, stop_at: int
) -> None:
    """Also after an epoch's last step: whoever has to go does not wait for the validation."""
    trial = make_trial(epochs=2)
    uninterrupted, _ = _train(trial, blobs)
    hooks = RecordingHooks(save_at={stop_at}, stop_at={stop_at})
    training = _begin(trial, blobs, hooks)
    training.train_to(2)
    (checkpoint,) = hooks.checkpoints
    assert (checkpoint.progress.batch, checkpoint.progress.step, hooks.reports) == (stop_at, stop_at, [])
    assert training.progress == checkpoint.progress
    assert _checkpoint(training) == checkpoint

    resumed, _ = _resume(trial, blobs, checkpoint)

    assert resumed.progress == uninterrupted.progress
    assert _weights(resumed) == _weights(uninterrupted)


def test_a_training_that_stopped_goes_on_in_memory_too(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    """As after a lost peer: the process group is another one, and module and optimizer are still there."""
    trial = make_trial(params={"hidden": [8], "dropout": 0.3}, epochs=2)
    uninterrupted, reports = _train(trial, blobs)
    hooks = RecordingHooks(stop_at={3, 7})
    training = _begin(trial, blobs, hooks)
    for _ in range(3):
        training.train_to(2)
        training.rebuild(ALONE)

    assert _weights(training) == _weights(uninterrupted)
    assert training.progress == uninterrupted.progress
    assert [report["train_loss"] for report in hooks.reports] == [report["train_loss"] for report in reports]


def test_only_a_module_with_statistics_does_not_outlive_a_step_cut_short(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule
) -> None:
    name = user_module(BATCH_NORM)

    assert _begin(make_trial(f"{name}:make", {}), blobs).has_buffers
    assert not _begin(make_trial(), blobs).has_buffers


BATCH_NORM = """
    from torch import nn
    def make(shape, outputs):
        return nn.Sequential(nn.Sequential(nn.Linear(shape[0], 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)),
                             nn.Linear(8, outputs))
"""


def test_the_ledger_finds_a_sample_that_was_lost_and_one_that_came_twice(
    make_trial: MakeTrial, blobs: TrainingArrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in the third batch: a row is left out, and two others are there again."""
    from bigray.training import loop

    def faulty(order: Any, batch: int, size: int) -> Any:
        rows = global_batch(order, batch, size)
        return np.concatenate([rows[1:], order[:2]]) if batch == 2 else rows

    monkeypatch.setattr(loop, "global_batch", faulty)
    _, reports = _train(make_trial(epochs=2), blobs)

    assert [(report["samples_lost"], report["samples_repeated"]) for report in reports] == [(1, 2), (2, 4)]


def test_accumulation_over_micro_batches_takes_the_step_of_the_whole_batch(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    whole, whole_reports = _train(make_trial(optimizer="sgd"), blobs)
    parts, reports = _train(make_trial(optimizer="sgd", micro_batch_size=3), blobs)

    for weight, expected in zip(parts.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert reports[-1]["train_loss"] == pytest.approx(whole_reports[-1]["train_loss"], rel=1e-5)
    assert (reports[-1]["samples_lost"], reports[-1]["samples_repeated"]) == (0, 0)


def test_training_in_two_calls_equals_training_in_one(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    whole, _ = _train(make_trial(), blobs)
    parts = _begin(make_trial(), blobs)
    for epoch in (1, 3, 4):
        parts.train_to(epoch)

    assert _weights(parts) == _weights(whole)


def test_the_same_trial_gives_the_same_weights_and_another_seed_others(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    first = _weights(_train(make_trial(), blobs)[0])
    torch.manual_seed(99)

    assert _weights(_train(make_trial(), blobs)[0]) == first
    assert _weights(_train(make_trial(seed=1), blobs)[0]) != first


def test_a_trial_that_no_longer_improves_stops_early(make_trial: MakeTrial, line: TrainingArrays) -> None:
    """At this rate nothing improves: every validation after the first is as bad as the first."""
    trial = make_trial("bigray.models:linear", {}, task="regression", lr=1e-30, epochs=9, patience=2, optimizer="sgd")
    training, reports = _train(trial, line)

    assert training.progress.ended == "stopped early"
    assert (training.progress.epoch, training.progress.best_epoch) == (3, 1)
    assert [report["ended"] for report in reports] == [None, None, "stopped early"]


def test_a_diverging_trial_ends_as_such_without_metrics(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    training, reports = _train(make_trial(lr=1e30, optimizer="sgd"), blobs)

    assert training.progress.ended == "diverged"
    assert training.progress.epoch == 0
    assert (training.progress.metrics, training.progress.best_metrics) == ({}, {})
    assert not math.isfinite(reports[-1]["train_loss"])
    assert all(torch.isfinite(parameter).all() for parameter in training.module.parameters())


def test_an_ended_trial_is_not_trained_further(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    training, _ = _train(make_trial(lr=1e30, optimizer="sgd"), blobs)
    progress, weights = training.progress, _weights(training)
    training.train_to(4)

    assert training.progress == progress
    assert _weights(training) == weights


def test_validation_happens_when_it_is_due_and_after_the_last_epoch(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    _, reports = _train(make_trial(epochs=5, val_every=2), blobs)
    seen = [report["metrics"] for report in reports]

    assert seen[0] == {}
    assert seen[1] == seen[2] != seen[3]
    assert seen[4] != seen[3]


def test_the_weights_of_the_best_epoch_are_kept(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    """A rate so high that the last epoch is not the best one; then the kept weights give the best metrics again."""
    training, reports = _train(make_trial(epochs=8, lr=0.5, metric="val_loss"), blobs)
    losses = [report["metrics"]["val_loss"] for report in reports]
    best = int(np.argmin(losses))
    assert best < 7, "the trial must get worse for this test to tell something"

    checkpoint = _checkpoint(training)
    assert (checkpoint.progress.best_epoch, checkpoint.progress.best_step) == (best + 1, (best + 1) * 5)
    assert checkpoint.progress.best_metrics == reports[best]["metrics"]

    training.module.load_state_dict(checkpoint.tensors(checkpoint.best_file()) or {})
    assert training.evaluate() == reports[best]["metrics"]

    resumed, _ = _resume(training.trial, blobs, checkpoint)
    assert _checkpoint(resumed).files == checkpoint.files


def test_an_equal_metric_with_a_lower_loss_is_better(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    """Points far apart: the accuracy is 1 from the first epoch on, and only the loss still improves."""
    corners = np.eye(4, dtype=np.float32) * 20
    apart = TrainingArrays(corners[blobs.y_train], blobs.y_train, corners[blobs.y_val], blobs.y_val)
    training, reports = _train(make_trial("bigray.models:linear", {}, epochs=5, lr=0.01), apart)
    perfect = [report["epoch"] for report in reports if report["metrics"]["val_accuracy"] == 1.0]

    assert len(perfect) >= 2, "the metric must tie for this test to tell something"
    assert training.progress.best_epoch == 5


def test_a_model_of_the_wrong_width_is_told_with_both_shapes(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule
) -> None:
    name = user_module("from torch import nn\ndef make(shape, outputs): return nn.Linear(shape[0], outputs + 1)")

    with pytest.raises(TrainingFailed, match=r"model 'net': returned shape \(16, 4\) for 16 rows, expected \(16, 3\)"):
        _train(make_trial(f"{name}:make", {}), blobs)


def test_bf16_trains_with_weights_in_fp32(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    training, reports = _train(make_trial(precision="bf16", epochs=8), blobs)

    assert {tensor.dtype for tensor in training.module.state_dict().values()} == {torch.float32}
    assert reports[-1]["train_loss"] < reports[0]["train_loss"]


def test_frozen_weights_stay_as_they_are(make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule) -> None:
    name = user_module(
        """
        from torch import nn
        def make(shape, outputs):
            body, head = nn.Linear(shape[0], 8), nn.Linear(8, outputs)
            body.requires_grad_(False)
            return nn.Sequential(body, nn.ReLU(), head)
        """
    )
    trial = make_trial(f"{name}:make", {})
    before = _weights(_begin(trial, blobs))
    after = _weights(_train(trial, blobs)[0])

    assert {key for key in before if before[key] == after[key]} == {"0.weight", "0.bias"}
