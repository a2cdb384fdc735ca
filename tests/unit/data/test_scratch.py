"""Folders of rows on the disk: one owner, many users, and what dead processes leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigray.data.row_file import RowFile, RowWriter
from bigray.data.scratch import new_scratch, remove_abandoned, scratch_root, shared_scratch
from bigray.errors import SpecError, StorageError

ROWS = np.arange(3000, dtype=np.float32).reshape(500, 2, 3)
DIES = """
import os, sys, pathlib
from bigray.data.scratch import new_scratch
scratch = new_scratch(0, pathlib.Path(sys.argv[1]))
(scratch.path / "train.f32").write_bytes(b"rows")
os._exit(1)
"""


@pytest.fixture
def rows(tmp_path: Path) -> RowFile:
    with RowWriter(str(tmp_path / "rows"), (2, 3)) as writer:
        writer.append(ROWS[:123])
        writer.append(ROWS[123:])
    return writer.rows


def test_rows_of_a_file_are_read_as_those_of_an_array(rows: RowFile) -> None:
    order = np.random.default_rng(0).permutation(500)
    target = np.empty((500, 2, 3), np.float32)
    np.take(rows, order, axis=0, out=target, mode="clip")
    np.testing.assert_array_equal(target, ROWS[order])
    for key in (
        slice(3, 9),
        slice(None),
        slice(90, 2, -7),
        slice(600, 700),
        np.asarray([-1, 0]),
        np.zeros(0, np.int64),
    ):
        np.testing.assert_array_equal(rows[key], ROWS[key])
    np.testing.assert_array_equal(rows[7], ROWS[7])
    assert (len(rows), rows.shape, rows.ndim, rows.dtype, rows.nbytes) == (500, (500, 2, 3), 3, np.float32, 12_000)
    with pytest.raises(IndexError):
        rows[np.asarray([500])]
    with pytest.raises(TypeError, match="not read as a whole"):
        np.asarray(rows)


def test_rows_are_changed_in_their_place(rows: RowFile) -> None:
    rows.rewritten(lambda part: part * 2)
    np.testing.assert_array_equal(rows[:], ROWS * 2)


def test_a_file_that_was_cut_is_no_rows(rows: RowFile) -> None:
    with Path(rows.path).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(StorageError, match="holds 100 bytes instead of 12,000"):
        rows[0]


def test_a_folder_is_removed_by_its_owner_or_when_its_owner_is_dead_and_not_before(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert list(tmp_path.glob("*/train.f32"))
    mine = new_scratch(0, tmp_path)
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [mine.path]
    mine.remove()
    assert not list(tmp_path.iterdir())


def test_the_first_user_fills_a_shared_folder_and_the_last_one_removes_it(tmp_path: Path) -> None:
    fillings: list[Path] = []

    def fail(path: Path) -> None:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError):
        shared_scratch("copy", fail, tmp_path)
    assert not list(tmp_path.iterdir())
    first = shared_scratch("copy", fillings.append, tmp_path)
    second = shared_scratch("copy", fillings.append, tmp_path)
    assert fillings == [first.path]
    first.remove()
    remove_abandoned(tmp_path)
    assert second.path.exists()
    second.remove()
    assert not list(tmp_path.iterdir())


def test_no_room_and_the_folder_of_somebody_else_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match=r"the rows need 1e\+03 TB on the disk of .* set TMPDIR"):
        new_scratch(10**15, tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    root = scratch_root()
    root.rmdir()
    root.symlink_to("/")
    with pytest.raises(StorageError, match="belongs to another user"):
        scratch_root()
