"""Rows that are streamed from disk, on the node of a worker: the driver's files on its own, a copy on any other.

The first worker of a node that needs the copy makes it, the others wait; the last one to let go of it removes it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bigray.data.dataset import TrainingArrays
from bigray.data.row_file import FloatArray, RowFile, RowWriter
from bigray.data.scratch import check_room, shared_scratch
from bigray.training.switchboard import ask

BLOCK_BYTES = 64 * 2**20
BLOCKS_AHEAD = 2
"""Read on the driver's node while one is written here."""


def local_arrays(arrays: TrainingArrays, driver_node: str) -> TrainingArrays:
    """The same arrays with rows that can be read on this node (worker).

    Raises:
        StorageError: the files are gone, or the disk here has no room.
    """
    files = [rows for rows in (arrays.x_train, arrays.x_val) if isinstance(rows, RowFile)]
    if not files or (here := ray.get_runtime_context().get_node_id()) == driver_node:
        return arrays
    folder = Path(files[0].path).parent.name
    scratch = shared_scratch(f"{folder}-{here[:16]}", lambda path: _fill(path, files, driver_node))
    x_train, x_val = (replace(rows, path=str(scratch.path / Path(rows.path).name), owner=scratch) for rows in files)
    return replace(arrays, x_train=x_train, x_val=x_val)


def let_go(arrays: TrainingArrays) -> None:
    """This process reads no more of them."""
    for rows in (arrays.x_train, arrays.x_val):
        if isinstance(rows, RowFile) and rows.owner is not None:
            rows.owner.remove()


def _fill(folder: Path, files: list[RowFile], driver_node: str) -> None:
    check_room(folder, sum(rows.nbytes for rows in files))
    for rows in files:
        _copy(rows, folder / Path(rows.path).name, driver_node)


def _copy(rows: RowFile, path: Path, driver_node: str) -> None:
    """By blocks, which tasks on the driver's node read and the object store carries."""
    there = NodeAffinitySchedulingStrategy(driver_node, soft=False)
    read = ray.remote(num_cpus=0, scheduling_strategy=there)(_read_block)
    at_once = max(1, BLOCK_BYTES // rows.row_bytes)
    under_way: deque[Any] = deque()
    path.unlink(missing_ok=True)  # of a process that died over it
    with RowWriter(str(path), rows.row_shape) as writer:
        for start in range(0, len(rows), at_once):
            under_way.append(read.remote(rows, start, min(start + at_once, len(rows))))
            if len(under_way) > BLOCKS_AHEAD:
                writer.append(ask(under_way.popleft()))
        while under_way:
            writer.append(ask(under_way.popleft()))


def _read_block(rows: RowFile, start: int, stop: int) -> FloatArray:
    """A Ray task on the driver's node."""
    return rows[start:stop]
