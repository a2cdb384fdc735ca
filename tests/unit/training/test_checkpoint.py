from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch

from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST
from bigray.training.checkpoint import (
    KEPT_CHECKPOINTS,
    Checkpoint,
    Progress,
    load_checkpoint,
    pack_optimizer,
    pack_weights,
    save_checkpoint,
    unpack_optimizer,
    unpack_weights,
)

MakeTrial = Callable[..., TrialSpec]


@pytest.fixture
def trial(make_trial: MakeTrial) -> TrialSpec:
    return make_trial()


def _checkpoint(step: int, *, best: bool = False) -> Checkpoint:
    weights = pack_weights({"w": torch.full((2, 2), float(step))})
    progress = Progress(epoch=step // 5, batch=step % 5, step=step, best_epoch=1, best_metrics={"val_loss": 0.1 + step})
    return Checkpoint(progress, weights, pack_weights({}), pack_weights({"w": torch.ones(2, 2)}) if best else None)


def _folder(paths: RunPaths, trial: TrialSpec, step: int) -> Path:
    return Path(paths.storage.root) / paths.checkpoint(trial.trial_id, step)


def _load(paths: RunPaths, trial: TrialSpec) -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return load_checkpoint(paths, trial, warnings.append), warnings


@pytest.mark.parametrize("best", [True, False])
def test_a_checkpoint_is_read_back_as_it_was(paths: RunPaths, trial: TrialSpec, best: bool) -> None:
    checkpoint = _checkpoint(12, best=best)
    save_checkpoint(paths, trial, 1, checkpoint)

    assert _load(paths, trial) == (checkpoint, [])


def test_a_trial_without_checkpoints_starts_afresh(paths: RunPaths, trial: TrialSpec) -> None:
    assert _load(paths, trial) == (None, [])


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(paths: RunPaths, trial: TrialSpec) -> None:
    for step in (9, 100):
        save_checkpoint(paths, trial, 1, _checkpoint(step))

    assert _load(paths, trial) == (_checkpoint(100), [])


def test_only_the_newest_checkpoints_are_kept(paths: RunPaths, trial: TrialSpec) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(paths, trial, 1, _checkpoint(step))

    assert KEPT_CHECKPOINTS >= 2, "with one there is nothing to go back to"
    assert paths.checkpoint_steps(trial.trial_id) == [4, 3, 2, 1][:KEPT_CHECKPOINTS]


def test_unfinished_checkpoints_are_not_among_those_kept(paths: RunPaths, trial: TrialSpec) -> None:
    for step in (1, 2, 3):
        save_checkpoint(paths, trial, 1, _checkpoint(step))
    (_folder(paths, trial, 3) / MANIFEST).unlink()
    save_checkpoint(paths, trial, 1, _checkpoint(4))

    assert paths.checkpoint_steps(trial.trial_id) == [4, 2]


def test_a_corrupt_checkpoint_is_passed_over_with_one_warning(paths: RunPaths, trial: TrialSpec) -> None:
    for step in (1, 2):
        save_checkpoint(paths, trial, 1, _checkpoint(step))
    damaged = _folder(paths, trial, 2) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")

    checkpoint, warnings = _load(paths, trial)

    assert checkpoint == _checkpoint(1)
    (warning,) = warnings
    assert "ckpt-0000000002/model.safetensors: corrupt" in warning
    assert warning.endswith("going back to the checkpoint before it")


def test_an_unfinished_checkpoint_is_passed_over_in_silence(paths: RunPaths, trial: TrialSpec) -> None:
    for step in (1, 2):
        save_checkpoint(paths, trial, 1, _checkpoint(step))
    (_folder(paths, trial, 2) / MANIFEST).unlink()

    assert _load(paths, trial) == (_checkpoint(1), [])


def test_where_every_checkpoint_is_corrupt_the_trial_starts_afresh(paths: RunPaths, trial: TrialSpec) -> None:
    for step in (1, 2):
        save_checkpoint(paths, trial, 1, _checkpoint(step))
        (_folder(paths, trial, step) / "optimizer.safetensors").write_bytes(b"")

    checkpoint, warnings = _load(paths, trial)

    assert checkpoint is None
    assert len(warnings) == 2


def test_a_checkpoint_that_other_settings_made_is_passed_over(paths: RunPaths, make_trial: MakeTrial) -> None:
    save_checkpoint(paths, make_trial(lr=0.1), 1, _checkpoint(1))
    save_checkpoint(paths, make_trial(lr=0.2), 1, _checkpoint(2))

    assert _load(paths, make_trial(lr=0.1)) == (_checkpoint(1), [])
    assert _load(paths, make_trial(lr=0.3)) == (None, [])


def test_a_checkpoint_just_saved_outlives_unusable_ones_of_higher_steps(paths: RunPaths, trial: TrialSpec) -> None:
    """A run that had to go back, say because both newest checkpoints were corrupt, must keep what it saves now."""
    for step in (30, 40):
        save_checkpoint(paths, trial, 1, _checkpoint(step))
        (_folder(paths, trial, step) / "model.safetensors").write_bytes(b"")
    assert load_checkpoint(paths, trial, lambda _: None) is None

    save_checkpoint(paths, trial, 2, _checkpoint(10))

    assert load_checkpoint(paths, trial, lambda _: None) == _checkpoint(10)


def test_saving_a_step_again_replaces_it(paths: RunPaths, trial: TrialSpec) -> None:
    save_checkpoint(paths, trial, 1, _checkpoint(5, best=True))
    save_checkpoint(paths, trial, 2, _checkpoint(5))

    assert _load(paths, trial) == (_checkpoint(5), [])
    assert sorted(path.name for path in _folder(paths, trial, 5).iterdir()) == [
        MANIFEST,
        "model.safetensors",
        "optimizer.safetensors",
        "progress.json",
    ]


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(paths: RunPaths, trial: TrialSpec) -> None:
    save_checkpoint(paths, trial, 1, _checkpoint(5, best=True))

    for path in _folder(paths, trial, 5).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors"
            with safetensors.safe_open(path, "pt") as file:
                assert file.keys() is not None


def test_the_manifest_tells_step_attempt_and_settings(paths: RunPaths, trial: TrialSpec) -> None:
    save_checkpoint(paths, trial, 3, _checkpoint(5))
    manifest = json.loads((_folder(paths, trial, 5) / MANIFEST).read_text())

    assert (manifest["step"], manifest["attempt"], manifest["config_hash"]) == (5, 3, trial.config_hash)


def test_the_best_weights_are_the_models_own_where_this_is_the_best_epoch() -> None:
    own, older = _checkpoint(5), _checkpoint(5, best=True)

    assert own.best_weights == own.model
    assert older.best_weights != older.model


def test_the_state_of_a_trial_is_its_progress() -> None:
    progress = replace(_checkpoint(7).progress, ended="finished")
    state = progress.to_state()

    assert (state.epoch, state.step, state.ended, state.best_metrics) == (1, 7, "finished", {"val_loss": 7.1})


def test_weights_of_every_layout_and_kind_survive() -> None:
    weights = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "counter": torch.tensor(7),
        "half": torch.randn(3).to(torch.bfloat16),
    }
    read_back = unpack_weights(pack_weights(weights))

    assert set(read_back) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(read_back[name], tensor)
        assert read_back[name].dtype == tensor.dtype


