"""Checkpoints on storage: commit one, tidy up what died, drop what is not kept, shrink an ended trial to its record.

Every write and deletion here is a safe place to die: what a reader finds is the state before or after, and the next
save removes what is left over. All of it runs where the files are written: rank 0's saver, and `trim_trial` in the
driver.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from bigray.errors import StorageError
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import (
    Content,
    commit_folder,
    read_files,
    read_manifest,
    remove_leftovers,
    write_manifest,
)
from bigray.training.checkpoint import FORMAT, PROGRESS, Progress, Snapshot, committed_steps, read_checkpoint
from bigray.training.retention import checkpoints_to_drop
from bigray.training.sharded import Shard, commit_shard
from bigray.training.tensor_files import tensor_chunks


def save_snapshot(
    paths: RunPaths, trial: TrialSpec, attempt: int, snapshot: Snapshot, stale: Collection[int] = ()
) -> None:
    """`save_checkpoint` of a snapshot; with fsdp every rank calls it with its part, and rank 0 commits them.

    The tensors are written as they lie in memory.
    """
    if snapshot.shard is None:
        files = {f"{stem}.safetensors": tensor_chunks(tensors) for stem, tensors in snapshot.tensors.items()}
        save_checkpoint(paths, trial, attempt, snapshot.progress, files, stale)
        return
    _save_part(paths, trial, attempt, snapshot, snapshot.shard, stale)


def _save_part(
    paths: RunPaths, trial: TrialSpec, attempt: int, snapshot: Snapshot, shard: Shard, stale: Collection[int]
) -> None:
    """One rank's part. Rank 0 tidies up before it begins and after it has committed: the others then write nothing."""
    paths.fence(attempt)
    step, is_first = snapshot.progress.step, shard.rank == 0
    folder = paths.checkpoint(trial.trial_id, step)
    files: dict[str, Content] = {
        shard.file_name(stem): tensor_chunks(tensors) for stem, tensors in snapshot.tensors.items()
    }
    if is_first:
        remove_dead(paths, trial.trial_id)
        files[PROGRESS] = _to_json(snapshot.progress)
    commit_shard(
        paths.storage,
        folder,
        shard,
        files,
        _manifest(trial, attempt, step),
        attempt=attempt,
        before_commit=lambda: paths.fence(attempt),
    )
    if is_first:
        remove_leftovers(paths.storage, folder, read_manifest(paths.storage, folder))
        _drop_unkept(paths, trial, attempt, step, stale)


def save_checkpoint(
    paths: RunPaths,
    trial: TrialSpec,
    attempt: int,
    progress: Progress,
    files: Mapping[str, Content],
    stale: Collection[int] = (),
) -> None:
    """Commit a checkpoint, then drop the committed ones that are not kept any more (one process at a time).

    `stale` are steps the trial went back behind: committed, but no part of its past.

    Raises:
        DiskFull: nothing of it is left on storage, and nothing was dropped.
        StorageError: it cannot be written, or a newer attempt has taken over.
    """
    step = progress.step
    paths.fence(attempt)
    remove_dead(paths, trial.trial_id)
    folder = paths.checkpoint(trial.trial_id, step)
    try:
        commit_folder(
            paths.storage,
            folder,
            {**files, PROGRESS: _to_json(progress)},
            _manifest(trial, attempt, step),
            token=f"{attempt:04d}-{secrets.token_hex(4)}",
            before_commit=lambda: paths.fence(attempt),
        )
    except StorageError:
        paths.fence(attempt)  # who took over has removed our unfinished files: that is the story then
        raise
    remove_leftovers(paths.storage, folder, read_manifest(paths.storage, folder))
    _drop_unkept(paths, trial, attempt, step, stale)


