"""A checkpoint in parts: each rank writes the rows it holds, and any number of ranks puts them together again.

model-00002-of-00004.safetensors   of each tensor the part along axis 0 that rank 1 of 4 holds
begin-<token>.json                 rank 0's word that the ranks may write this save
part-00002-of-00004-<token>.json   what rank 1 wrote, after it wrote it: names, sizes, hashes

What is not cut (the step count of an optimizer, batch norm statistics) is in rank 0's part alone. So a tensor is the
parts that have its name, one after the other in the order of ranks; FSDP cuts along axis 0 only.

The ranks' savers meet over storage, not over collectives: those belong to the training thread.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigray.errors import StorageError
from bigray.storage import Content, Storage, write_files, write_manifest
from bigray.training.tensor_files import check_tensor_file, dtype_of

if TYPE_CHECKING:
    import torch

SHARDED_STEMS = ("model", "optimizer", "ema")
"""What is cut over the ranks in a sharded checkpoint; all else is whole, and rank 0's."""
PEER_TIMEOUT_S = 600.0
"""Longest wait of a saver for the savers of the other ranks."""
_POLL_S = 0.05
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class Shard:
    """One rank's part in one save."""

    rank: int
    world_size: int
    save_id: int
    """Drawn by rank 0 for each save and the same on all: tells its files from those of another save of this step."""

    def file_name(self, stem: str) -> str:
        """Name of this rank's file of `stem`; whole files have no number."""
        if stem not in SHARDED_STEMS:
            return f"{stem}.safetensors"
        return f"{stem}-{self.rank + 1:05d}-of-{self.world_size:05d}.safetensors"


def commit_shard(
    storage: Storage,
    folder: str,
    shard: Shard,
    files: Mapping[str, Content],
    manifest: Mapping[str, Any],
    *,
    attempt: int,
    before_commit: Callable[[], None] | None = None,
    timeout_s: float = PEER_TIMEOUT_S,
) -> None:
    """As `commit_folder` by all ranks together: each writes its `files`, rank 0 the manifest once all parts are there.

    Called by the saver of every rank; ranks other than 0 return once their part is written. Nobody writes before rank
    0 has begun: it may still be clearing away what is left of earlier saves. The files' names carry the attempt and
    the save, so that those of another save of this step are neither taken for this one's nor overwritten.

    Raises:
        StorageError: a write failed, or a rank has not done its part within `timeout_s`; names the rank.
    """
    token = f"{attempt:04d}-{shard.save_id:016x}"
    begin = f"{folder}/begin-{token}.json"
    if shard.rank == 0:
        storage.write_bytes(begin, b"{}")
    else:
        _wait_for(storage, begin, "rank 0 has not begun this save", timeout_s)
    entries = write_files(storage, folder, files, token)
    storage.write_bytes(_part_path(folder, shard.rank, shard.world_size, token), json.dumps(entries).encode())
    if shard.rank != 0:
        return
    for rank in range(1, shard.world_size):
        path = _part_path(folder, rank, shard.world_size, token)
        _wait_for(storage, path, f"rank {rank} of {shard.world_size} has not written its part", timeout_s)
        entries |= json.loads(storage.read_bytes(path))
    if before_commit is not None:
        before_commit()
    write_manifest(storage, folder, {**manifest, "world_size": shard.world_size, "files": entries})


def _wait_for(storage: Storage, path: str, lack: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not storage.exists(path):
        if time.monotonic() > deadline:
            raise StorageError(f"{storage.uri}/{path}: {lack} within {timeout_s:g} s; the checkpoint is not committed")
        time.sleep(_POLL_S)


def _part_path(folder: str, rank: int, world_size: int, token: str) -> str:
    return f"{folder}/part-{rank + 1:05d}-of-{world_size:05d}-{token}.json"


def part_names(names: Collection[str], stem: str, place: str) -> list[str]:
    """The files of one stem in the order of ranks, or its whole file; empty where a checkpoint has none of it.

    Raises:
        StorageError: a part is missing; one line with the file, what was expected and what was found.
    """
    if f"{stem}.safetensors" in names:
        return [f"{stem}.safetensors"]
    matches = [match for name in names if (match := _PART.fullmatch(name)) and match["stem"] == stem]
    counts = sorted({int(match["count"]) for match in matches})
    if len(counts) > 1:
        raise StorageError(f"{place}: expected the parts of one save of '{stem}', found those of {counts}")
    expected = [Shard(rank, counts[0], 0).file_name(stem) for rank in range(counts[0])] if counts else []
    if missing := [name for name in expected if name not in names]:
        raise StorageError(
            f"{place}/{missing[0]}: missing, expected {counts[0]} parts of '{stem}', found {len(matches)}"
        )
    return expected


class JoinedTensors(Mapping[str, "torch.Tensor"]):
    """The tensors of one stem (`model`, `optimizer`) of a checkpoint: name -> tensor on the CPU.

    Each is put together when it is asked for, so that no more than one is in memory beside the files. The files may be
    the parts of any number of ranks, or one whole file.

    Raises:
        StorageError: a part is missing, cut short or not safetensors; one line with the file, expected and found.
    """

    def __init__(self, files: Mapping[str, bytes], stem: str, place: str = "checkpoint") -> None:
        names = part_names(files.keys(), stem, place)
        self._parts = [(memoryview(files[name]), *_header(files[name], f"{place}/{name}")) for name in names]
        self._tensor_names = list(dict.fromkeys(name for _, header, _ in self._parts for name in header))

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        parts = [_tensor(data, header[name], start) for data, header, start in self._parts if name in header]
        if not parts:
            raise KeyError(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensor_names)

    def __len__(self) -> int:
        return len(self._tensor_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; from the headers alone."""
        shapes = [tuple(header[name]["shape"]) for _, header, _ in self._parts if name in header]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _header(data: bytes, place: str) -> tuple[dict[str, Any], int]:
    """Where each tensor lies, and where the tensors' bytes start."""
    check_tensor_file(data, place)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, start


def _tensor(data: memoryview, entry: Mapping[str, Any], start: int) -> torch.Tensor:
    import torch

    dtype, shape = dtype_of(entry["dtype"]), entry["shape"]
    first, _ = entry["data_offsets"]
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    raw = bytearray(data[start + first : start + entry["data_offsets"][1]])  # a copy: tensors are writable
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)
