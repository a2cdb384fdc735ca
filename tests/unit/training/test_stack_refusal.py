"""What cannot be stacked is trained alone, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bigray.data.dataset import TrainingArrays
from bigray.specs import TrialSpec
from bigray.training.stack import stack_key, why_not_stacked

MakeTrial = Callable[..., TrialSpec]
UserModule = Callable[[str], str]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"loop": "user:train", "metric": "val_loss", "metric_mode": "min"}, "training.loop"),
        ({"exact": True}, "training.exact"),
        ({"strategy": "fsdp"}, "training.strategy = 'fsdp'"),
        ({"compile": True}, "training.compile"),
        ({"precision": "bf16"}, "training.precision = 'bf16'"),
        ({"ema_decay": 0.9}, "training.ema_decay"),
        ({"param_groups": [{"match": "*", "lr_scale": 0.1}]}, "training.param_groups"),
        ({"gradient_checkpointing": True}, "training.gradient_checkpointing"),
        ({"sync_batchnorm": True}, "training.sync_batchnorm"),
        ({"on_non_finite": {"policy": "rollback"}}, "training.on_non_finite.policy = 'rollback'"),
        ({"micro_batch_size": 8}, "training.micro_batch_size"),
        ({"global_batch_size": "auto"}, "training.global_batch_size = 'auto'"),
        ({"optimizer": "rmsprop"}, "training.optimizer 'rmsprop' is not one of sgd, adam, adamw"),
        ({"optimizer_params": {"maximize": True}}, "training.optimizer_params.maximize"),
        ({"optimizer": "sgd", "optimizer_params": {"nesterov": True}}, "nesterov needs a momentum"),
    ],
)
def test_a_setting_that_lanes_cannot_have_is_named(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any], reason: str
) -> None:
    why = why_not_stacked(make_trial(**settings), blobs, 3, CPU)
    assert why is not None
    assert reason in why
    assert "\n" not in why


MODULES = """
    import torch
    from torch import nn

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))
        def forward(self, x):
            self.calls += 1
            return self.layer(x)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
        def forward(self, x):
            found = self.layer(x)
            return found if found.sum() > 0 else -found

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
        def forward(self, x):
            return self.layer(x + torch.randn_like(x))

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(4, 3), nn.Linear(4, 3)
        def forward(self, x):
            return self.layer(x)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.again = self.layer
        def forward(self, x):
            return self.head(self.again(self.layer(x)))

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 3), 0
        def forward(self, x):
            self.calls += 1
            return self.layer(x) * self.calls

    def counts(input_shape, num_outputs): return Counts()
    def branches(input_shape, num_outputs): return Branches()
    def noisy(input_shape, num_outputs): return Noisy()
    def unused(input_shape, num_outputs): return Unused()
    def tied(input_shape, num_outputs): return Tied()
    def remembers(input_shape, num_outputs): return Remembers()
    def norm(input_shape, num_outputs): return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    def hooked(input_shape, num_outputs):
        module = nn.Sequential(nn.Linear(4, 3))
        module[0].register_forward_hook(lambda layer, x, y: 2 * y)
        return module
    def dropout(input_shape, num_outputs): return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    def idle_dropout(input_shape, num_outputs): return nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 3))
    def frozen(input_shape, num_outputs):
        module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        module[0].requires_grad_(False)
        return module
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("counts", "buffers that training changes"),
        ("branches", "a stacked step failed"),
        ("noisy", "a stacked step failed"),
        ("unused", "a stacked step failed"),
        ("tied", "two layers share a parameter"),
        ("remembers", "another loss"),
        ("norm", "layer '1' (BatchNorm1d) has statistics that training changes"),
        ("dropout", "layer '1' (Dropout) draws random numbers"),
    ],
)
def test_a_module_that_lanes_cannot_share_is_named(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule, name: str, reason: str
) -> None:
    trial = make_trial(f"{user_module(MODULES)}:{name}", {})
    why = why_not_stacked(trial, blobs, 3, CPU)
    assert why is not None
    assert reason in why
    assert "\n" not in why


@pytest.mark.parametrize("name", ["hooked", "idle_dropout", "frozen"])
def test_a_module_that_only_looks_difficult_can_be_stacked(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule, name: str
) -> None:
    assert why_not_stacked(make_trial(f"{user_module(MODULES)}:{name}", {}), blobs, 3, CPU) is None


def test_a_task_that_cannot_be_mapped_over_lanes_is_refused(
    make_trial: MakeTrial, line: TrainingArrays, user_module: UserModule
) -> None:
    module = user_module("""
        import torch, torchmetrics

        class Strict:
            def __init__(self, num_outputs): pass
            def loss(self, outputs, targets):
                assert float(outputs.sum()) < 1e9
                return (outputs[:, 0] - targets) ** 2
            def metrics(self, num_outputs): return {"val_mse": torchmetrics.MeanSquaredError()}
            def predict(self, outputs): return outputs[:, 0]
    """)
    trial = make_trial(task=f"{module}:Strict", targets="regression", metric="val_mse", metric_mode="min")
    why = why_not_stacked(trial, line, 1, CPU)
    assert why is not None
    assert "a stacked step failed" in why


def test_a_model_that_cannot_be_built_is_left_to_tell_its_own_story(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    why = why_not_stacked(make_trial(params={"widths": [8]}), blobs, 3, CPU)
    assert why is not None
    assert "the model cannot be built" in why


def test_asking_changes_nothing_of_a_trial(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    rows, targets = blobs.x_train.copy(), blobs.y_train.copy()
    assert why_not_stacked(make_trial(), blobs, 3, CPU) is None
    assert np.array_equal(rows, blobs.x_train)
    assert np.array_equal(targets, blobs.y_train)


def test_trials_that_differ_in_their_own_numbers_may_share_a_stack(make_trial: MakeTrial) -> None:
    base = make_trial()
    alike = [
        make_trial(lr=0.1),
        make_trial(weight_decay=0.1),
        make_trial(momentum=0.9),
        make_trial(lr_scaling="linear", lr_batch_size=32),
        base.model_copy(update={"trial_id": "7-net"}),
    ]
    assert {stack_key(trial) for trial in alike} == {stack_key(base)}


@pytest.mark.parametrize(
    "settings", [{"global_batch_size": 8}, {"epochs": 5}, {"seed": 1}, {"params": {"hidden": [9]}}, {"clip_norm": 1.0}]
)
def test_trials_that_differ_otherwise_may_not(make_trial: MakeTrial, settings: dict[str, Any]) -> None:
    assert stack_key(make_trial(**settings)) != stack_key(make_trial())
