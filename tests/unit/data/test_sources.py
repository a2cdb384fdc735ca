from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from bigray.data.features import column_to_numpy
from bigray.data.sources import check_source, read_table
from bigray.errors import SpecError

UserModule = Callable[[str], str]
TABLE = pa.table({"width": [1.5, 2.0, 3.0], "label": ["a", "b", "a"]})


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "rows.parquet")

    assert read_table(str(tmp_path / "rows.parquet")).equals(TABLE)


def test_a_folder_of_parquet_files_is_read_in_order_of_name(tmp_path: Path) -> None:
    parquet.write_table(TABLE.slice(1), tmp_path / "b.parquet")
    parquet.write_table(TABLE.slice(0, 1), tmp_path / "a.parquet")

    assert read_table(str(tmp_path)).equals(TABLE)


def test_a_glob_takes_the_files_it_matches_in_order_of_name(tmp_path: Path) -> None:
    parquet.write_table(TABLE.slice(1), tmp_path / "part-2.parquet")
    parquet.write_table(TABLE.slice(0, 1), tmp_path / "part-1.parquet")
    parquet.write_table(TABLE, tmp_path / "other.parquet")

    assert read_table(f"{tmp_path}/part-*.parquet").equals(TABLE)


def test_a_csv_file_is_read_with_its_types(tmp_path: Path) -> None:
    csv.write_csv(TABLE, tmp_path / "rows.csv")

    assert read_table(str(tmp_path / "rows.csv")).equals(TABLE)


def test_an_npz_file_becomes_columns_and_tensor_columns(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    np.savez(tmp_path / "rows.npz", image=images, label=np.array([0, 1, 0]))

    table = read_table(str(tmp_path / "rows.npz"))

    np.testing.assert_array_equal(column_to_numpy(table, "image"), images)
    assert table.column("label").to_pylist() == [0, 1, 0]


def test_an_npz_file_with_python_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.array([{}, {}], dtype=object))

    with pytest.raises(SpecError, match=r"rows\.npz': cannot be read"):
        read_table(str(tmp_path / "rows.npz"))


def test_a_function_may_return_a_table(user_module: UserModule) -> None:
    module = user_module("import pyarrow as pa\ndef load(): return pa.table({'x': [1, 2]})")

    assert read_table(f"{module}:load").column("x").to_pylist() == [1, 2]


def test_a_function_may_return_a_dict_of_arrays(user_module: UserModule) -> None:
    module = user_module("def load(): return {'x': [1, 2], 'image': [[[1.0]], [[2.0]]]}")

    table = read_table(f"{module}:load")

    assert column_to_numpy(table, "image").shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def load(): raise ValueError('no network')", "raised ValueError: no network"),
        ("def load(): return [1, 2]", "returned list, expected a pyarrow.Table or a dict of arrays"),
        ("def load(): return {'x': [1, 2], 'y': [1]}", "different numbers of rows"),
        ("def lod(): return {}", "has no callable 'load', did you mean 'lod'?"),
        ("import nothing_of_that_name", "cannot import"),
    ],
)
def test_a_function_that_fails_is_told(user_module: UserModule, source: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_table(f"{user_module(source)}:load")

    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows-*.csv", "folder/"])
def test_a_source_that_is_not_there_is_told_with_the_folder_looked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SpecError, match="no such file or folder") as caught:
        check_source(name)

    assert str(tmp_path) in str(caught.value)


def test_an_unknown_kind_of_file_is_told_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"")

    with pytest.raises(SpecError, match=r"unknown kind '\.xlsx'; use \.parquet, \.csv, \.npz"):
        check_source(str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.npz", "rows.csv"])
def test_a_file_with_other_content_than_its_name_says_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00\x01 not this\n1,2,3\n")

    with pytest.raises(SpecError, match="cannot be read"):
        read_table(str(tmp_path / name))


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("")

    with pytest.raises(SpecError, match=r"rows\.csv'"):
        read_table(str(tmp_path / "rows.csv"))


def test_a_file_without_rows_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,label\n")

    with pytest.raises(SpecError, match=r"rows\.csv': holds no rows"):
        read_table(str(tmp_path / "rows.csv"))


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no rows"):
        read_table(str(tmp_path))
