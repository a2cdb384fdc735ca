"""The probe: how long steps take, of trials that nobody keeps."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bigray.data.dataset import TrainingArrays
from bigray.specs import TrialSpec
from bigray.training.loop import TrialTraining, Worker
from bigray.training.stack_probe import time_steps_alone, time_steps_stacked
from tests.loop_hooks import RecordingHooks

MakeTrial = Callable[..., TrialSpec]
ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "settings", [{}, {"lr": 1e38, "optimizer": "sgd"}, {"epochs": 1, "patience": 1}, {"lr_scaling": "linear"}]
)
def test_steps_are_timed_whatever_the_trial(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any]
) -> None:
    trial = make_trial(**settings)
    assert 0 < time_steps_alone(trial, blobs, 3, ALONE) < 1
    assert 0 < time_steps_stacked(trial, blobs, 3, ALONE, 8) < 1


def test_a_step_that_takes_long_is_taken_once(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: Callable[[str], str]
) -> None:
    name = user_module(
        """
        import time
        from torch import nn
        passes = []
        class Slow(nn.Linear):
            def forward(self, x):
                passes.append(1)
                time.sleep(0.6)
                return super().forward(x)
        def make(shape, outputs): return Slow(shape[0], outputs)
        """
    )
    trial, passes = make_trial(f"{name}:make", {}), importlib.import_module(name).passes
    assert time_steps_alone(trial, blobs, 3, ALONE) > 0.6
    assert len(passes) == 1
    assert time_steps_stacked(trial, blobs, 3, ALONE, 4) > 0.6 / 4
    assert len(passes) == 2


def test_probing_changes_nothing_of_a_trial(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    def trained() -> dict[str, torch.Tensor]:
        training = TrialTraining(make_trial(), blobs, 3, ALONE, RecordingHooks())
        training.train_to(2)
        time_steps_alone(make_trial(), blobs, 3, ALONE)
        time_steps_stacked(make_trial(), blobs, 3, ALONE, 2)
        training.train_to(4)
        return training.module.state_dict()

    alone = TrialTraining(make_trial(), blobs, 3, ALONE, RecordingHooks())
    alone.train_to(4)
    assert all(torch.equal(tensor, alone.module.state_dict()[name]) for name, tensor in trained().items())
