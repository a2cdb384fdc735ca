from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from pyarrow import fs

from bigray.errors import DiskFull, StorageError
from bigray.journal import Journal
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, Storage, read_folder
from bigray.training.checkpoint import PROGRESS, Progress, Snapshot, load_checkpoint, load_to_go_on
from bigray.training.checkpoint_writer import free_oldest, remove_dead, save_checkpoint, save_snapshot, trim_trial
from bigray.training.tensor_files import pack_tensors

MakeTrial = Callable[..., TrialSpec]


@pytest.fixture
def trial(make_trial: MakeTrial) -> TrialSpec:
    return make_trial()


class ObjectStore:
    """Local files as an object store shows them: no folders to make, and nothing of a file before it is closed."""

    def __init__(self) -> None:
        self._local = fs.LocalFileSystem()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._local, name)

    def open_output_stream(self, path: str) -> Any:
        self._local.create_dir(str(Path(path).parent))
        return self._local.open_output_stream(path)


@pytest.fixture
def remote(paths: RunPaths) -> RunPaths:
    return RunPaths(Storage(ObjectStore(), paths.storage.root, "s3://bucket/run"), "run")


def _files(step: int) -> dict[str, bytes]:
    return {"model.safetensors": pack_tensors({"w": torch.full((2, 2), float(step))})}


def _save(paths: RunPaths, trial: TrialSpec, *steps: int, attempt: int = 1) -> None:
    for step in steps:
        save_checkpoint(paths, trial, attempt, Progress(step=step), _files(step))


def _folder(paths: RunPaths, trial: TrialSpec, step: int) -> Path:
    return Path(paths.storage.root) / paths.checkpoint(trial.trial_id, step)


def _loaded_step(paths: RunPaths, trial: TrialSpec) -> int | None:
    checkpoint = load_checkpoint(paths, trial, lambda _: None)
    return None if checkpoint is None else checkpoint.progress.step


def _damage(paths: RunPaths, trial: TrialSpec, step: int) -> None:
    next(_folder(paths, trial, step).glob("model-*")).write_bytes(b"")


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 5)

    assert {path.suffix for path in _folder(paths, trial, 5).iterdir()} == {".json", ".safetensors"}
    for path in _folder(paths, trial, 5).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with safetensors.safe_open(path, "pt") as file:
                assert list(file.keys()) == ["w"]


def test_the_manifest_tells_format_step_attempt_and_settings(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 5, attempt=3)
    manifest = read_folder(paths.storage, paths.checkpoint(trial.trial_id, 5)).manifest

    assert (manifest["format"], manifest["step"], manifest["attempt"]) == (2, 5, 3)
    assert manifest["config_hash"] == trial.config_hash


def test_the_tensors_of_a_snapshot_become_files(paths: RunPaths, trial: TrialSpec) -> None:
    tensors = {"model": {"w": torch.ones(2)}, "best": {"w": torch.zeros(2)}}
    save_snapshot(paths, trial, 1, Snapshot(Progress(step=5), tensors))

    checkpoint = load_checkpoint(paths, trial, pytest.fail)

    assert checkpoint is not None
    assert checkpoint.files == {f"{stem}.safetensors": pack_tensors(state) for stem, state in tensors.items()}


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_only_the_newest_checkpoints_are_kept(paths: RunPaths, make_trial: MakeTrial, keep_last: int) -> None:
    trial = make_trial(keep={"last": keep_last})
    _save(paths, trial, 1, 2, 3, 4)

    assert paths.checkpoint_steps(trial.trial_id) == [4, 3, 2, 1][:keep_last]


def test_what_dead_writers_left_is_gone_after_the_next_save(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 1, 2)
    unfinished = _folder(paths, trial, 7)
    shutil.copytree(_folder(paths, trial, 2), unfinished)
    (unfinished / MANIFEST).unlink()
    (unfinished / ".model-0001-aa.safetensors.99.tmp").write_bytes(b"half")
    (_folder(paths, trial, 2) / f".{MANIFEST}.99.tmp").write_bytes(b"half")
    (_folder(paths, trial, 2) / "model-0001-bb.safetensors").write_bytes(b"never committed")

    _save(paths, trial, 3)

    assert paths.checkpoint_steps(trial.trial_id) == [3, 2]
    assert len(list(_folder(paths, trial, 2).iterdir())) == 3
    assert _loaded_step(paths, trial) == 3


def test_unfinished_checkpoints_are_not_among_those_kept(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 1, 2, 3)
    (_folder(paths, trial, 3) / MANIFEST).unlink()
    _save(paths, trial, 4)

    assert paths.checkpoint_steps(trial.trial_id) == [4, 2]


def test_tidying_leaves_a_damaged_checkpoint_to_who_wants_to_look(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 1)
    (_folder(paths, trial, 1) / MANIFEST).write_text("half a mani")
    before = sorted(_folder(paths, trial, 1).iterdir())

    remove_dead(paths, trial.trial_id)

    assert sorted(_folder(paths, trial, 1).iterdir()) == before


