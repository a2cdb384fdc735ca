from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from bigray.data.batches import epoch_order, global_batch, worker_share
from bigray.data.dataset import TrainingArrays
from bigray.errors import StorageError, TrainingFailed
from bigray.models import build_model
from bigray.specs import METRICS, TrialSpec
from bigray.training.checkpoint import Checkpoint, SnapshotBuffers
from bigray.training.loop import TrialTraining, Worker
from bigray.training.tensor_files import pack_tensors
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


@pytest.mark.parametrize("rest_at", [6, 10])
def test_a_wish_to_rest_is_followed_at_the_end_of_the_epoch(
    make_trial: MakeTrial, blobs: TrainingArrays, rest_at: int
) -> None:
    trial = make_trial()
    hooks = RecordingHooks(rest_at={rest_at})
    training = _begin(trial, blobs, hooks)
    training.train_to(4)
    assert (training.progress.epoch, training.progress.batch, training.progress.step) == (2, 0, 10)
    assert [report["epoch"] for report in hooks.reports] == [1, 2]

    training.train_to(4)
    assert _weights(training) == _weights(_train(trial, blobs)[0])


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


# --- what the gradients become


def _linear(make_trial: MakeTrial, **settings: Any) -> TrialSpec:
    """Linear regression by SGD: what it does can be written by hand."""
    return make_trial("bigray.models:linear", {}, task="regression", optimizer="sgd", **settings)


def _parameters(training: TrialTraining) -> np.ndarray[Any, Any]:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in training.module.parameters()])


