"""`keep_zeros` of a model: what is 0 in the matrices that training starts from is 0 in those it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from bigray.compression.prune import prune_weights
from bigray.data.dataset import TrainingArrays
from bigray.errors import SpecError
from bigray.models import build_model
from bigray.models.transfer import keep_zeros_fault, start_from
from bigray.specs import OPTIMIZERS, ModelSpec, TrainingSpec, TrialSpec
from bigray.training.checkpoint import SnapshotBuffers
from bigray.training.loop import TrialTraining, Worker
from bigray.training.stack_refusal import why_not_stacked
from tests.loop_hooks import RecordingHooks, to_checkpoint

MLP, PARAMS = "bigray.models:mlp", {"hidden": [16]}


def _module() -> torch.nn.Module:
    return build_model(MLP, PARAMS, (4,), 3)


@pytest.fixture
def pruned(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Weights of an mlp of which half are zero, written to weights.safetensors; a bias is zero too."""
    torch.manual_seed(7)
    module = _module()
    prune_weights(module, 0.5)
    module.get_parameter("3.bias").data.zero_()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _model(folder: Path, **fields: Any) -> ModelSpec:
    weights = str(folder / "weights.safetensors")
    return ModelSpec(**{"factory": MLP, "params": PARAMS, "weights": weights, "keep_zeros": True, **fields})


def _data() -> TrainingArrays:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 4)).astype(np.float32), np.arange(40) % 3
    return TrainingArrays(x, y, x[:9], y[:9])


def _training(model: ModelSpec, hooks: RecordingHooks | None = None, **settings: Any) -> TrialTraining:
    spec = TrainingSpec(**{"task": "classification", "epochs": 3, "global_batch_size": 8, "lr": 0.01, **settings})
    trial = TrialSpec(trial_id="net", model_name="net", model=model, training=spec, seed=0)
    return TrialTraining(trial, _data(), 3, Worker(0, 1, torch.device("cpu")), hooks or RecordingHooks())


def _check(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    for name in ("1.weight", "3.weight"):
        is_zero = before[name] == 0
        assert is_zero.any()
        assert (after[name][is_zero] == 0).all(), name
        assert not torch.equal(after[name][~is_zero], before[name][~is_zero]), "the others are trained"
    assert (after["3.bias"] != 0).all(), "a bias is no matrix"


@pytest.mark.parametrize(
    "settings",
    [
        *({"optimizer": name} for name in OPTIMIZERS),
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "optimizer_params": {"nesterov": True}},
        {"optimizer": "rmsprop", "momentum": 0.9, "optimizer_params": {"centered": True}},
        {"optimizer": "adamw", "weight_decay": 0.5, "optimizer_params": {"amsgrad": True}, "clip_norm": 0.1},
        {"ema_decay": 0.9},
        {"precision": "bf16", "gradient_checkpointing": True},
        {"exact": True, "micro_batch_size": 2},
        {"micro_batch_size": 3, "schedule": {"kind": "one_cycle"}},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_zeros_stay_zeros_under_every_optimizer_and_way_to_train(
    tmp_path: Path, pruned: dict[str, torch.Tensor], settings: dict[str, Any]
) -> None:
    training = _training(_model(tmp_path), **settings)
    training.train_to(3)

    _check(pruned, dict(training.module.state_dict()))
    assert training.best_weights is not None
    _check(pruned, dict(training.best_weights))


def test_a_trial_that_goes_on_keeps_them_too(tmp_path: Path, pruned: dict[str, torch.Tensor]) -> None:
    whole = _training(_model(tmp_path), RecordingHooks(save_at={5}))
    whole.train_to(3)
    resumed = _training(_model(tmp_path))
    resumed.restore(whole.hooks.checkpoints[0])  # type: ignore[attr-defined]
    resumed.train_to(3)

    _check(pruned, dict(resumed.module.state_dict()))
    before, after = (to_checkpoint(training.snapshot(SnapshotBuffers())).files for training in (whole, resumed))
    assert before == after


def test_without_the_setting_they_are_trained(tmp_path: Path, pruned: dict[str, torch.Tensor]) -> None:
    training = _training(_model(tmp_path, keep_zeros=False))
    training.train_to(1)

    assert (training.module.get_parameter("1.weight") != 0).all()


def test_a_gradient_that_is_not_finite_does_not_reach_a_zero(tmp_path: Path, pruned: dict[str, torch.Tensor]) -> None:
    module = _module()
    start_from(module, _model(tmp_path))
    module(torch.full((1, 4), torch.inf)).sum().backward()
    gradient = module.get_parameter("1.weight").grad

    assert gradient is not None
    assert not gradient.isfinite().all()
    assert (gradient[pruned["1.weight"] == 0] == 0).all()


def test_frozen_zeros_and_those_of_a_compiled_model_stay(tmp_path: Path, pruned: dict[str, torch.Tensor]) -> None:
    module = _module()
    start_from(module, _model(tmp_path, freeze=("1.*",)))
    compiled = torch.compile(module, backend="aot_eager")
    compiled(torch.ones(2, 4)).sum().backward()

    assert module.get_parameter("1.weight").grad is None
    gradient = module.get_parameter("3.weight").grad
    assert gradient is not None
    assert (gradient[pruned["3.weight"] == 0] == 0).all()


def test_what_cannot_be_kept_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="keep_zeros: needs weights, the file whose zeros are to stay"):
        ModelSpec(factory=MLP, keep_zeros=True)
    save_file({"3.bias": torch.zeros(3), "1.weight": torch.ones(16, 4)}, tmp_path / "weights.safetensors")
    with pytest.raises(SpecError, match=r"^keep_zeros: no matrix that was taken from weights has a zero"):
        start_from(_module(), _model(tmp_path))


def test_trials_that_keep_zeros_are_not_stacked_and_not_sharded(
    tmp_path: Path, pruned: dict[str, torch.Tensor]
) -> None:
    training = TrainingSpec(task="classification", global_batch_size=8, optimizer="sgd")
    trial = TrialSpec(trial_id="net", model_name="net", model=_model(tmp_path), training=training, seed=0)

    assert "keep_zeros" in str(why_not_stacked(trial, _data(), 3, torch.device("cpu")))
    assert keep_zeros_fault(trial.model, training) is None
    sharded = training.model_copy(update={"strategy": "fsdp"})
    assert str(keep_zeros_fault(trial.model, sharded)).startswith("keep_zeros: is not for strategy = 'fsdp'")