def test_a_checkpoint_just_saved_outlives_unusable_ones_of_higher_steps(paths: RunPaths, trial: TrialSpec) -> None:
    """A run that had to go back, say because both newest checkpoints were corrupt, must keep what it saves now."""
    _save(paths, trial, 30, 40)
    for step in (30, 40):
        _damage(paths, trial, step)

    _save(paths, trial, 10, attempt=2)

    assert _loaded_step(paths, trial) == 10
    assert paths.checkpoint_steps(trial.trial_id) == [10]


def test_a_late_save_of_the_same_attempt_does_not_delete_what_is_further_on(paths: RunPaths, trial: TrialSpec) -> None:
    """A worker that was replaced, and cut off from whoever wanted to end it, may still be writing."""
    _save(paths, trial, 30, 40)

    _save(paths, trial, 10)

    assert paths.checkpoint_steps(trial.trial_id) == [40, 30, 10]


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(paths: RunPaths, make_trial: MakeTrial) -> None:
    trial = make_trial(keep={"last": 2})
    _save(paths, trial, 1, 2)
    _damage(paths, trial, 2)

    save_checkpoint(paths, trial, 2, Progress(step=3), _files(3), stale=[2])

    assert paths.checkpoint_steps(trial.trial_id) == [3, 1]


def test_saving_a_step_again_replaces_it_and_leaves_nothing_of_the_first(paths: RunPaths, trial: TrialSpec) -> None:
    files = {**_files(5), "best.safetensors": pack_tensors({})}
    save_checkpoint(paths, trial, 1, Progress(step=5), files)
    save_checkpoint(paths, trial, 1, Progress(step=5, epoch=1), _files(5))

    checkpoint = load_checkpoint(paths, trial, pytest.fail)

    assert checkpoint is not None
    assert (checkpoint.progress.epoch, checkpoint.files) == (1, _files(5))
    assert len(list(_folder(paths, trial, 5).iterdir())) == 3


