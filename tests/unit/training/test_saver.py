from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bigray.errors import DiskFull, StorageError
from bigray.journal import Journal
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import Storage
from bigray.training.checkpoint import Progress, Snapshot, SnapshotBuffers, load_checkpoint
from bigray.training.checkpoint_writer import save_checkpoint
from bigray.training.saver import MAX_SNAPSHOTS, CheckpointSaver
from bigray.training.tensor_files import pack_tensors

MakeTrial = Callable[..., TrialSpec]


@pytest.fixture
def trial(make_trial: MakeTrial) -> TrialSpec:
    return make_trial()


@pytest.fixture
def saved() -> list[int]:
    return []


@pytest.fixture
def saver(paths: RunPaths, trial: TrialSpec, saved: list[int]) -> Iterator[CheckpointSaver]:
    saver = CheckpointSaver(paths, trial, 1, saved.append)
    yield saver
    saver.close()


def _take(step: int, weight: torch.Tensor | None = None) -> Callable[[SnapshotBuffers], Snapshot]:
    state = {"w": torch.full((3,), float(step)) if weight is None else weight}
    return lambda buffers: Snapshot(Progress(step=step), {"model": buffers.copy("model", state)})


class Gate:
    """Holds every write back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_open = threading.Event()
        self.arrived = threading.Event()
        write_file = Storage.write_file

        def held_back(storage: Storage, path: str, content: Any) -> Any:
            self.arrived.set()
            assert self._is_open.wait(30)
            return write_file(storage, path, content)

        monkeypatch.setattr(Storage, "write_file", held_back)

    def open(self) -> None:
        self._is_open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def _fail_writing(monkeypatch: pytest.MonkeyPatch, error: OSError, times: int, name: str = "model") -> list[str]:
    """Let the next `times` writes of files with this name fail; returns the paths of those that did."""
    failed: list[str] = []
    write_file = Storage.write_file

    def failing(storage: Storage, path: str, content: Any) -> Any:
        if f"/{name}" in path and len(failed) < times:
            failed.append(path)
            with storage._telling(path, "write"):
                raise error
        return write_file(storage, path, content)

    monkeypatch.setattr(Storage, "write_file", failing)
    return failed


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def test_what_is_submitted_is_committed_in_order(
    saver: CheckpointSaver, paths: RunPaths, trial: TrialSpec, saved: list[int]
) -> None:
    for step in (1, 2, 3):
        saver.submit(_take(step))
    saver.wait()

    assert saved == [1, 2, 3]
    checkpoint = load_checkpoint(paths, trial, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.files == {"model.safetensors": pack_tensors({"w": torch.full((3,), 3.0)})}


def test_training_goes_on_while_a_checkpoint_is_written(
    saver: CheckpointSaver, gate: Gate, paths: RunPaths, trial: TrialSpec, saved: list[int]
) -> None:
    weight = torch.ones(3)
    saver.submit(_take(1, weight))
    assert gate.arrived.wait(30)
    weight.fill_(9.0)
    assert saved == []
    gate.open()
    saver.wait()

    checkpoint = load_checkpoint(paths, trial, pytest.fail)
    assert checkpoint is not None
    (read_back,) = (checkpoint.tensors("model") or {}).values()
    assert read_back.equal(torch.ones(3))


def test_there_is_room_for_two_snapshots_and_no_more(saver: CheckpointSaver, gate: Gate, saved: list[int]) -> None:
    assert MAX_SNAPSHOTS == 2
    saver.submit(_take(1))
    assert saver.has_room()
    saver.submit(_take(2))
    assert not saver.has_room()
    gate.open()
    saver.wait()

    assert saver.has_room()
    assert saved == [1, 2]


def test_a_third_snapshot_waits_for_room(saver: CheckpointSaver, gate: Gate, saved: list[int]) -> None:
    taken: list[int] = []

    def take(buffers: SnapshotBuffers) -> Snapshot:
        taken.append(3)
        return _take(3)(buffers)

    for step in (1, 2):
        saver.submit(_take(step))
    third = threading.Thread(target=saver.submit, args=(take,))
    third.start()
    third.join(0.1)
    assert taken == []
    gate.open()
    third.join(30)
    saver.wait()

    assert saved == [1, 2, 3]


def test_two_sets_of_memory_serve_all_snapshots(saver: CheckpointSaver) -> None:
    used: set[int] = set()

    def take(buffers: SnapshotBuffers) -> Snapshot:
        used.add(id(buffers))
        return _take(1)(buffers)

    for _ in range(6):
        saver.submit(take)
    saver.wait()

    assert len(used) == 2


def test_a_write_that_failed_is_told_once_by_wait(
    saver: CheckpointSaver, monkeypatch: pytest.MonkeyPatch, saved: list[int]
) -> None:
    _fail_writing(monkeypatch, OSError(errno.EIO, "Input/output error"), times=1)
    saver.submit(_take(1))

    with pytest.raises(StorageError, match=r"ckpt-0000000001/model-\S+: cannot write: .*Input/output error"):
        saver.wait()

    saver.submit(_take(2))
    saver.wait()
    assert saved == [2]


def test_a_write_that_failed_is_told_by_the_next_submit(
    saver: CheckpointSaver, monkeypatch: pytest.MonkeyPatch, saved: list[int]
) -> None:
    _fail_writing(monkeypatch, OSError(errno.EIO, "Input/output error"), times=1)
    saver.submit(_take(1))
    saver._waiting.join()

    with pytest.raises(StorageError, match="Input/output error"):
        saver.submit(_take(2))

    assert saver.has_room()
    assert saved == []


def test_what_waits_behind_a_write_that_failed_is_given_up(
    saver: CheckpointSaver, gate: Gate, monkeypatch: pytest.MonkeyPatch, saved: list[int]
) -> None:
    _fail_writing(monkeypatch, OSError(errno.EIO, "Input/output error"), times=1, name="progress")
    saver.submit(_take(1))
    saver.submit(_take(2))
    gate.open()

    with pytest.raises(StorageError, match="ckpt-0000000001"):
        saver.wait()

    assert saved == []
    assert saver.has_room()


def test_on_a_full_disk_the_oldest_checkpoint_makes_room_for_the_new_one(
    saver: CheckpointSaver, monkeypatch: pytest.MonkeyPatch, paths: RunPaths, trial: TrialSpec, saved: list[int]
) -> None:
    for step in (1, 2):
        saver.submit(_take(step))
    saver.wait()
    failed = _fail_writing(monkeypatch, NO_SPACE, times=1)
    saver.submit(_take(3))
    saver.wait()

    assert len(failed) == 1
    assert saved == [1, 2, 3]
    assert paths.checkpoint_steps(trial.trial_id) == [3, 2]


@pytest.mark.parametrize("steps", [(1,), (1, 2)])
def test_a_disk_that_stays_full_stops_the_run_resumable(
    saver: CheckpointSaver,
    monkeypatch: pytest.MonkeyPatch,
    paths: RunPaths,
    trial: TrialSpec,
    saved: list[int],
    steps: tuple[int, ...],
) -> None:
    for step in steps:
        saver.submit(_take(step))
    saver.wait()
    _fail_writing(monkeypatch, NO_SPACE, times=2)
    saver.submit(_take(3))

    with pytest.raises(DiskFull, match=r"No space left on device; free some, then run .* again$") as error:
        saver.wait()

    assert error.value.exit_code == 4
    checkpoint = load_checkpoint(paths, trial, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.progress.step == steps[-1]
    assert saved == list(steps)


def test_an_attempt_that_was_taken_over_is_told(saver: CheckpointSaver, paths: RunPaths, saved: list[int]) -> None:
    for _ in range(2):
        Journal.open(paths)
    saver.submit(_take(1))

    with pytest.raises(StorageError, match="attempt 2 has taken over"):
        saver.wait()

    assert saved == []


def test_a_checkpoint_found_damaged_at_the_start_is_not_counted_among_those_kept(
    paths: RunPaths, trial: TrialSpec
) -> None:
    for step in (10, 20):
        save_checkpoint(paths, trial, 1, Progress(step=step), {"model.safetensors": pack_tensors({})})
    saver = CheckpointSaver(paths, trial, 2, lambda _: None)
    saver.go_on_from(10)

    saver.submit(_take(30))
    saver.wait()
    assert paths.checkpoint_steps(trial.trial_id) == [30, 10]

    saver.submit(_take(40))
    saver.wait()
    saver.close()
    assert paths.checkpoint_steps(trial.trial_id) == [40, 30]


def test_a_snapshot_that_cannot_be_taken_is_the_callers_own_error(saver: CheckpointSaver, saved: list[int]) -> None:
    def fail(_: SnapshotBuffers) -> Snapshot:
        raise RuntimeError("no memory")

    for _ in range(MAX_SNAPSHOTS + 1):
        with pytest.raises(RuntimeError, match="no memory"):
            saver.submit(fail)
    saver.submit(_take(1))
    saver.wait()

    assert saved == [1]


def test_an_error_of_the_callback_reaches_the_loop(paths: RunPaths, trial: TrialSpec) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("the switchboard is gone")

    saver = CheckpointSaver(paths, trial, 1, fail)
    saver.submit(_take(1))

    with pytest.raises(RuntimeError, match="the switchboard is gone"):
        saver.wait()
    saver.close()


def test_closing_writes_what_was_submitted_and_ends_the_thread(
    paths: RunPaths, trial: TrialSpec, saved: list[int]
) -> None:
    before = set(threading.enumerate())
    saver = CheckpointSaver(paths, trial, 1, saved.append)
    for step in (1, 2):
        saver.submit(_take(step))
    assert _savers_since(before)
    saver.close()
    saver.close()

    assert saved == [1, 2]
    assert not _savers_since(before)


def _savers_since(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in set(threading.enumerate()) - before if thread.name == "checkpoint-saver"]


def test_a_saver_that_never_saved_waits_and_closes_at_once(saver: CheckpointSaver) -> None:
    saver.wait()
    saver.close()


def test_the_checkpoint_that_a_command_began_from_stays_until_the_next_command(
    paths: RunPaths, trial: TrialSpec, saver: CheckpointSaver
) -> None:
    """Another trial may take it over meanwhile."""

    def save(*steps: int) -> list[int]:
        for step in steps:
            saver.submit(_take(step))
        saver.wait()
        return sorted(paths.checkpoint_steps(trial.trial_id))

    assert save(5, 10) == [5, 10]
    saver.keep(10)
    assert save(12, 14, 16, 20) == [10, 20]
    saver.keep(20)
    assert save(22, 24, 30) == [20, 30]
    saver.keep(None)
    assert save(32, 34) == [32, 34]


def test_more_checkpoints_are_kept_beside_it_where_so_asked(paths: RunPaths, make_trial: MakeTrial) -> None:
    trial = make_trial(keep={"last": 3})
    saver = CheckpointSaver(paths, trial, 1, lambda step: None)
    saver.submit(_take(10))
    saver.wait()
    saver.keep(10)
    for step in (12, 14, 16, 18):
        saver.submit(_take(step))
    saver.wait()
    saver.close()

    assert sorted(paths.checkpoint_steps(trial.trial_id)) == [10, 16, 18]
