from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest
import safetensors.torch
import torch

from bigray.errors import StorageError
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, Storage, read_folder, read_manifest, write_manifest
from bigray.training.checkpoint import Progress, Snapshot, load_checkpoint, read_checkpoint
from bigray.training.checkpoint_writer import save_snapshot
from bigray.training.sharded import JoinedTensors, Shard, commit_shard

WEIGHT = torch.arange(21.0).reshape(7, 3)
STEPS = torch.tensor(12)


def shards(world_size: int, save_id: int = 1) -> list[Shard]:
    return [Shard(rank, world_size, save_id) for rank in range(world_size)]


def files_of(shard: Shard, weight: torch.Tensor = WEIGHT) -> dict[str, bytes]:
    """Cut as FSDP cuts: equal parts along axis 0, the last ones smaller or empty."""
    rows = -(-len(weight) // shard.world_size)
    tensors = {"weight": weight[shard.rank * rows : (shard.rank + 1) * rows].clone()}
    if shard.rank == 0:
        tensors["steps"] = STEPS
    return {shard.file_name("model"): safetensors.torch.save(tensors)}


def save(storage: Storage, world_size: int, save_id: int = 1, weight: torch.Tensor = WEIGHT) -> None:
    """All ranks at once."""

    def commit(shard: Shard) -> None:
        commit_shard(storage, "ckpt", shard, files_of(shard, weight), {"step": 3}, attempt=1, timeout_s=10.0)

    at_once(commit, shards(world_size, save_id))


def at_once(call: Callable[[Shard], None], each: list[Shard]) -> None:
    threads = [threading.Thread(target=call, args=(shard,)) for shard in reversed(each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_the_parts_of_any_number_of_ranks_make_the_whole(world_size: int) -> None:
    files = {name: data for shard in shards(world_size) for name, data in files_of(shard).items()}
    joined = JoinedTensors(files, "model")

    assert set(joined) == {"weight", "steps"}
    assert joined.shape("weight") == (7, 3)
    assert torch.equal(joined["weight"], WEIGHT)
    assert torch.equal(joined["steps"], STEPS)


def test_a_whole_file_is_read_as_it_is() -> None:
    joined = JoinedTensors({"model.safetensors": safetensors.torch.save({"weight": WEIGHT})}, "model")

    assert torch.equal(joined["weight"], WEIGHT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_types_survive(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).to(dtype)
    joined = JoinedTensors({"model.safetensors": safetensors.torch.save({"t": tensor})}, "model")

    assert joined["t"].dtype == dtype
    assert torch.equal(joined["t"], tensor)


def test_a_checkpoint_without_the_stem_has_no_tensors_of_it() -> None:
    assert len(JoinedTensors(files_of(shards(1)[0]), "optimizer")) == 0


def test_a_missing_part_is_named_with_what_was_expected_and_found() -> None:
    files = files_of(shards(3)[0]) | files_of(shards(3)[2])

    with pytest.raises(StorageError) as caught:
        JoinedTensors(files, "model", "runs/a/ckpt-3")

    assert str(caught.value) == (
        "runs/a/ckpt-3/model-00002-of-00003.safetensors: missing, expected 3 parts of 'model', found 2"
    )


def test_the_parts_of_two_saves_are_not_mixed() -> None:
    with pytest.raises(StorageError, match=r"parts of one save of 'model', found those of \[2, 3\]"):
        JoinedTensors(files_of(shards(2)[0]) | files_of(shards(3)[1]), "model")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"\0" * 64])
def test_a_part_cut_short_or_of_another_format_is_refused(damage: object) -> None:
    ((name, data),) = files_of(shards(1)[0]).items()

    with pytest.raises(StorageError, match=f"{name}: not a safetensors file"):
        JoinedTensors({name: damage(data)}, "model")  # type: ignore[operator]


def test_only_the_cut_stems_are_numbered() -> None:
    shard = Shard(rank=1, world_size=4, save_id=0)

    assert shard.file_name("optimizer") == "optimizer-00002-of-00004.safetensors"
    assert shard.file_name("samples") == "samples.safetensors"


def test_a_save_of_several_ranks_is_one_committed_folder(storage: Storage) -> None:
    save(storage, world_size=3)
    committed = read_folder(storage, "ckpt")

    assert committed.manifest["step"] == 3
    assert len(committed.files) == 3
    assert torch.equal(JoinedTensors(committed.files, "model")["weight"], WEIGHT)


def test_a_save_takes_nothing_over_from_an_earlier_one_of_the_same_step(storage: Storage) -> None:
    save(storage, world_size=4, save_id=1)
    save(storage, world_size=2, save_id=2, weight=-WEIGHT)
    committed = read_folder(storage, "ckpt")

    assert torch.equal(JoinedTensors(committed.files, "model")["weight"], -WEIGHT)
    assert len(committed.files) == 2


def test_a_rank_that_never_writes_is_named_and_nothing_is_committed(storage: Storage) -> None:
    first, _ = shards(2)

    with pytest.raises(StorageError, match=r"part-00002-of-00002-.*: rank 1 of 2 has not written its part within 0 s"):
        commit_shard(storage, "ckpt", first, files_of(first), {"step": 3}, attempt=1, timeout_s=0.0)

    assert not storage.exists(f"ckpt/{MANIFEST}")


@pytest.mark.parametrize(("attempt", "save_id"), [(1, 2), (2, 1)])
def test_the_parts_of_another_save_or_attempt_do_not_count(storage: Storage, attempt: int, save_id: int) -> None:
    old, new = shards(2), shards(2, save_id)
    save(storage, world_size=2)

    with pytest.raises(StorageError, match="rank 0 has not begun this save"):
        commit_shard(storage, "ckpt", new[1], files_of(new[1]), {}, attempt=attempt, timeout_s=0.0)
    with pytest.raises(StorageError, match="rank 1 of 2 has not written its part"):
        commit_shard(storage, "ckpt", new[0], files_of(new[0], -WEIGHT), {}, attempt=attempt, timeout_s=0.0)

    committed = read_folder(storage, "ckpt").files
    assert set(committed) == {shard.file_name("model") for shard in old}
    assert torch.equal(JoinedTensors(committed, "model")["weight"], WEIGHT)


def save_snapshots(paths: RunPaths, trial: TrialSpec, step: int, world_size: int = 2) -> None:
    """What the savers of all ranks do, for a step of a trial."""

    def write(shard: Shard) -> None:
        rows = -(-len(WEIGHT) // world_size)
        tensors = {"model": {"weight": WEIGHT[shard.rank * rows : (shard.rank + 1) * rows] + step}}
        if shard.rank == 0:
            tensors["best"] = {"weight": WEIGHT}
        save_snapshot(paths, trial, 1, Snapshot(Progress(step=step), tensors, shard))

    at_once(write, shards(world_size, save_id=step))


def test_a_sharded_checkpoint_is_read_whole(paths: RunPaths, make_trial: Callable[..., TrialSpec]) -> None:
    trial = make_trial()
    save_snapshots(paths, trial, step=5)
    checkpoint = read_checkpoint(paths, trial, step=5)

    assert checkpoint.tensors("model").keys() == {"weight"}
    assert torch.equal(checkpoint.tensors("model")["weight"], WEIGHT + 5)
    assert torch.equal(checkpoint.tensors("best")["weight"], WEIGHT)
    assert checkpoint.tensors("optimizer") is None


def test_nothing_but_the_kept_checkpoints_stays(paths: RunPaths, make_trial: Callable[..., TrialSpec]) -> None:
    trial = make_trial(keep={"last": 2})
    paths.storage.write_bytes(f"{paths.checkpoint(trial.trial_id, 4)}/model-00001-of-00002-dead.safetensors", b"x")
    for step in (5, 6, 7):
        save_snapshots(paths, trial, step)

    assert paths.checkpoint_steps(trial.trial_id) == [7, 6]
    assert len(paths.storage.list_names(paths.checkpoint(trial.trial_id, 7))) == len(
        ["manifest", "progress", "best", "model 1", "model 2"]
    )


def test_a_missing_shard_is_named_and_the_checkpoint_before_is_used(
    paths: RunPaths, make_trial: Callable[..., TrialSpec]
) -> None:
    trial, warnings = make_trial(), []
    for step in (5, 6):
        save_snapshots(paths, trial, step)
    folder = paths.checkpoint(trial.trial_id, 6)
    (shard,) = [name for name in paths.storage.list_names(folder) if name.startswith("model-00002")]
    paths.storage.delete_file(f"{folder}/{shard}")
    checkpoint = load_checkpoint(paths, trial, warnings.append)

    assert checkpoint is not None
    assert checkpoint.progress.step == 5
    assert re.search(rf"{shard}: corrupt, expected size \d+, found no file; going back .* step 5", warnings[0])


def test_a_manifest_that_lacks_a_shard_is_refused(paths: RunPaths, make_trial: Callable[..., TrialSpec]) -> None:
    trial = make_trial()
    save_snapshots(paths, trial, step=5)
    folder = paths.checkpoint(trial.trial_id, 5)
    manifest = read_manifest(paths.storage, folder)
    del manifest["files"]["model-00001-of-00002.safetensors"]
    write_manifest(paths.storage, folder, manifest)

    with pytest.raises(StorageError, match=r"model-00001-of-00002\.safetensors: missing, expected 2 parts .* found 1$"):
        read_checkpoint(paths, trial, step=5)
