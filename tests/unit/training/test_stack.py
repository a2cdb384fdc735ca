"""Every lane of a stack is its trial alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bigray.data.dataset import TrainingArrays
from bigray.specs import METRICS, TrialSpec
from bigray.training.checkpoint import Checkpoint, SnapshotBuffers
from bigray.training.commands import Wish
from bigray.training.loop import TrialTraining, Worker
from bigray.training.stack import StackedTraining, why_not_stacked
from bigray.training.tensor_files import pack_tensors
from tests.loop_hooks import RecordingHooks, to_checkpoint

MakeTrial = Callable[..., TrialSpec]
UserModule = Callable[[str], str]
ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))
RATES = (0.003, 0.01, 0.03, 0.1)

OWN_MODULE = """
    import torch
    from torch import nn

    class Gated(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.register_buffer("shift", torch.full((inputs,), 0.1))
            self.left, self.right = nn.Linear(inputs, 6), nn.Linear(inputs, 6)
            self.scale = nn.Parameter(torch.ones(6))
            self.head = nn.Linear(6, outputs)

        def forward(self, x):
            x = x + self.shift
            return self.head(torch.tanh(self.left(x)) * torch.sigmoid(self.right(x)) * self.scale)

    def make(input_shape, num_outputs):
        return Gated(input_shape[0], num_outputs)
"""


class StackHooks:
    """Remembers the reports of each lane, and wishes what it is told to wish."""

    def __init__(self, stop_at: Collection[int] = (), rest_at: Collection[int] = ()) -> None:
        self.stop_at, self.rest_at = stop_at, rest_at
        self.reports: dict[int, list[dict[str, Any]]] = {}

    def tick(self, phase: str) -> None:
        pass

    def exchange(self, step: int) -> Wish:
        return Wish(stop=step in self.stop_at, rest=step in self.rest_at)

    def on_epoch(self, lane: int, report: dict[str, Any]) -> None:
        self.reports.setdefault(lane, []).append(report)


def _num_outputs(trial: TrialSpec) -> int:
    return 1 if trial.training.target_kind in ("regression", "binary") else 3


def _stack(
    trials: Sequence[TrialSpec], data: TrainingArrays, hooks: StackHooks | None = None
) -> tuple[StackedTraining, StackHooks]:
    hooks = hooks or StackHooks()
    return StackedTraining(trials, data, _num_outputs(trials[0]), ALONE, hooks), hooks


def _alone(
    trial: TrialSpec, data: TrainingArrays, until: int | None = None, checkpoint: Checkpoint | None = None
) -> tuple[TrialTraining, list[dict[str, Any]]]:
    hooks = RecordingHooks()
    training = TrialTraining(trial, data, _num_outputs(trial), ALONE, hooks)
    if checkpoint is not None:
        training.restore(checkpoint)
    training.train_to(trial.training.epochs if until is None else until)
    return training, hooks.reports


def _lane_checkpoint(training: StackedTraining, lane: int) -> Checkpoint:
    state = training.lane_state(lane)
    assert state is not None
    files = {f"{stem}.safetensors": pack_tensors(tensors) for stem, tensors in state.items()}
    return Checkpoint(training.progresses()[lane], files)


def _weights(training: StackedTraining, lane: int, stem: str = "model") -> dict[str, torch.Tensor]:
    state = training.lane_state(lane)
    assert state is not None
    return state[stem]


def _assert_same_curve(stacked: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    assert [report["epoch"] for report in stacked] == [report["epoch"] for report in alone]
    for mine, theirs in zip(stacked, alone, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4, rel=1e-4, nan_ok=True)
        assert mine["metrics"] == pytest.approx(theirs["metrics"], abs=1e-4)
        assert mine["best_metrics"] == pytest.approx(theirs["best_metrics"], abs=1e-4)
        for name in ("step", "best_epoch", "samples_lost", "samples_repeated", "ended", "reason"):
            assert mine[name] == theirs[name]
        assert set(mine) == set(theirs)


def _assert_lanes_equal_trials(trials: Sequence[TrialSpec], data: TrainingArrays, *, weights: bool = True) -> None:
    assert why_not_stacked(trials[0], data, _num_outputs(trials[0]), ALONE.device) is None
    stacked, hooks = _stack(trials, data)
    assert stacked.train_to(trials[0].training.epochs)
    for lane, trial in enumerate(trials):
        training, reports = _alone(trial, data)
        _assert_same_curve(hooks.reports[lane], reports)
        for name, tensor in training.module.state_dict().items() if weights else ():
            torch.testing.assert_close(_weights(stacked, lane)[name], tensor, rtol=1e-3, atol=1e-4)


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "sgd with momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    "sgd with nesterov": {"optimizer": "sgd", "momentum": 0.8, "optimizer_params": {"nesterov": True}},
    "sgd with dampening": {"optimizer": "sgd", "momentum": 0.8, "optimizer_params": {"dampening": 0.3}},
    "adam": {"optimizer": "adam", "weight_decay": 0.1},
    "amsgrad": {"optimizer": "adam", "optimizer_params": {"amsgrad": True, "betas": [0.8, 0.99], "eps": 1e-6}},
    "adamw": {"weight_decay": 0.1},
    "a schedule": {"schedule": {"kind": "cosine", "warmup_steps": 3, "final_fraction": 0.1}},
    "one cycle": {"schedule": {"kind": "one_cycle"}, "optimizer": "sgd", "momentum": 0.9},
    "clipping": {"clip_norm": 0.1, "optimizer": "sgd"},
    "decay of matrices": {"weight_decay": 1.0, "weight_decay_on": "matrices"},
    "validation every other epoch": {"val_every": 3},
    "a scaled rate": {"lr_scaling": "sqrt", "lr_batch_size": 64},
    "seeds of its own": {"seeds": {"weights": 3, "order": 4}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_each_lane_has_the_curve_of_its_trial_alone(
    make_trial: MakeTrial, blobs: TrainingArrays, line: TrainingArrays, task: str, settings: dict[str, Any]
) -> None:
    trials = [make_trial(task=task, **{**settings, "lr": rate}) for rate in RATES]
    _assert_lanes_equal_trials(trials, blobs if task == "classification" else line)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.2},
        {"class_weights": "balanced"},
        {"class_weights": [1.0, 3.0, 0.5], "label_smoothing": 0.1},
        {"metric": "val_macro_f1"},
    ],
)
def test_each_lane_has_the_loss_settings_of_its_trial(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any]
) -> None:
    _assert_lanes_equal_trials([make_trial(lr=rate, **settings) for rate in RATES], blobs)


@pytest.mark.parametrize(
    ("task", "settings"),
    [("binary", {}), ("binary", {"class_weights": "balanced", "label_smoothing": 0.1}), ("multilabel", {})],
)
def test_each_lane_of_yes_and_no_has_the_curve_of_its_trial_alone(
    make_trial: MakeTrial, blobs: TrainingArrays, task: str, settings: dict[str, Any]
) -> None:
    def targets(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (y > 0).astype(np.int64) if task == "binary" else np.eye(3, dtype=np.int8)[y] | (y[:, None] == 2)

    data = replace(blobs, y_train=targets(blobs.y_train), y_val=targets(blobs.y_val))
    trials = [make_trial(task=task, lr=rate, **settings) for rate in RATES]
    _assert_lanes_equal_trials(trials, data)


def test_a_language_is_trained_alone(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    reason = why_not_stacked(make_trial(task="language"), blobs, 3, ALONE.device)
    assert reason == "training.task = 'language' is of trials trained alone"


def test_lanes_may_differ_in_decay_and_momentum(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    numbers = [(0.0, 0.0), (0.9, 0.0), (0.5, 0.1), (0.0, 0.3)]
    trials = [make_trial(optimizer="sgd", momentum=momentum, weight_decay=decay) for momentum, decay in numbers]
    _assert_lanes_equal_trials(trials, blobs)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize(
    ("factory", "params"),
    [
        ("bigray.models:linear", {}),
        ("bigray.models:linear", {"bias": False}),
        ("bigray.models:mlp", {"hidden": [9, 5, 7]}),
        ("bigray.models:transformer", {"width": 8, "depth": 1, "heads": 2}),
        ("own", {}),
    ],
)
def test_any_module_without_state_can_be_stacked(
    make_trial: MakeTrial,
    blobs: TrainingArrays,
    line: TrainingArrays,
    user_module: UserModule,
    task: str,
    factory: str,
    params: dict[str, Any],
) -> None:
    factory = f"{user_module(OWN_MODULE)}:make" if factory == "own" else factory
    trials = [make_trial(factory, params, task=task, lr=rate, clip_norm=1.0) for rate in RATES[:3]]
    # the biases of attention keys change nothing: their gradients are rounding errors, which AdamW scales up
    has_attention = "transformer" in factory
    _assert_lanes_equal_trials(trials, blobs if task == "classification" else line, weights=not has_attention)


def test_images_can_be_stacked(make_trial: MakeTrial) -> None:
    generator = np.random.default_rng(0)
    y = np.arange(40, dtype=np.int64) % 3
    x = (generator.normal(size=(40, 6, 6)) + y[:, None, None]).astype(np.float32)
    trials = [make_trial("bigray.models:cnn", {"channels": [2, 3]}, lr=rate) for rate in RATES[:2]]
    _assert_lanes_equal_trials(trials, TrainingArrays(x, y, x[:9], y[:9]))


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_stack_of_one_lane_is_its_trial(
    make_trial: MakeTrial, blobs: TrainingArrays, line: TrainingArrays, task: str
) -> None:
    _assert_lanes_equal_trials([make_trial(task=task)], blobs if task == "classification" else line)


def test_a_task_of_ones_own_can_be_stacked(
    make_trial: MakeTrial, line: TrainingArrays, user_module: UserModule
) -> None:
    module = user_module("""
        import torch, torchmetrics

        class Huber:
            def __init__(self, num_outputs): pass
            def loss(self, outputs, targets):
                return torch.nn.functional.huber_loss(outputs[:, 0], targets, reduction="none")
            def metrics(self, num_outputs):
                return {"val_mae": torchmetrics.MeanAbsoluteError()}
            def predict(self, outputs):
                return outputs[:, 0]
    """)
    task = {"task": f"{module}:Huber", "targets": "regression", "metric": "val_mae", "metric_mode": "min"}
    _assert_lanes_equal_trials([make_trial(lr=rate, **task) for rate in RATES], line)


def test_the_metrics_count_classes_that_nobody_predicts_as_torchmetrics_does(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    """One class is not among the validation rows, and one lane has learnt nothing yet."""
    seen = blobs.y_val != 2
    data = TrainingArrays(blobs.x_train, blobs.y_train, blobs.x_val[seen], blobs.y_val[seen])
    _assert_lanes_equal_trials([make_trial(lr=rate, epochs=1) for rate in (1e-9, 0.01)], data)


def test_lanes_that_do_not_get_better_stop_early_and_the_others_go_on(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    trials = [make_trial(lr=rate, epochs=12, patience=2, optimizer="sgd") for rate in (1e-7, 0.003, 0.03, 0.3)]
    _assert_lanes_equal_trials(trials, blobs)
    stacked, _ = _stack(trials, blobs)
    stacked.train_to(12)
    assert len({progress.epoch for progress in stacked.progresses()}) > 1, "the settings of this test are of no use"


def test_the_progress_of_a_lane_is_that_of_its_trial(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    trials = [make_trial(lr=rate, epochs=6) for rate in RATES]
    stacked, _ = _stack(trials, blobs)
    stacked.train_to(4)
    for trial, progress in zip(trials, stacked.progresses(), strict=True):
        expected = _alone(trial, blobs, until=4)[0].progress
        assert progress.metrics == pytest.approx(expected.metrics, abs=1e-5)
        assert [epoch for epoch, _ in progress.improvements] == [epoch for epoch, _ in expected.improvements]
        for name in ("epoch", "batch", "step", "ended", "best_epoch", "best_step", "validations_since_best"):
            assert getattr(progress, name) == getattr(expected, name)


def test_the_best_weights_of_a_lane_are_those_of_its_best_epoch(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    trials = [make_trial(lr=rate, epochs=8, optimizer="sgd", momentum=0.9) for rate in (0.1, 0.5, 1.0)]
    stacked, _ = _stack(trials, blobs)
    stacked.train_to(8)
    behind = [lane for lane, progress in enumerate(stacked.progresses()) if progress.best_epoch < 8]
    assert behind, "the settings of this test are of no use"
    for lane in behind:
        training, _ = _alone(trials[lane], blobs)
        assert training.best_weights is not None
        for name, tensor in training.best_weights.items():
            torch.testing.assert_close(_weights(stacked, lane, "best")[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{"optimizer": "sgd", "momentum": 0.9}, {}, {"weight_decay_on": "matrices"}])
def test_a_lane_goes_on_alone_as_if_it_had_always_been(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any]
) -> None:
    trials = [make_trial(lr=rate, epochs=6, weight_decay=0.01, **settings) for rate in RATES[:3]]
    stacked, _ = _stack(trials, blobs)
    stacked.train_to(3)
    for lane, trial in enumerate(trials):
        handed_over, reports = _alone(trial, blobs, checkpoint=_lane_checkpoint(stacked, lane))
        expected, expected_reports = _alone(trial, blobs)
        _assert_same_curve(reports, expected_reports[3:])
        for name, tensor in expected.module.state_dict().items():
            torch.testing.assert_close(handed_over.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"optimizer": "sgd", "momentum": 0.9}, {}, {"weight_decay_on": "matrices"}])
def test_trials_alone_go_on_in_a_stack_as_if_they_had_always_been(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any]
) -> None:
    trials = [make_trial(lr=rate, epochs=6, weight_decay=0.01, **settings) for rate in RATES[:3]]
    checkpoints = [to_checkpoint(_alone(trial, blobs, until=2)[0].snapshot(SnapshotBuffers())) for trial in trials]
    stacked, hooks = _stack(trials, blobs)
    stacked.restore(checkpoints)
    stacked.train_to(6)
    for lane, trial in enumerate(trials):
        expected, reports = _alone(trial, blobs)
        _assert_same_curve(hooks.reports[lane], reports[2:])
        for name, tensor in expected.module.state_dict().items():
            torch.testing.assert_close(_weights(stacked, lane)[name], tensor, rtol=1e-5, atol=1e-5)


def test_lanes_of_several_stacks_go_on_in_one(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    """As promotion does it: the best of two stacks, with one that has ended among them."""
    trials = [make_trial(lr=rate, epochs=6, optimizer="sgd", momentum=0.5) for rate in (*RATES, 1e38)]
    checkpoints = []
    for group in (trials[:2], trials[2:]):
        stacked, _ = _stack(group, blobs)
        stacked.train_to(2)
        checkpoints += [_lane_checkpoint(stacked, lane) for lane in range(len(group))]
    promoted = [1, 4, 3]
    stacked, hooks = _stack([trials[number] for number in promoted], blobs)
    stacked.restore([checkpoints[number] for number in promoted])
    stacked.train_to(6)

    assert stacked.progresses()[1] == checkpoints[4].progress
    assert 1 not in hooks.reports
    for lane in (0, 2):
        _assert_same_curve(hooks.reports[lane], _alone(trials[promoted[lane]], blobs)[1][2:])


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}], ids=["adamw", "sgd"])
def test_a_lane_that_diverges_leaves_the_others_alone(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any]
) -> None:
    rates = (0.01, 1e38, 0.03)
    trials = [make_trial(lr=rate, **settings) for rate in rates]
    stacked, hooks = _stack(trials, blobs)
    stacked.train_to(4)
    others, _ = _stack([trials[0], trials[2]], blobs)
    others.train_to(4)

    expected, reports = _alone(trials[1], blobs)
    assert [progress.ended for progress in stacked.progresses()] == ["finished", "diverged", "finished"]
    for name in ("step", "epoch", "batch", "ended", "metrics", "epoch_samples"):
        assert getattr(stacked.progresses()[1], name) == getattr(expected.progress, name)
    assert math.isnan(hooks.reports[1][-1]["train_loss"])
    assert hooks.reports[1][-1]["metrics"] == {}
    assert hooks.reports[1][-1]["reason"] == reports[-1]["reason"]
    for name, tensor in expected.module.state_dict().items():  # frozen before the step that could not be taken
        torch.testing.assert_close(_weights(stacked, 1)[name], tensor, rtol=1e-4, atol=1e-4, equal_nan=True)
    for lane, other in ((0, 0), (2, 1)):
        for name, tensor in _weights(others, other).items():
            torch.testing.assert_close(_weights(stacked, lane)[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_stack_whose_lanes_have_all_diverged_is_done(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    stacked, hooks = _stack([make_trial(optimizer="sgd", lr=rate) for rate in (1e37, 1e38)], blobs)
    assert stacked.train_to(4)
    assert [progress.ended for progress in stacked.progresses()] == ["diverged", "diverged"]
    assert [len(reports) for reports in hooks.reports.values()] == [1, 1]
    assert stacked.is_done(4)
    assert stacked.train_to(4)


def test_a_wish_to_stop_is_granted_at_once_and_the_stack_can_go_on(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    trials = [make_trial(lr=rate) for rate in RATES]
    hooks = StackHooks(stop_at=[7])
    stacked, _ = _stack(trials, blobs, hooks)
    assert not stacked.train_to(4)
    assert [(p.epoch, p.batch, p.step) for p in stacked.progresses()] == [(1, 2, 7)] * 4
    assert stacked.train_to(4)
    _assert_same_curve(hooks.reports[2], _alone(trials[2], blobs)[1])


def test_a_wish_to_rest_is_granted_at_the_end_of_the_epoch(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    hooks = StackHooks(rest_at=[6])
    stacked, _ = _stack([make_trial(lr=rate) for rate in RATES], blobs, hooks)
    assert stacked.train_to(4)
    assert {(p.epoch, p.batch) for p in stacked.progresses()} == {(2, 0)}


def test_lanes_begin_at_the_weights_of_their_trials(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    trial = make_trial(seed=5)
    stacked, _ = _stack([trial, trial], blobs)
    expected = TrialTraining(trial, blobs, 3, ALONE, RecordingHooks()).module.state_dict()
    for lane in range(2):
        assert all(torch.equal(_weights(stacked, lane)[name], tensor) for name, tensor in expected.items())


def test_trials_that_differ_in_more_than_numbers_are_refused(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    with pytest.raises(AssertionError, match="stack_key"):
        _stack([make_trial(), make_trial(global_batch_size=8)], blobs)


def test_every_metric_of_the_task_is_reported(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    _, hooks = stacked = _stack([make_trial(), make_trial(lr=0.01)], blobs)
    stacked[0].train_to(1)
    assert all(set(reports[0]["metrics"]) == set(METRICS["classification"]) for reports in hooks.reports.values())
