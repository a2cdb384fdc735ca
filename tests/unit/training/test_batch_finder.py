from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bigray.data.dataset import TrainingArrays
from bigray.errors import StorageError, TrainingFailed
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import open_storage
from bigray.training import batch_finder
from bigray.training.batch_finder import find_micro_batch, forecast, largest_that_fits, resolve_batch_size
from bigray.training.loop import Worker
from tests.unit.training.own_process import number_printed_by

MakeTrial = Callable[..., TrialSpec]
ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))
MB = 1_000_000


class Memory:
    """Takes `fixed + slope * rows`, and remembers what was asked."""

    def __init__(self, fixed: float, slope: float) -> None:
        self.fixed, self.slope = fixed, slope
        self.tried: list[int] = []

    def __call__(self, rows: int) -> float:
        self.tried.append(rows)
        return self.fixed + self.slope * rows


@pytest.mark.parametrize("budget", [3.0, 20.0, 100.0, 1000.0, 12345.0])
@pytest.mark.parametrize(("fixed", "slope"), [(0.0, 1.0), (0.5, 0.7), (2.0, 0.01)])
def test_what_is_found_fits_and_an_eighth_more_does_not(budget: float, fixed: float, slope: float) -> None:
    memory = Memory(fixed, slope)
    found = largest_that_fits(memory, budget, most_rows=10_000_000)

    assert memory(found) <= budget
    assert memory(found + max(1, found // 8) + 1) > budget


def test_no_size_is_tried_that_the_forecast_says_will_not_fit() -> None:
    memory = Memory(fixed=10.0, slope=1.0)
    largest_that_fits(memory, 1000.0, most_rows=1 << 20)

    assert max(memory.tried) + 10.0 <= 1000.0


def test_all_rows_are_taken_where_they_fit() -> None:
    assert largest_that_fits(Memory(0.0, 1.0), 1e9, most_rows=77) == 77


@pytest.mark.parametrize("most_rows", [1, 2, 3])
def test_few_rows_are_no_special_case(most_rows: int) -> None:
    assert largest_that_fits(Memory(0.0, 1.0), 1e9, most_rows) == most_rows


def test_nothing_is_found_where_the_first_size_does_not_fit() -> None:
    assert largest_that_fits(Memory(100.0, 1.0), 50.0, most_rows=64) == 0


def test_running_out_of_memory_counts_as_not_fitting() -> None:
    """More than the forecast says: at 40 rows the device refuses, whatever the line through smaller sizes says."""

    def peak(rows: int) -> float:
        return math.inf if rows >= 40 else 1.0

    assert 36 <= largest_that_fits(peak, 1000.0, most_rows=1 << 20) < 40


def test_ranks_with_different_memory_try_the_same_sizes_and_agree_on_the_smaller() -> None:
    memories, found, answers = [Memory(0.0, 1.0), Memory(2.0, 5.0)], [0, 0], [False, False]
    meeting = threading.Barrier(2)

    def search(rank: int) -> None:
        def all_agree(fits: bool) -> bool:
            answers[rank] = fits
            meeting.wait()
            together = all(answers)
            meeting.wait()
            return together

        found[rank] = largest_that_fits(memories[rank], 102.0, 1 << 20, all_agree)

    threads = [threading.Thread(target=search, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert memories[0].tried == memories[1].tried
    assert found[0] == found[1]
    assert 18 <= found[0] <= 20


def test_a_forecast_is_a_line_through_the_last_two_sizes() -> None:
    assert forecast({}, 8) == -math.inf
    assert forecast({4: 10.0}, 8) == 10.0
    assert forecast({2: 7.0, 4: 10.0, 8: 14.0}, 16) == 22.0
    assert forecast({4: 10.0, 8: 9.0}, 16) == 9.0


def found_in_rows_of_4_kb(trial: TrialSpec, budget_bytes: int) -> int:
    """A step's memory is mostly its rows."""
    return number_printed_by(f"""
import numpy as np
import torch
from bigray.data.dataset import TrainingArrays
from bigray.specs import TrialSpec
from bigray.training.batch_finder import find_micro_batch
from bigray.training.loop import Worker

torch.set_num_threads(1)
x, y = np.ones((20_000, 1000), np.float32), np.zeros(20_000, np.int64)
trial = TrialSpec.model_validate_json({trial.model_dump_json()!r})
alone = Worker(rank=0, world_size=1, device=torch.device("cpu"))
print(find_micro_batch(trial, TrainingArrays(x, y, x[:2], y[:2]), 3, alone, budget_bytes={budget_bytes}))
""")


def test_a_real_step_is_measured_and_a_larger_budget_takes_more_rows(make_trial: MakeTrial) -> None:
    trial = make_trial(params={"hidden": [200]}, global_batch_size="auto")
    small, large = (found_in_rows_of_4_kb(trial, budget) for budget in (20 * MB, 80 * MB))

    # a row takes 4 kB as input and 0.8 kB in each layer and gradient
    assert 500 < small < 20 * MB // 4000
    assert 2 * small < large < 80 * MB // 4000


def test_memory_that_somebody_else_frees_during_a_step_hides_nothing_of_it() -> None:
    meter = batch_finder._CpuMeter(ALONE.device, workers_here=1)
    others: list[torch.Tensor] = []

    def step() -> None:
        others.clear()
        torch.ones(30 * MB, dtype=torch.uint8)

    meter.peak_bytes(step)  # what is loaded at the first step would count here
    others.append(torch.ones(60 * MB, dtype=torch.uint8))

    assert meter.peak_bytes(step) >= 30 * MB


def test_the_search_draws_no_random_numbers_of_the_trial(make_trial: MakeTrial, blobs: TrainingArrays) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    find_micro_batch(make_trial(params={"hidden": [8], "dropout": 0.5}), blobs, 3, ALONE)

    assert torch.equal(torch.rand(3), expected)


def test_a_model_for_which_no_batch_fits_is_named_with_need_and_budget(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    with pytest.raises(TrainingFailed, match=r"2 rows of model 'net' need .* on rank 0, whose budget is 0 B"):
        find_micro_batch(make_trial(params={"hidden": [4000, 500]}), blobs, 3, ALONE, budget_bytes=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"precision": "bf16", "ema_decay": 0.9},
        {"optimizer": "sgd", "momentum": 0.9, "class_weights": "balanced"},
    ],
)
def test_the_copy_computes_with_the_trials_settings(
    make_trial: MakeTrial, blobs: TrainingArrays, settings: dict[str, Any]
) -> None:
    assert find_micro_batch(make_trial(**settings), blobs, 3, ALONE, budget_bytes=500 * MB) == 70


def test_a_workers_budget_is_its_part_of_half_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = batch_finder.host_memory()
    monkeypatch.setattr(batch_finder, "host_memory", lambda: memory)

    meter = batch_finder._CpuMeter(torch.device("cpu"), workers_here=4)

    assert meter.budget_bytes() == memory.free_bytes / 8


class Search:
    """Takes the place of the search and counts how often it is needed."""

    def __init__(self, found: int) -> None:
        self.found, self.runs = found, 0

    def __call__(self, *_: object, **__: object) -> int:
        self.runs += 1
        return self.found


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    search = Search(found=24)
    monkeypatch.setattr(batch_finder, "find_micro_batch", search)
    return search


def resolve(trial: TrialSpec, data: TrainingArrays, paths: RunPaths, worker: Worker = ALONE) -> tuple[Any, Any]:
    training = resolve_batch_size(trial, data, 3, worker, paths, broadcast=lambda make: make()).training
    return training.global_batch_size, training.micro_batch_size


def test_a_trial_with_a_number_is_left_alone(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths, search: Search
) -> None:
    trial = make_trial(global_batch_size=16)

    assert resolve_batch_size(trial, blobs, 3, ALONE, paths, lambda make: make()) is trial
    assert search.runs == 0


def test_what_was_found_takes_the_place_of_auto(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths, search: Search
) -> None:
    assert resolve(make_trial(global_batch_size="auto"), blobs, paths) == (24, 24)


def test_a_trial_that_goes_on_has_the_numbers_it_began_with(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths, search: Search
) -> None:
    trial = make_trial(global_batch_size="auto")
    before = resolve(trial, blobs, paths)
    for name in paths.shared.list_names("micro_batches"):
        paths.shared.delete_file(f"micro_batches/{name}")
    search.found = 99

    assert resolve(trial, blobs, paths, Worker(0, 3, torch.device("cpu"))) == before


def test_trials_of_one_model_search_once_also_in_another_run(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths, search: Search
) -> None:
    first, second = make_trial(global_batch_size="auto"), make_trial(global_batch_size="auto", lr=0.5)
    elsewhere = RunPaths(open_storage(paths.storage.root.rpartition("/")[0] + "/other-run"), "other-run")
    resolve(first, blobs, paths)
    resolve(second.model_copy(update={"trial_id": "1-net"}), blobs, paths)
    resolve(first, blobs, elsewhere)

    assert search.runs == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"optimizer": "sgd"},
        {"gradient_checkpointing": True},
        {"params": {"hidden": [9]}},
        {"micro_batch_size": 4},
    ],
)
def test_what_changes_the_memory_of_a_step_is_searched_anew(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths, search: Search, changes: dict[str, Any]
) -> None:
    resolve(make_trial(global_batch_size="auto"), blobs, paths)
    resolve(make_trial(global_batch_size="auto", **changes).model_copy(update={"trial_id": "1-net"}), blobs, paths)

    assert search.runs == 2


def test_a_damaged_cache_is_made_anew_and_a_damaged_record_is_refused(
    make_trial: MakeTrial, blobs: TrainingArrays, paths: RunPaths, search: Search
) -> None:
    trial = make_trial(global_batch_size="auto")
    resolve(trial, blobs, paths)
    (name,) = paths.shared.list_names("micro_batches")
    paths.shared.write_bytes(f"micro_batches/{name}", b"{")
    resolve(trial.model_copy(update={"trial_id": "1-net"}), blobs, paths)

    assert search.runs == 2
    assert json.loads(paths.shared.read_bytes(f"micro_batches/{name}"))["micro_batch_size"] == 24

    paths.storage.write_bytes(paths.batch_size_file(trial.trial_id), b"{")
    with pytest.raises(StorageError, match=r"0-net/batch_size\.json: expected the trial's batch sizes, found"):
        resolve(trial, blobs, paths)
