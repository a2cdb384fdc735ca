"""A forward pass that does not fit: how it is told, and that half of it at a time gives the same trial."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bigray.data.dataset import TrainingArrays
from bigray.errors import OutOfMemory, TrainingFailed
from bigray.specs import TrialSpec
from bigray.training.loop import TrialTraining
from bigray.training.out_of_memory import halved, is_out_of_memory
from tests.loop_hooks import RecordingHooks
from tests.unit.training.test_loop import _begin, _checkpoint, _resume, _train

MakeTrial = Callable[..., TrialSpec]
UserModule = Callable[[str], str]

GREEDY = """
    import torch
    from torch import nn

    class Greedy(nn.Linear):
        def forward(self, x):
            if self.training and len(x) > {limit}:
                {fail}
            return super().forward(x)

    def make(shape, outputs):
        return Greedy(shape[0], outputs)
"""
REAL = "torch.empty(2 ** 60, dtype=torch.uint8)"


def _allocation_error() -> Exception:
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has an exabyte")


NO_MEMORY = {"python": MemoryError(), "gpu": torch.OutOfMemoryError("no"), "cpu": _allocation_error()}


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_no_memory_is_known_for_what_it_is(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("can't allocate memory"), KeyError("x")])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("fail", [REAL, "raise MemoryError"])
def test_the_rows_of_the_largest_pass_are_told(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule, fail: str
) -> None:
    name = user_module(GREEDY.format(limit=8, fail=fail))
    with pytest.raises(OutOfMemory, match="up to 16 rows") as caught:
        _train(make_trial(f"{name}:make", {}), blobs)

    assert caught.value.rows == 16
    told = pickle.loads(pickle.dumps(caught.value))
    assert (told.rows, str(told)) == (16, str(caught.value))
    assert isinstance(told, TrainingFailed)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({"micro_batch_size": 6}, 6), ({"exact": True, "logical_shards": 4}, 4), ({"global_batch_size": 500}, 70)],
)
def test_the_largest_pass_follows_the_settings(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule, settings: dict[str, Any], rows: int
) -> None:
    name = user_module(GREEDY.format(limit=3, fail="raise MemoryError"))
    with pytest.raises(OutOfMemory) as caught:
        _train(make_trial(f"{name}:make", {}, **settings), blobs)
    assert caught.value.rows == rows


def test_the_halved_trial_fits_and_the_process_holds_nothing_of_the_first(
    make_trial: MakeTrial, blobs: TrainingArrays, user_module: UserModule
) -> None:
    name = user_module(GREEDY.format(limit=8, fail=REAL))
    trial = make_trial(f"{name}:make", {})
    training: TrialTraining | None = _begin(trial, blobs)
    assert training is not None
    module = weakref.ref(training.module)
    rows = 0
    try:
        training.train_to(4)
    except OutOfMemory as error:
        rows = error.rows
    training = None
    gc.collect()

    assert module() is None
    second = halved(trial, rows)
    assert second is not None
    assert _train(second, blobs)[0].progress.ended == "finished"


@pytest.mark.parametrize(("rows", "micro"), [(16, 8), (7, 4), (2, 1)])
def test_half_the_rows_are_rounded_up_and_the_rest_of_the_trial_is_the_same(
    make_trial: MakeTrial, rows: int, micro: int
) -> None:
    trial = make_trial()
    second = halved(trial, rows)

    assert second is not None
    assert second.training.micro_batch_size == micro
    assert second.config_hash == trial.config_hash
    assert second.training.model_copy(update={"micro_batch_size": None}) == trial.training


def test_a_trial_is_never_split_below_one_row(make_trial: MakeTrial) -> None:
    assert halved(make_trial(), 1) is None
    assert halved(make_trial(micro_batch_size=1), 1) is None


def test_a_trial_whose_job_splits_its_batches_already_is_split_further(make_trial: MakeTrial) -> None:
    second = halved(make_trial(micro_batch_size=8), 8)

    assert second is not None
    assert second.training.micro_batch_size == 4


def _curve(reports: list[dict[str, Any]]) -> list[float]:
    return [value for report in reports for value in (report["train_loss"], report["metrics"]["val_loss"])]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_curve_of_a_split_trial_is_that_of_the_whole_one(
    make_trial: MakeTrial, blobs: TrainingArrays, optimizer: str
) -> None:
    trial = make_trial(optimizer=optimizer, lr=0.01)
    split = halved(trial, 16)
    assert split is not None

    assert _curve(_train(split, blobs)[1]) == pytest.approx(_curve(_train(trial, blobs)[1]), abs=1e-5)


def test_a_split_trial_goes_on_from_a_checkpoint_of_the_whole_one(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    trial = make_trial(optimizer="adamw", lr=0.01)
    split = halved(trial, 16)
    assert split is not None
    _, whole = _train(trial, blobs)
    first = _begin(trial, blobs, RecordingHooks())
    first.train_to(2)
    _, hooks = _resume(split, blobs, _checkpoint(first))

    assert _curve(hooks.reports) == pytest.approx(_curve(whole[2:]), abs=1e-5)
