"""A trial that begins from another's weights, as population based training has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bigray.data.dataset import TrainingArrays
from bigray.errors import TrainingFailed
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.training.checkpoint import (
    Checkpoint,
    Progress,
    SnapshotBuffers,
    committed_steps,
    load_epoch_end,
    read_checkpoint,
    weights_sha256,
)
from bigray.training.checkpoint_writer import save_snapshot
from bigray.training.loop import TrialTraining
from bigray.training.tensor_files import unpack_tensors
from bigray.training.trial_hooks import taken_over
from tests.unit.training.test_loop import _begin

MakeTrial = Callable[..., TrialSpec]


def _named(trial: TrialSpec, name: str) -> TrialSpec:
    return trial.model_copy(update={"trial_id": name})


def _source(paths: RunPaths, trial: TrialSpec, data: TrainingArrays, epochs: int) -> TrialTraining:
    """A trial trained so far, with a checkpoint on storage after each epoch."""
    training = _begin(trial, data)
    for epoch in range(1, epochs + 1):
        training.train_to(epoch)
        save_snapshot(paths, trial, 1, training.snapshot(SnapshotBuffers()))
    return training


def _take_over(found: Checkpoint, trial: TrialSpec, data: TrainingArrays) -> TrialTraining:
    """As the worker does it."""
    from dataclasses import replace

    training = _begin(trial, data)
    training.restore(replace(found, progress=taken_over(found.progress, trial, training.steps_per_epoch)))
    return training


def test_the_weights_in_the_module_are_those_of_the_sources_file(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths
) -> None:
    source = _named(make_trial(epochs=6, optimizer="adamw"), "source")
    _source(paths, source, blobs, 2)
    trial = _named(make_trial(epochs=6, optimizer="adamw", lr=0.001), "taker")
    training = _take_over(load_epoch_end(paths, source, 2), trial, blobs)

    file = read_checkpoint(paths, source, committed_steps(paths, "source")[0]).files["model.safetensors"]
    assert training.weights_sha256() == weights_sha256(unpack_tensors(file))
    assert training.weights_sha256() != _begin(trial, blobs).weights_sha256()
    before = training.weights_sha256()
    training.train_to(3)
    assert training.weights_sha256() != before


def test_it_goes_on_with_its_own_settings_and_the_sources_optimizer_state(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths
) -> None:
    """By hand: the source's own next epoch, with the rate and the decay changed in its optimizer."""
    settings: dict[str, Any] = {"epochs": 6, "optimizer": "sgd", "momentum": 0.9}
    source = _named(make_trial(lr=0.05, **settings), "source")
    expected = _source(paths, source, blobs, 2)
    trial = _named(make_trial(lr=0.01, weight_decay=0.1, **settings), "taker")
    training = _take_over(load_epoch_end(paths, source, 2), trial, blobs)
    training.train_to(3)

    for group in expected._replica._optimizer.param_groups:
        group["initial_lr"], group["weight_decay"] = 0.01, 0.1
    expected.train_to(3)
    for weight, other in zip(training.module.parameters(), expected.module.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-7)
    assert training.progress == expected.progress


def test_its_past_is_the_sources(make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths) -> None:
    source = _named(make_trial(epochs=6), "source")
    past = _source(paths, source, blobs, 3).progress
    training = _take_over(load_epoch_end(paths, source, 3), _named(make_trial(epochs=6, lr=0.01), "taker"), blobs)

    assert training.progress == past


def test_with_another_batch_size_its_steps_are_counted_as_its_own(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths
) -> None:
    """And the best weights stay those of the source's best epoch, also where steps happen to have the same number."""
    source = _named(make_trial(epochs=6), "source")
    past = _source(paths, source, blobs, 2).progress
    trial = _named(make_trial(epochs=6, global_batch_size=35, lr=1e-30), "taker")
    training = _take_over(load_epoch_end(paths, source, 2), trial, blobs)

    assert (past.step, training.steps_per_epoch) == (10, 2)
    assert (training.progress.step, training.progress.best_step) == (4, 2 * past.best_epoch)
    assert training.progress.improvements == past.improvements
    training.train_to(6)
    assert training.progress.step == 12
    snapshot = training.snapshot(SnapshotBuffers())
    assert "best" in snapshot.tensors or snapshot.progress.best_step == snapshot.progress.step


@pytest.mark.parametrize(("ended", "now"), [("stopped early", None), (None, None), ("finished", None)])
def test_it_is_not_over_because_the_source_is(make_trial: MakeTrial, ended: str | None, now: str | None) -> None:
    moved = taken_over(Progress(epoch=2, step=10, ended=ended, lr_scale=0.25, rollbacks=2), make_trial(), 5)
    assert (moved.ended, moved.lr_scale, moved.rollbacks) == (now, 1.0, 0)


def test_it_is_over_where_the_source_has_trained_all_of_its_epochs(make_trial: MakeTrial) -> None:
    assert taken_over(Progress(epoch=4, step=20), make_trial(epochs=4), 5).ended == "finished"


def test_a_source_that_has_gone_on_is_named_with_what_there_is(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths
) -> None:
    source = _named(make_trial(epochs=6), "source")
    _source(paths, source, blobs, 4)

    assert load_epoch_end(paths, source, 3).progress.epoch == 3
    with pytest.raises(TrainingFailed, match=r"source: no checkpoint of the end of epoch 2 .* epochs 4, 3"):
        load_epoch_end(paths, source, 2)
    with pytest.raises(TrainingFailed, match="none"):
        load_epoch_end(paths, _named(source, "never-trained"), 2)


def test_a_hash_is_of_names_and_values() -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3, 2).t()}
    same = {"a": torch.zeros(3, 2).t().contiguous(), "b": torch.ones(2)}

    assert weights_sha256(tensors) == weights_sha256(same)
    assert weights_sha256({"a": torch.ones(2)}) != weights_sha256({"c": torch.ones(2)})
    assert weights_sha256({"a": torch.tensor(math.pi)}) != weights_sha256({"a": torch.tensor(math.e)})
