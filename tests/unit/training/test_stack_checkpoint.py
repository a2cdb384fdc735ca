"""A stack on storage, and its lanes read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

from bigray.data.dataset import TrainingArrays
from bigray.errors import CorruptFile, StorageError
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, Storage
from bigray.training.checkpoint import load_checkpoint
from bigray.training.commands import Wish
from bigray.training.loop import TrialTraining, Worker
from bigray.training.stack import StackedTraining
from bigray.training.stack_checkpoint import read_lane, read_lanes, save_lane
from tests.loop_hooks import RecordingHooks
from tests.stacks import save_stack

MakeTrial = Callable[..., TrialSpec]
ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))
NAME = "s1"


class _Hooks:
    def tick(self, phase: str) -> None: ...

    def exchange(self, step: int) -> Wish:
        return Wish()

    def on_epoch(self, lane: int, report: dict[str, Any]) -> None: ...


@pytest.fixture
def trials(make_trial: MakeTrial) -> list[TrialSpec]:
    """Of different rates, the last of which diverges at once."""
    rates = (0.01, 0.3, 1e38)
    return [
        make_trial(lr=rate, epochs=6, optimizer="sgd", momentum=0.9).model_copy(update={"trial_id": f"{number}-net"})
        for number, rate in enumerate(rates)
    ]


def _trained(trials: list[TrialSpec], data: TrainingArrays, until: int = 3) -> StackedTraining:
    stack = StackedTraining(trials, data, 3, ALONE, _Hooks())
    stack.train_to(until)
    return stack


def test_a_lane_that_was_read_back_goes_on_alone_as_if_it_had_always_been(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs))
    for trial in trials[:2]:
        handed_over = TrialTraining(trial, blobs, 3, ALONE, RecordingHooks())
        handed_over.restore(read_lane(paths, NAME, trial))
        handed_over.train_to(6)
        expected = TrialTraining(trial, blobs, 3, ALONE, RecordingHooks())
        expected.train_to(6)

        assert handed_over.progress.best_epoch == expected.progress.best_epoch
        for name, tensor in expected.module.state_dict().items():
            torch.testing.assert_close(handed_over.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)
        assert (handed_over.best_weights is None) == (expected.best_weights is None)
        for name, tensor in (expected.best_weights or {}).items():
            assert handed_over.best_weights is not None
            torch.testing.assert_close(handed_over.best_weights[name], tensor, rtol=1e-5, atol=1e-5)


def test_all_of_a_lane_comes_back_bit_for_bit(paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays) -> None:
    stack = _trained(trials, blobs)
    save_stack(paths, NAME, 0, 1, stack)
    for lane, trial in enumerate(trials):
        checkpoint, state = read_lane(paths, NAME, trial), stack.lane_state(lane)
        assert checkpoint.progress == stack.progresses()[lane]
        assert state is not None
        for stem in ("model", "optimizer", "best"):
            found, expected = checkpoint.tensors(stem) or {}, state.get(stem, {})
            assert set(found) == set(expected)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_stack_goes_on_from_its_own_lanes_bit_for_bit(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs, 2))
    restored = StackedTraining(trials, blobs, 3, ALONE, _Hooks())
    restored.restore(read_lanes(paths, [(NAME, trial) for trial in trials]))
    restored.train_to(6)
    expected = _trained(trials, blobs, 6)

    assert restored.progresses() == expected.progresses()
    for lane in range(3):
        mine, theirs = restored.lane_state(lane), expected.lane_state(lane)
        assert mine is not None
        assert theirs is not None
        assert all(torch.equal(mine["model"][name], tensor) for name, tensor in theirs["model"].items())


def test_a_lane_is_found_whichever_rank_had_it(paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays) -> None:
    for rank in range(2):
        save_stack(paths, NAME, rank, 1, _trained(trials[rank::2], blobs))
    lanes = read_lanes(paths, [(NAME, trial) for trial in trials])
    assert [lane.place.rpartition("/")[2] for lane in lanes] == ["0-of-1", "1-of-1", "0-of-1"]
    assert lanes[2].progress.ended == "diverged"


def test_of_saves_by_different_numbers_of_ranks_the_furthest_counts(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    save_stack(paths, NAME, 1, 1, _trained(trials[:2], blobs, 1))
    save_stack(paths, NAME, 0, 1, _trained(trials[:2], blobs, 2))
    assert read_lane(paths, NAME, trials[0]).progress.epoch == 2


def test_a_lane_can_be_kept_as_the_trials_own_checkpoint(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs))
    lane = read_lane(paths, NAME, trials[0])
    save_lane(paths, trials[0], 1, lane)
    kept = load_checkpoint(paths, trials[0], pytest.fail)
    assert kept is not None
    assert (kept.progress, dict(kept.files)) == (lane.progress, dict(lane.files))


def test_a_lane_of_which_only_the_record_is_left_stays_so(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs))
    lanes = read_lanes(paths, [(NAME, trial) for trial in trials])
    stack = StackedTraining(trials, blobs, 3, ALONE, _Hooks())
    stack.restore([lanes[0], lanes[1], replace(lanes[2], files={}, is_record=True)])
    save_stack(paths, "s2", 0, 1, stack)

    record = read_lane(paths, "s2", trials[2])
    assert (record.progress, record.is_record) == (lanes[2].progress, True)
    with pytest.raises(StorageError, match="only the record"):
        save_lane(paths, trials[2], 1, record)


def test_a_stack_that_was_saved_again_replaces_the_one_before(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    stack = _trained(trials, blobs, 1)
    save_stack(paths, NAME, 0, 1, stack)
    before = set(paths.storage.list_names(f"{paths.stack(NAME)}/0-of-1"))
    stack.train_to(2)
    save_stack(paths, NAME, 0, 1, stack)
    after = set(paths.storage.list_names(f"{paths.stack(NAME)}/0-of-1"))
    assert before & after == {MANIFEST}
    assert read_lane(paths, NAME, trials[0]).progress.epoch == 2


class _Dies(Exception):
    pass


def _dying(paths: RunPaths, writes: int) -> Iterator[RunPaths]:
    """The same storage, whose process dies before write number `writes`."""
    left = iter(range(writes))

    class Dying(Storage):
        def write_file(self, path: str, content: Any) -> Any:
            if next(left, None) is None:
                raise _Dies
            return super().write_file(path, content)

    storage = paths.storage
    yield RunPaths(Dying(storage.filesystem, storage.root, storage.uri), paths.run_id)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_process_that_dies_between_files_leaves_no_half_a_stack(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays, writes: int
) -> None:
    stack = _trained(trials, blobs, 1)
    (dying,) = _dying(paths, writes)
    with pytest.raises(_Dies):
        save_stack(dying, NAME, 0, 1, _trained(trials, blobs, 2))
    with pytest.raises(StorageError, match="no committed lane of trial '0-net'"):
        read_lane(paths, NAME, trials[0])

    save_stack(paths, NAME, 0, 1, stack)
    (dying,) = _dying(paths, writes)
    with pytest.raises(_Dies):
        save_stack(dying, NAME, 0, 1, _trained(trials, blobs, 2))
    assert read_lane(paths, NAME, trials[0]).progress.epoch == 1


def test_a_stack_that_is_replaced_while_it_is_read_is_read_as_it_is_then(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    stack = _trained(trials, blobs, 1)
    save_stack(paths, NAME, 0, 1, stack)
    stack.train_to(2)

    class Replaced(Storage):
        def read_bytes(self, path: str, *arguments: Any) -> bytes:
            if "safetensors" in path and stack.progresses()[0].epoch == 2:
                save_stack(paths, NAME, 0, 1, stack)
                stack.train_to(3)
            return super().read_bytes(path, *arguments)

    storage = paths.storage
    reading = RunPaths(Replaced(storage.filesystem, storage.root, storage.uri), paths.run_id)
    assert read_lane(reading, NAME, trials[0]).progress.epoch == 2
    assert stack.progresses()[0].epoch == 3, "it was replaced on the way"


def test_another_number_of_ranks_replaces_nothing(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs, 2))
    of_two = StackedTraining(trials[::2], blobs, 3, Worker(0, 2, ALONE.device), _Hooks())
    of_two.train_to(3)
    save_stack(paths, NAME, 0, 1, of_two)

    assert [lane.progress.epoch for lane in read_lanes(paths, [(NAME, trial) for trial in trials[:2]])] == [3, 2]


def _file(paths: RunPaths, name: str) -> Path:
    (found,) = Path(paths.storage.root).glob(f"{paths.stack(NAME)}/0-of-1/{name}")
    return found


@pytest.mark.parametrize("file_name", ["lanes-*.safetensors", "lanes-*.json"])
def test_a_damaged_file_is_refused(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays, file_name: str
) -> None:
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs, 5))
    file = _file(paths, file_name)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFile, match="expected sha256"):
        read_lane(paths, NAME, trials[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "expected format 1 or lower, found 9"),
        ({"lanes": [{"trial_id": "0-net"}]}, "not a stack's manifest"),
        ({"lanes": 3}, "not a stack's manifest"),
        ({"lanes": []}, "no committed lane"),
    ],
)
def test_a_manifest_that_is_not_a_stacks_is_refused(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays, change: dict[str, Any], message: str
) -> None:
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs, 1))
    manifest = _file(paths, MANIFEST)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(StorageError, match=message):
        read_lane(paths, NAME, trials[0])


def test_a_lane_of_other_settings_is_refused(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays, make_trial: MakeTrial
) -> None:
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs, 1))
    other = make_trial(lr=0.02).model_copy(update={"trial_id": "0-net"})
    with pytest.raises(StorageError, match="of another model or settings"):
        read_lane(paths, NAME, other)


def test_a_stack_that_is_not_there_is_named(paths: RunPaths, trials: list[TrialSpec]) -> None:
    with pytest.raises(StorageError, match="stacks/gone: no committed lane of trial '0-net'"):
        read_lane(paths, "gone", trials[0])


def test_who_was_taken_over_from_commits_no_stack(
    paths: RunPaths, trials: list[TrialSpec], blobs: TrainingArrays
) -> None:
    paths.storage.write_bytes(paths.journal_file(2), b"")
    with pytest.raises(StorageError, match="attempt 2 has taken over"):
        save_stack(paths, NAME, 0, 1, _trained(trials, blobs, 1))
    assert paths.storage.list_names(paths.stack(NAME)) == []


def test_a_stack_can_be_on_an_object_store(trials: list[TrialSpec], blobs: TrainingArrays) -> None:
    filesystem = fs._MockFileSystem()
    paths = RunPaths(Storage(filesystem, "bucket/run", "mock://bucket/run"), "run")
    filesystem.create_dir("bucket/run/stacks/s1/0-of-1")  # object stores need no folders
    save_stack(paths, NAME, 0, 1, _trained(trials, blobs, 1))
    assert read_lane(paths, NAME, trials[1]).progress.epoch == 1