def _tied() -> torch.nn.Sequential:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    return torch.nn.Sequential(first, second)


def test_tied_weights_survive() -> None:
    source, copy = _tied(), _tied()
    copy.load_state_dict(unpack_weights(pack_weights(source.state_dict())))

    assert copy[0].weight is copy[1].weight
    for name, tensor in source.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)


def test_views_of_one_tensor_survive() -> None:
    whole = torch.arange(6.0)
    read_back = unpack_weights(pack_weights({"whole": whole, "end": whole[2:], "start": whole[:3]}))

    assert torch.equal(read_back["whole"], whole)
    assert torch.equal(read_back["end"], whole[2:])
    assert torch.equal(read_back["start"], whole[:3])


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    ],
    ids=["momentum", "stateless", "adamw"],
)
def test_optimizer_state_survives(make: Callable[..., torch.optim.Optimizer]) -> None:
    def stepped() -> torch.optim.Optimizer:
        parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
        optimizer = make(parameters)
        sum((p**2).sum() for p in parameters).backward()
        return optimizer

    source, copy = stepped(), stepped()
    source.step()
    unpack_optimizer(copy, pack_optimizer(source))
    before, after = source.state_dict()["state"], copy.state_dict()["state"]

    for number, state in after.items():
        assert set(state) == {slot for slot, value in before[number].items() if value is not None}
        for slot, value in state.items():
            assert torch.equal(value, before[number][slot])
    assert copy.state_dict()["param_groups"] == source.state_dict()["param_groups"]