def test_a_step_saved_again_is_there_all_the_while(
    paths: RunPaths, trial: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timed checkpoint of an epoch's last step is saved again after validation: it must not be lost in between."""
    _save(paths, trial, 5)
    seen: list[int | None] = []
    write_file = Storage.write_file

    def looking(self: Storage, path: str, content: object) -> object:
        seen.append(_loaded_step(paths, trial))
        return write_file(self, path, content)  # type: ignore[arg-type]

    monkeypatch.setattr(Storage, "write_file", looking)
    _save(paths, trial, 5)

    assert seen == [5, 5, 5]


def test_an_attempt_that_was_taken_over_writes_nothing_and_deletes_nothing(paths: RunPaths, trial: TrialSpec) -> None:
    for _ in range(2):
        Journal.open(paths)
    _save(paths, trial, 1, 2, attempt=2)

    with pytest.raises(StorageError, match="attempt 2 has taken over this run; this process is attempt 1"):
        _save(paths, trial, 3, attempt=1)
    with pytest.raises(StorageError, match="attempt 2 has taken over"):
        trim_trial(paths, trial.trial_id, 1)

    assert paths.checkpoint_steps(trial.trial_id) == [2, 1]
    assert _loaded_step(paths, trial) == 2


def test_an_attempt_that_is_taken_over_while_it_writes_does_not_commit(paths: RunPaths, trial: TrialSpec) -> None:
    Journal.open(paths)
    _save(paths, trial, 1)

    def slow() -> Iterator[bytes]:
        Journal.open(paths)
        _save(paths, trial, 2, attempt=2)
        yield b"late"

    with pytest.raises(StorageError, match="attempt 2 has taken over"):
        save_checkpoint(paths, trial, 1, Progress(step=2), {"model.safetensors": slow()})

    checkpoint = load_checkpoint(paths, trial, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.files == _files(2)


def _too_much() -> Iterator[bytes]:
    yield bytes(100)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_for_which_the_disk_is_too_small_leaves_the_old_ones_and_nothing_of_its_own(
    paths: RunPaths, trial: TrialSpec
) -> None:
    _save(paths, trial, 1, 2)

    with pytest.raises(DiskFull, match=r"ckpt-0000000003/.*No space left on device; free some"):
        save_checkpoint(paths, trial, 1, Progress(step=3), {**_files(3), "optimizer.safetensors": _too_much()})

    assert _loaded_step(paths, trial) == 2
    assert not any(path.is_file() for path in _folder(paths, trial, 3).rglob("*"))


def test_the_oldest_checkpoint_is_given_up_for_space_where_a_newer_one_verifies(
    paths: RunPaths, trial: TrialSpec
) -> None:
    _save(paths, trial, 1, 2)

    assert free_oldest(paths, trial)
    assert paths.checkpoint_steps(trial.trial_id) == [2]
    assert not free_oldest(paths, trial)
    assert paths.checkpoint_steps(trial.trial_id) == [2]


def test_the_only_checkpoint_that_verifies_is_never_given_up(paths: RunPaths, trial: TrialSpec) -> None:
    assert not free_oldest(paths, trial)
    _save(paths, trial, 1, 2)
    _damage(paths, trial, 2)

    assert not free_oldest(paths, trial)
    assert _loaded_step(paths, trial) == 1


def test_a_trimmed_trial_is_its_record_and_no_weights(paths: RunPaths, trial: TrialSpec) -> None:
    for step, ended in ((1, None), (2, "finished")):
        save_checkpoint(paths, trial, 1, Progress(step=step, ended=ended, best_metrics={"a": 0.5}), _files(step))
    trim_trial(paths, trial.trial_id, 1)

    checkpoint = load_checkpoint(paths, trial, pytest.fail)

    assert checkpoint is not None
    assert checkpoint.is_record
    assert checkpoint.progress == Progress(step=2, ended="finished", best_metrics={"a": 0.5})
    with pytest.raises(StorageError, match=r"ckpt-0000000002: expected weights, found only the record: this trial"):
        checkpoint.tensors("model")
    assert paths.checkpoint_steps(trial.trial_id) == [2]
    assert {path.name.split("-")[0] for path in _folder(paths, trial, 2).iterdir()} == {MANIFEST, "progress"}


def test_trimming_again_changes_nothing(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 1, 2)
    trim_trial(paths, trial.trial_id, 1)
    before = {path.name: path.read_bytes() for path in _folder(paths, trial, 2).iterdir()}

    trim_trial(paths, trial.trial_id, 2)

    assert {path.name: path.read_bytes() for path in _folder(paths, trial, 2).iterdir()} == before


def test_trimming_that_died_half_way_is_completed_by_the_next(
    paths: RunPaths, trial: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(paths, trial, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "delete_file", lambda *_: pytest.fail("killed here"))
        with pytest.raises(pytest.fail.Exception, match="killed here"):
            trim_trial(paths, trial.trial_id, 1)
    checkpoint = load_checkpoint(paths, trial, pytest.fail)
    assert checkpoint is not None
    assert (checkpoint.is_record, checkpoint.progress.step) == (True, 2)

    trim_trial(paths, trial.trial_id, 1)

    assert paths.checkpoint_steps(trial.trial_id) == [2]
    assert len(list(_folder(paths, trial, 2).iterdir())) == 2


def test_the_record_is_made_from_the_newest_checkpoint_that_has_a_good_one(paths: RunPaths, trial: TrialSpec) -> None:
    _save(paths, trial, 1, 2)
    next(_folder(paths, trial, 2).glob(f"{PROGRESS.split('.')[0]}-*")).write_bytes(b"")

    trim_trial(paths, trial.trial_id, 1)

    assert _loaded_step(paths, trial) == 1


def test_an_object_store_is_saved_to_read_from_and_tidied_alike(remote: RunPaths, trial: TrialSpec) -> None:
    _save(remote, trial, 1, 2, 3)
    (_folder(remote, trial, 2) / MANIFEST).unlink()
    _save(remote, trial, 4, 4)
    assert (remote.checkpoint_steps(trial.trial_id), _loaded_step(remote, trial)) == ([4, 3], 4)
    assert len(list(_folder(remote, trial, 4).iterdir())) == 3

    _damage(remote, trial, 4)
    assert _loaded_step(remote, trial) == 3

    trim_trial(remote, trial.trial_id, 1)
    assert remote.checkpoint_steps(trial.trial_id) == [4]


def test_an_attempt_that_was_taken_over_does_not_commit_to_an_object_store(remote: RunPaths, trial: TrialSpec) -> None:
    for _ in range(2):
        Journal.open(remote).flush(force=True)

    with pytest.raises(StorageError, match="attempt 2 has taken over this run; this process is attempt 1"):
        _save(remote, trial, 3, attempt=1)

    assert remote.checkpoint_steps(trial.trial_id) == []


def test_a_trial_without_a_readable_record_is_left_alone_and_told(paths: RunPaths, trial: TrialSpec) -> None:
    trim_trial(paths, trial.trial_id, 1)
    _save(paths, trial, 1)
    (_folder(paths, trial, 1) / MANIFEST).write_text("{}")

    with pytest.raises(StorageError, match=r"trials/0-net: expected a readable progress\.json, found none"):
        trim_trial(paths, trial.trial_id, 1)

    assert len(list(_folder(paths, trial, 1).iterdir())) == 3


def test_a_trial_that_was_halted_and_trimmed_trains_again_from_the_start_and_one_that_had_ended_does_not(
    paths: RunPaths, make_trial: MakeTrial
) -> None:
    halted, ended = (make_trial().model_copy(update={"trial_id": name}) for name in ("halted", "ended"))
    save_checkpoint(paths, halted, 1, Progress(step=10, epoch=2), _files(10))
    save_checkpoint(paths, ended, 1, Progress(step=10, epoch=2, ended="finished"), _files(10))
    for trial in (halted, ended):
        trim_trial(paths, trial.trial_id, 1)

    assert load_to_go_on(paths, halted, pytest.fail) is None
    record = load_to_go_on(paths, ended, pytest.fail)
    assert record is not None
    assert record.is_record
