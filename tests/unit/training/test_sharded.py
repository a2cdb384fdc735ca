from __future__ import annotations

import json
import threading

import pytest
import safetensors.torch
import torch

from bigray.errors import StorageError
from bigray.storage import MANIFEST, Storage, read_folder
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
    """All ranks at once, rank 0 last."""
    threads = [
        threading.Thread(target=commit_shard, args=(storage, "ckpt", shard, files_of(shard, weight), {"step": 3}, 10.0))
        for shard in reversed(shards(world_size, save_id))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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

    with pytest.raises(StorageError, match=f"{name}: .*expected.*found"):
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

    assert torch.equal(JoinedTensors(read_folder(storage, "ckpt").files, "model")["weight"], -WEIGHT)
    assert not [name for name in storage.list_names("ckpt") if "of-00004" in name]


def test_a_rank_that_never_writes_is_named_and_nothing_is_committed(storage: Storage) -> None:
    first, _ = shards(2)

    with pytest.raises(StorageError, match=r"part-00002-of-00002\.json: rank 1 of 2 has not written its part"):
        commit_shard(storage, "ckpt", first, files_of(first), {"step": 3}, timeout_s=0.0)

    assert not storage.exists(f"ckpt/{MANIFEST}")


def test_a_part_of_an_interrupted_save_does_not_count(storage: Storage) -> None:
    old, new = shards(2, save_id=1), shards(2, save_id=2)
    storage.write_bytes("ckpt/begin.json", json.dumps({"save_id": 1}).encode())
    commit_shard(storage, "ckpt", old[1], files_of(old[1]), {}, timeout_s=0.0)

    with pytest.raises(StorageError, match="rank 0 has not begun this save"):
        commit_shard(storage, "ckpt", new[1], files_of(new[1]), {}, timeout_s=0.0)
    with pytest.raises(StorageError, match="rank 1 of 2 has not written its part"):
        commit_shard(storage, "ckpt", new[0], files_of(new[0]), {}, timeout_s=0.0)