def remove_dead(paths: RunPaths, trial_id: str) -> None:
    """Remove what writers that died left behind: folders without a manifest, files that no manifest names."""
    committed = set(committed_steps(paths, trial_id))
    for step in paths.checkpoint_steps(trial_id):
        folder = paths.checkpoint(trial_id, step)
        if step not in committed:
            paths.storage.delete_folder(folder)
        elif (manifest := _readable_manifest(paths, folder)) is not None:
            remove_leftovers(paths.storage, folder, manifest)


def free_oldest(paths: RunPaths, trial: TrialSpec) -> bool:
    """Give up the oldest committed checkpoint for its space; False, and it stays, where no newer one verifies."""
    *newer, oldest = committed_steps(paths, trial.trial_id) or [0]
    if not any(_verifies(paths, trial, step) for step in newer):
        return False
    paths.storage.delete_folder(paths.checkpoint(trial.trial_id, oldest))
    return True


def trim_trial(paths: RunPaths, trial_id: str, attempt: int) -> None:
    """Shrink an ended trial to its record: one committed folder with `progress.json` only (driver).

    First the newest checkpoint's manifest is replaced by one that names the record alone, in one step; only then files
    are deleted. Safe to repeat.

    Raises:
        StorageError: nothing readable to make the record from, a newer attempt has taken over, or a write failed.
    """
    paths.fence(attempt)
    steps = committed_steps(paths, trial_id)
    for step in steps:
        folder = paths.checkpoint(trial_id, step)
        manifest = _readable_manifest(paths, folder)
        if manifest is None or not _has_good_record(paths, folder, manifest):
            continue
        record = {**manifest, "record": True, "files": {PROGRESS: manifest["files"][PROGRESS]}}
        if not manifest.get("record"):
            write_manifest(paths.storage, folder, record)
        remove_leftovers(paths.storage, folder, record)
        for other in set(paths.checkpoint_steps(trial_id)) - {step}:
            paths.storage.delete_folder(paths.checkpoint(trial_id, other))
        return
    if steps:
        raise StorageError(f"{paths.storage.uri}/{paths.trial(trial_id)}: expected a readable {PROGRESS}, found none")


def _drop_unkept(paths: RunPaths, trial: TrialSpec, attempt: int, saved: int, stale: Collection[int]) -> None:
    committed = committed_steps(paths, trial.trial_id)
    # what an earlier attempt left after this step was no good: this attempt has gone back behind it
    behind = [s for s in committed if s > saved and _attempt_of(paths, trial, s) < attempt]
    dropped = checkpoints_to_drop(committed, saved, trial.training.keep.last, {*stale, *behind})
    paths.fence(attempt)
    for step in dropped:
        paths.storage.delete_folder(paths.checkpoint(trial.trial_id, step))


def _attempt_of(paths: RunPaths, trial: TrialSpec, step: int) -> int:
    """The attempt that wrote a checkpoint; 0 where that cannot be read any more."""
    manifest = _readable_manifest(paths, paths.checkpoint(trial.trial_id, step)) or {}
    return int(manifest.get("attempt", 0))


def _manifest(trial: TrialSpec, attempt: int, step: int) -> dict[str, Any]:
    return {"format": FORMAT, "step": step, "attempt": attempt, "config_hash": trial.config_hash}


def _to_json(progress: Progress) -> bytes:
    return json.dumps(asdict(progress)).encode()


def _verifies(paths: RunPaths, trial: TrialSpec, step: int) -> bool:
    try:
        read_checkpoint(paths, trial, step)
    except StorageError:
        return False
    return True


def _readable_manifest(paths: RunPaths, folder: str) -> dict[str, Any] | None:
    try:
        return read_manifest(paths.storage, folder)
    except StorageError:  # damaged: its files stay for whoever wants to look, until retention drops the folder
        return None


def _has_good_record(paths: RunPaths, folder: str, manifest: Mapping[str, Any]) -> bool:
    try:
        return PROGRESS in manifest["files"] and bool(read_files(paths.storage, folder, manifest, [PROGRESS]))
    except StorageError:
        return False