def _by_hand(line: TrainingArrays, num_steps: int) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Weights and their gradient at each step of the first epoch, in float64; send the next weights."""
    x, y = np.column_stack([line.x_train, np.ones(70)]).astype(np.float64), line.y_train.astype(np.float64)
    order, weights = epoch_order(0, 0, 70), np.zeros(4)
    for step in range(num_steps):
        rows = global_batch(order, step, 16)
        change = yield weights, 2 * x[rows].T @ (x[rows] @ weights - y[rows]) / max(1, len(rows))
        weights = weights + change


def test_class_weights_give_the_weighted_mean_of_each_batch(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    """One process, float64, torch's own weighted cross-entropy; the last batch is a partial one."""
    class_weights = (0.2, 1.0, 3.0)
    settings = {"optimizer": "sgd", "class_weights": class_weights, "label_smoothing": 0.1, "epochs": 1}
    training, reports = _train(make_trial("bigray.models:linear", {}, **settings), blobs)

    module = build_model("bigray.models:linear", {}, (4,), 3).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    x, y, weight = (
        torch.from_numpy(blobs.x_train).double(),
        torch.from_numpy(blobs.y_train),
        torch.tensor(class_weights),
    )
    losses, order = 0.0, epoch_order(0, 0, 70)
    for batch in range(5):
        rows = global_batch(order, batch, 16)
        loss = functional.cross_entropy(module(x[rows]), y[rows], weight=weight.double(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.item() * weight[y[rows]].double().sum().item()

    for trained, expected in zip(training.module.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(trained.double(), expected, rtol=1e-5, atol=1e-6)
    assert reports[0]["train_loss"] == pytest.approx(losses / weight[y].double().sum().item(), rel=1e-6)


def test_the_rate_follows_the_schedule_and_gradients_are_clipped(make_trial: MakeTrial, line: TrainingArrays) -> None:
    """Warm-up over two steps, then linear to zero over all five; no gradient longer than 0.5."""
    schedule = {"kind": "linear", "warmup_steps": 2}
    training, _ = _train(_linear(make_trial, schedule=schedule, clip_norm=0.5, epochs=1), line)

    steps = _by_hand(line, 6)
    weights, gradient = next(steps)
    for factor in (1 / 3, 2 / 3, 1.0, 0.5, 0.0):
        norm = np.linalg.norm(gradient)
        weights, gradient = steps.send(-0.05 * factor * gradient * min(1.0, 0.5 / norm))
    np.testing.assert_allclose(_parameters(training), weights, rtol=1e-4, atol=1e-6)


def test_the_averaged_weights_are_what_is_validated_and_kept(make_trial: MakeTrial, line: TrainingArrays) -> None:
    training, reports = _train(_linear(make_trial, ema_decay=0.7, epochs=1), line)

    steps, average = _by_hand(line, 6), np.zeros(4)
    _, gradient = next(steps)
    for _ in range(5):
        weights, gradient = steps.send(-0.05 * gradient)
        average = 0.7 * average + 0.3 * weights
    np.testing.assert_allclose(_parameters(training), weights, rtol=1e-5, atol=1e-6)

    checkpoint = _checkpoint(training)
    kept = checkpoint.tensors(checkpoint.best_file()) or {}
    flat = np.concatenate([kept[name].numpy().ravel() for name, _ in training.module.named_parameters()])
    np.testing.assert_allclose(flat, average, rtol=1e-5)
    outputs = line.x_val.astype(np.float64) @ average[:3] + average[3]
    assert reports[0]["metrics"]["val_mse"] == pytest.approx(np.mean((outputs - line.y_val) ** 2), rel=1e-4)


def test_each_part_can_have_a_seed_of_its_own(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    settings = {"params": {"hidden": [8], "dropout": 0.3}, "epochs": 1}
    usual = _weights(_train(make_trial(**settings), blobs)[0])
    same = {"weights": 0, "order": 0, "steps": 0}

    assert _weights(_train(make_trial(seed=9, seeds=same, **settings), blobs)[0]) == usual
    for part in same:
        assert _weights(_train(make_trial(seeds={part: 9}, **settings), blobs)[0]) != usual, part
    begun = _weights(_begin(make_trial(seeds={"order": 9, "steps": 9}, **settings), blobs))
    assert begun == _weights(_begin(make_trial(**settings), blobs))


# --- what is not finite


def _with_nan(data: TrainingArrays, row: int) -> TrainingArrays:
    x = data.x_train.copy()
    x[row] = math.nan
    return replace(data, x_train=x)


def test_a_nan_ends_the_trial_before_the_step_and_names_it(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    bad_row = int(epoch_order(0, 0, 70)[20])  # rows 16 to 31 of the order are the second step's
    hooks = RecordingHooks(save_at=range(100))
    training = _begin(make_trial(), _with_nan(blobs, bad_row), hooks)
    training.train_to(4)

    assert training.progress.ended == "diverged"
    assert (training.progress.epoch, training.progress.step) == (0, 1)
    assert hooks.reports[-1]["reason"] == "step 2: loss is not finite"
    assert hooks.reports[-1]["ended"] == "diverged"
    assert all(torch.isfinite(parameter).all() for parameter in training.module.parameters())
    assert _checkpoint(training).progress.ended == "diverged"


def test_an_infinite_loss_with_finite_gradients_is_found_too(make_trial: MakeTrial, line: TrainingArrays) -> None:
    """1e30 squared is infinite in float32, its slope is not."""
    y = line.y_train.copy()
    y[0] = 1e30
    training, reports = _train(_linear(make_trial), replace(line, y_train=y))

    assert training.progress.ended == "diverged"
    assert reports[-1]["reason"].endswith("loss is not finite")


def test_a_bad_gradient_is_named_by_its_parameter(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule
) -> None:
    """The square root of 0 has an infinite slope, and the loss is fine."""
    name = user_module(
        """
        import torch
        from torch import nn
        class Net(nn.Module):
            def __init__(self, width, outputs):
                super().__init__()
                self.head, self.scale = nn.Linear(width, outputs), nn.Parameter(torch.zeros(1))
            def forward(self, x):
                return self.head(x) + self.scale.sqrt()
        def make(shape, outputs): return Net(shape[0], outputs)
        """
    )
    _, reports = _train(make_trial(f"{name}:make", {}), blobs)

    assert reports[-1]["reason"] == "step 1: gradient of 'scale' is not finite"


def _rolling_back(make_trial: MakeTrial, lr: float, **policy: Any) -> TrialSpec:
    return _linear(make_trial, lr=lr, on_non_finite={"policy": "rollback", **policy})


def test_a_trial_goes_back_to_its_last_checkpoint_with_a_lower_rate(
    make_trial: MakeTrial, line: TrainingArrays
) -> None:
    """The checkpoint is of a sound trial; at a rate of 1e30 the steps after it overflow, until the rate is low."""
    trial = _rolling_back(make_trial, 1e30, lr_factor=1e-16)
    good = RecordingHooks(save_at={2})
    _begin(_linear(make_trial), line, good).train_to(1)
    hooks = RecordingHooks()
    hooks.checkpoints = good.checkpoints
    training = _begin(trial, line, hooks)
    training.restore(good.checkpoints[0])
    training.train_to(4)

    assert training.progress.ended == "finished"
    assert (training.progress.rollbacks, training.progress.lr_scale) == (2, pytest.approx(1e-32))
    assert training.progress.step == 20
    assert len(hooks.warnings) == 2
    assert "is not finite; going back to step 2 with 1e-16 x the learning rate" in hooks.warnings[0]
    assert (training.progress.samples_lost, training.progress.samples_repeated) == (0, 0)


def test_without_a_checkpoint_a_trial_goes_back_to_its_beginning(make_trial: MakeTrial, line: TrainingArrays) -> None:
    rolled_back, reports = _train(_rolling_back(make_trial, 1e30, lr_factor=5e-32), line)
    straight, straight_reports = _train(_linear(make_trial, lr=1e30 * 5e-32), line)

    assert rolled_back.progress.rollbacks == 1
    np.testing.assert_allclose(_parameters(rolled_back), _parameters(straight), rtol=1e-6)
    assert [report["epoch"] for report in reports] == [report["epoch"] for report in straight_reports]


def test_a_trial_goes_back_a_limited_number_of_times(make_trial: MakeTrial, line: TrainingArrays) -> None:
    training, reports = _train(_rolling_back(make_trial, 1e30, max_rollbacks=2), line)

    assert training.progress.ended == "diverged"
    assert training.progress.rollbacks == 2
    assert "is not finite" in reports[-1]["reason"]


# --- how the steps are computed


def test_fp16_scales_the_loss_and_takes_its_scale_along(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    trial = make_trial(precision="fp16", epochs=8)
    uninterrupted, reports = _train(trial, blobs)
    first = _begin(trial, blobs)
    first.train_to(4)
    checkpoint = _checkpoint(first)
    resumed, _ = _resume(trial, blobs, checkpoint)

    assert reports[-1]["train_loss"] < reports[0]["train_loss"]
    assert checkpoint.tensors("scaler")
    assert _weights(resumed) == _weights(uninterrupted)


def test_a_step_whose_scaled_gradients_overflow_is_left_out_and_its_samples_count(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    """At a scale of 2 to the power of 127 the first gradients overflow; the scaler halves it until they do not."""
    trial = make_trial(precision="fp16", epochs=1)
    training, hooks = _begin(trial, blobs), RecordingHooks()
    checkpoint = _checkpoint(training)
    scale = {"scale": torch.tensor(2.0**127, dtype=torch.float64), "growth_tracker": torch.tensor(0)}
    training = _begin(trial, blobs, hooks)
    training.restore(replace(checkpoint, files={**checkpoint.files, "scaler.safetensors": pack_tensors(scale)}))
    training.train_to(1)
    after = _checkpoint(training).tensors("scaler") or {}

    assert (training.progress.ended, training.progress.step) == ("finished", 5)
    assert after["scale"] < 2.0**127
    assert (hooks.reports[0]["samples_lost"], hooks.reports[0]["samples_repeated"]) == (0, 0)


@pytest.mark.parametrize("settings", [{}, {"exact": True}], ids=["plain", "exact"])
def test_gradient_checkpointing_changes_no_bit(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule, settings: dict[str, Any]
) -> None:
    """With dropout and batch norm: random numbers and statistics of the second pass are those of the first."""
    layers = {"hidden": [8, 8], "dropout": 0.3}
    for factory, params in ((f"{user_module(BATCH_NORM)}:make", {}), ("bigray.models:mlp", layers)):
        usual = _train(make_trial(factory, params, epochs=2, **settings), blobs)[0]
        again = _train(make_trial(factory, params, epochs=2, gradient_checkpointing=True, **settings), blobs)[0]
        assert _weights(again) == _weights(usual), factory


def test_gradient_checkpointing_computes_blocks_a_second_time_while_training(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule
) -> None:
    name = user_module(
        """
        from torch import nn
        calls = []
        class Block(nn.Linear):
            def forward(self, x):
                calls.append((self.training, len(x)))
                return super().forward(x).relu()
        def make(shape, outputs):
            return nn.Sequential(nn.Linear(shape[0], 8), nn.Sequential(Block(8, 8)), nn.Linear(8, outputs))
        """
    )
    _train(make_trial(f"{name}:make", {}, epochs=1, gradient_checkpointing=True), blobs)
    calls = sys.modules[name].calls

    assert [rows for is_training, rows in calls if is_training] == [16, 16, 16, 16, 16, 16, 16, 16, 6, 6]
    assert sum(rows for is_training, rows in calls if not is_training) == 30


def test_a_compiled_model_is_trained_and_saved_under_its_own_names(
    make_trial: MakeTrial, blobs: TrainingArrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself takes seconds; what counts here is that the loop calls what it returns."""
    calls: list[int] = []

    class Compiled(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

        def forward(self, x: torch.Tensor) -> Any:
            calls.append(len(x))
            return self._orig_mod(x)

    monkeypatch.setattr(torch, "compile", lambda module, dynamic: Compiled(module))
    usual, _ = _train(make_trial(), blobs)
    compiled, _ = _train(make_trial(compile=True), blobs)

    assert calls == [16, 16, 16, 16, 6] * 4
    assert _checkpoint(compiled).files == _checkpoint(usual).files


def test_a_model_that_cannot_be_compiled_is_told_in_one_line(
    make_trial: MakeTrial, blobs: TrainingArrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: torch.fx.GraphModule, __: Any) -> Any:
        raise RuntimeError("no kernels today")

    compile_module = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: compile_module(module, backend=fail))

    with pytest.raises(
        TrainingFailed, match=r"^training\.compile: torch\.compile cannot take model 'net': .*"
    ) as caught:
        _train(make_trial(compile=True), blobs)
    assert "\n" not in str(caught.value)
    assert "no kernels today" in str(caught.value)
    assert str(caught.value).endswith("set compile = false")


def test_a_checkpoint_of_another_model_is_refused_in_one_line(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    other = _checkpoint(_begin(make_trial(params={"hidden": [9]}), blobs))

    with pytest.raises(StorageError, match=r"checkpoint of step 0: does not fit model 'net': .*") as caught:
        _begin(make_trial(), blobs).restore(other)
    assert "\n" not in str(caught.value)


def test_a_step_is_heard_of_in_each_of_its_phases(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    hooks = RecordingHooks()
    _begin(make_trial(epochs=1), blobs, hooks).train_to(1)

    heard = [phase for phase in hooks.phases if phase not in ("data", "report", "save")]

    assert heard == ["forward", "backward", "step"] * 5 + ["validation"] * 8
    assert hooks.phases.index("data") < hooks.phases.index("forward")


# --- a language model


def _text(rows: int = 40, length: int = 5, tokens: int = 6) -> TrainingArrays:
    """Each token is the one before plus 1: what follows is told by the token alone."""
    start = np.arange(rows + 12)[:, None] % tokens
    windows = (start + np.arange(length + 1)) % tokens
    x, y = windows[:, :-1].astype(np.float32), windows[:, 1:].astype(np.int64)
    return TrainingArrays(x[:rows], y[:rows], x[rows:], y[rows:])


OF_TOKENS = """
    from torch import nn

    class Bigrams(nn.Module):
        def __init__(self, num_outputs):
            super().__init__()
            self.table = nn.Embedding(num_outputs, num_outputs)

        def forward(self, x):
            return self.table(x.long())

    class Last(Bigrams):
        def forward(self, x):
            return super().forward(x)[:, -1]

    def bigrams(input_shape, num_outputs):
        return Bigrams(num_outputs)

    def last(input_shape, num_outputs):
        return Last(num_outputs)
"""


def test_a_language_model_learns_what_follows_at_each_position(make_trial: MakeTrial, user_module: UserModule) -> None:
    trial = make_trial(f"{user_module(OF_TOKENS)}:bigrams", {}, task="language", lr=0.3, epochs=5)
    hooks = RecordingHooks()
    training = TrialTraining(trial, _text(), 6, ALONE, hooks)
    training.train_to(5)
    metrics = [report["metrics"] for report in hooks.reports]

    assert set(metrics[0]) == set(METRICS["language"])
    assert metrics[-1]["val_loss"] < 0.1 < metrics[0]["val_loss"]
    assert metrics[-1]["val_token_accuracy"] == 1.0
    assert all(each["val_perplexity"] == pytest.approx(math.exp(each["val_loss"])) for each in metrics)


def test_a_model_that_answers_the_last_position_only_is_no_language_model(
    make_trial: MakeTrial, user_module: UserModule
) -> None:
    trial = make_trial(f"{user_module(OF_TOKENS)}:last", {}, task="language")
    training = TrialTraining(trial, _text(), 6, ALONE, RecordingHooks())

    with pytest.raises(TrainingFailed, match=r"returned shape \(16, 6\) for 16 rows, expected \(16, 5, 6\)"):
        training.train_to(1)
