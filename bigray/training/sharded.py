"""A checkpoint in parts: each rank writes the rows it holds, and any number of ranks puts them together again.

model-00002-of-00004.safetensors   of each tensor the part along axis 0 that rank 1 of 4 holds
part-00002-of-00004.json           names, sizes and hashes of that rank's files; written after them
begin.json                         written first, by rank 0: the folder is clear, this save may fill it

What is not cut (the step count of an optimizer, batch norm statistics) is in rank 0's part alone. So a tensor is the
parts that have its name, one after the other in the order of ranks; FSDP cuts along axis 0 only.

The ranks' savers meet over storage, not over collectives: those belong to the training thread.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigray.errors import StorageError
from bigray.storage import MANIFEST, Storage, sha256

if TYPE_CHECKING:
    import torch

SHARDED_STEMS = ("model", "optimizer", "ema")
"""What is cut over the ranks in a sharded checkpoint; all else is whole, and rank 0's."""
BEGIN = "begin.json"
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
    """Drawn by rank 0 for each save: tells its files from those that an interrupted save of this step left behind."""

    def file_name(self, stem: str) -> str:
        """Name of this rank's file of `stem`; whole files have no number."""
        if stem not in SHARDED_STEMS:
            return f"{stem}.safetensors"
        return f"{stem}-{self.rank + 1:05d}-of-{self.world_size:05d}.safetensors"


def commit_shard(
    storage: Storage,
    folder: str,
    shard: Shard,
    files: Mapping[str, bytes],
    manifest: Mapping[str, Any],
    timeout_s: float = PEER_TIMEOUT_S,
) -> None:
    """Write this rank's `files`; rank 0 then waits for all parts and writes the manifest that makes them count.

    Called by the saver of every rank. Only rank 0 deletes anything, and nobody writes before it has: a folder that an
    earlier save of this step left is never mixed with this one. Ranks other than 0 return once their part is written.

    Raises:
        StorageError: a write failed, or a rank has not done its part within `timeout_s`; names the rank.
    """
    if shard.rank == 0:
        storage.delete_folder(folder)
        storage.write_bytes(f"{folder}/{BEGIN}", _json({"save_id": shard.save_id}))
    else:
        _wait_for(storage, f"{folder}/{BEGIN}", shard.save_id, "rank 0 has not begun this save", timeout_s)
    for name, data in files.items():
        storage.write_bytes(f"{folder}/{name}", data)
    entries = {name: {"sha256": sha256(data), "size": len(data)} for name, data in files.items()}
    part = {"save_id": shard.save_id, "files": entries}
    storage.write_bytes(f"{folder}/{_part_name(shard.rank, shard.world_size)}", _json(part))
    if shard.rank == 0:
        entries = _entries_of_all(storage, folder, shard, timeout_s)
        document = {**manifest, "world_size": shard.world_size, "files": entries}
        storage.write_bytes(f"{folder}/{MANIFEST}", _json(document))


def _entries_of_all(storage: Storage, folder: str, shard: Shard, timeout_s: float) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for rank in range(shard.world_size):
        path = f"{folder}/{_part_name(rank, shard.world_size)}"
        lack = f"rank {rank} of {shard.world_size} has not written its part"
        entries |= _wait_for(storage, path, shard.save_id, lack, timeout_s)["files"]
    return entries


def _wait_for(storage: Storage, path: str, save_id: int, lack: str, timeout_s: float) -> dict[str, Any]:
    """The JSON document at `path`, once it is there and belongs to this save."""
    deadline = time.monotonic() + timeout_s
    while True:
        document = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
        if document.get("save_id") == save_id:
            return dict(document)
        if time.monotonic() > deadline:
            raise StorageError(f"{storage.uri}/{path}: {lack} within {timeout_s:g} s; the checkpoint is not committed")
        time.sleep(_POLL_S)


def _part_name(rank: int, world_size: int) -> str:
    return f"part-{rank + 1:05d}-of-{world_size:05d}.json"


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True).encode()


class JoinedTensors(Mapping[str, "torch.Tensor"]):
    """The tensors of one stem (`model`, `optimizer`) of a checkpoint: name -> tensor on the CPU.

    Each is put together when it is asked for, so that no more than one is in memory beside the files. The files may be
    the parts of any number of ranks, or one whole file.

    Raises:
        StorageError: a part is missing, cut short or not safetensors; one line with the file, expected and found.
    """

    def __init__(self, files: Mapping[str, bytes], stem: str, place: str = "checkpoint") -> None:
        self._place = place
        self._parts = [
            (name, memoryview(files[name]), *self._header(name, files[name])) for name in self._names(files, stem)
        ]
        self._tensor_names = list(dict.fromkeys(name for _, _, header, _ in self._parts for name in header))

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        parts = [_tensor(data, header[name], start) for _, data, header, start in self._parts if name in header]
        if not parts:
            raise KeyError(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensor_names)

    def __len__(self) -> int:
        return len(self._tensor_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; from the headers alone."""
        shapes = [tuple(header[name]["shape"]) for _, _, header, _ in self._parts if name in header]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _names(self, files: Mapping[str, bytes], stem: str) -> list[str]:
        """The files of `stem`, in the order of ranks; none where the checkpoint has none of it."""
        if f"{stem}.safetensors" in files:
            return [f"{stem}.safetensors"]
        matches = [match for name in files if (match := _PART.fullmatch(name)) and match["stem"] == stem]
        counts = sorted({int(match["count"]) for match in matches})
        if len(counts) > 1:
            raise StorageError(f"{self._place}: expected the parts of one save of '{stem}', found those of {counts}")
        names = [Shard(rank, counts[0], 0).file_name(stem) for rank in range(counts[0])] if counts else []
        if missing := [name for name in names if name not in files]:
            raise StorageError(
                f"{self._place}/{missing[0]}: missing, expected {counts[0]} parts of '{stem}', found {len(matches)}"
            )
        return names

    def _header(self, name: str, data: bytes) -> tuple[dict[str, Any], int]:
        """Where each tensor lies (safetensors: 8 bytes length, JSON, bytes), and where the tensors' bytes start."""
        start = 8 + int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8:start])
            header.pop("__metadata__", None)
            end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise StorageError(f"{self._place}/{name}: expected a safetensors file, found {error}") from error
        if len(data) != end:
            raise StorageError(f"{self._place}/{name}: cut short, expected {end:,} bytes, found {len(data):,}")
        return header, start


def _tensor(data: memoryview, entry: Mapping[str, Any], start: int) -> torch.Tensor:
    import torch

    dtype, shape = _dtypes()[entry["dtype"]], entry["shape"]
    first, _ = entry["data_offsets"]
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    raw = bytearray(data[start + first : start + entry["data_offsets"][1]])  # a copy: tensors are writable
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def _dtypes() -> dict[str, torch.dtype]:
    """Safetensors' names of the types that weights and optimizer state come in."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
