from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from pyarrow import csv, parquet

from bigray.data.features import column_to_numpy
from bigray.data.sources import check_source, read_table, table_from_arrays
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


def test_an_npz_file_with_python_objects_is_refused_by_the_name_of_the_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", fine=np.zeros(2), x=np.array([{}, {}], dtype=object))

    with pytest.raises(SpecError, match=r"rows\.npz': array 'x' holds Python objects"):
        read_table(str(tmp_path / "rows.npz"))


def test_arrays_in_another_order_of_bytes_and_tensors_of_truth_values_are_taken() -> None:
    table = table_from_arrays({"x": np.array([1.5, 2.0], ">f8"), "flags": np.array([[True, False], [False, True]])})

    assert table.column("x").to_pylist() == [1.5, 2.0]
    assert column_to_numpy(table, "flags").tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
@pytest.mark.parametrize("suffix", [".arrow", ".feather"])
def test_arrow_ipc_is_read_with_its_tensors(tmp_path: Path, make: Callable[..., Any], suffix: str) -> None:
    images = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    table = TABLE.append_column("image", pa.FixedShapeTensorArray.from_numpy_ndarray(images))
    with pa.OSFile(str(tmp_path / f"rows{suffix}"), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)

    found = read_table(str(tmp_path / f"rows{suffix}"))

    assert found.select(["width", "label"]).equals(TABLE)
    np.testing.assert_array_equal(column_to_numpy(found, "image"), images)


def test_text_files_are_one_row_each(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"zwei\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "één\n".encode())

    assert read_table(str(tmp_path)).to_pydict() == {"text": ["één\n", "zwei\n"]}


@pytest.mark.parametrize(
    "source", ["{}/*.parquet", "{}", "{}/", "{}/a.parquet", "{}/a.parquet?x=1", "{}/s*/*.parquet?x=1"]
)
def test_a_uri_is_read_as_a_path_is(tmp_path: Path, source: str) -> None:
    parquet.write_table(TABLE, tmp_path / "a.parquet")
    if "s*" in source:
        (tmp_path / "shards").mkdir()
        (tmp_path / "a.parquet").rename(tmp_path / "shards/a.parquet")

    assert read_table(source.format(f"file://{tmp_path}")).equals(TABLE)


def test_a_uri_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    for source in (f"file://{tmp_path}/rows.csv", f"file://{tmp_path}/*.csv"):
        with pytest.raises(SpecError, match="no such file or folder"):
            check_source(source)
    with pytest.raises(SpecError, match=r"'ftp://host/rows\.csv': cannot be opened"):
        check_source("ftp://host/rows.csv")


def test_a_file_may_be_named_like_a_pattern(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "rows[1].parquet")

    assert read_table(f"{tmp_path}/rows[1].parquet").equals(TABLE)


def test_what_lies_beside_the_data_is_left_alone(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "part-0.parquet")
    (tmp_path / "_temporary").mkdir()
    parquet.write_table(TABLE, tmp_path / "_temporary/part-0.parquet")
    for name in ("_SUCCESS", ".part-0.parquet.crc", "README.txt", "LICENSE", "logo.gif"):
        (tmp_path / name).write_text("not data")

    assert read_table(str(tmp_path)).equals(TABLE)


def test_files_of_two_kinds_are_not_guessed_from(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "rows.parquet")
    csv.write_csv(TABLE, tmp_path / "rows.csv")

    with pytest.raises(SpecError, match=r"several kinds \(\.csv, \.parquet\); name one by a glob"):
        read_table(str(tmp_path))


def test_the_index_of_a_data_frame_is_no_column(tmp_path: Path) -> None:
    parquet.write_table(TABLE.append_column("__index_level_0__", pa.array([3, 5, 8])), tmp_path / "rows.parquet")

    assert read_table(str(tmp_path / "rows.parquet")).column_names == ["width", "label"]


def test_files_of_one_source_may_differ_in_the_order_of_columns_and_in_the_kind_of_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,label\n1,a\n")
    (tmp_path / "b.csv").write_text("label,x\nb,2.5\n")

    assert read_table(f"{tmp_path}/*.csv").to_pydict() == {"x": [1.0, 2.5], "label": ["a", "b"]}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("x\n1\n", "column 'label' is missing, which"),
        ("x,label,y\n1,b,2\n", "column 'y' is not in"),
        ("x,label\nmany,b\n", "column 'x' is string, in"),
        ("x,label\ntrue,b\n", "column 'x' is bool, in"),
    ],
)
def test_files_with_other_columns_are_told_by_file_and_column(tmp_path: Path, second: str, expected: str) -> None:
    (tmp_path / "a.csv").write_text("x,label\n1,a\n")
    (tmp_path / "b.csv").write_text(second)

    with pytest.raises(SpecError) as caught:
        read_table(f"{tmp_path}/*.csv")

    assert f"'{tmp_path}/b.csv': {expected}" in str(caught.value)
    assert len(caught.value.faults) == 1


def test_a_function_may_return_a_table(user_module: UserModule) -> None:
    module = user_module("import pyarrow as pa\ndef load(): return pa.table({'x': [1, 2]})")

    assert read_table(f"{module}:load").column("x").to_pylist() == [1, 2]


def test_a_function_may_return_a_dict_of_arrays(user_module: UserModule) -> None:
    module = user_module("def load(): return {'x': [1, 2], 'image': [[[1.0]], [[2.0]]]}")

    table = read_table(f"{module}:load")

    assert column_to_numpy(table, "image").shape == (2, 1, 1)


PAIRS = """
    import torch
    class Pairs(torch.utils.data.Dataset):
        def __init__(self, samples): self.samples = samples
        def __len__(self): return len(self.samples)
        def __getitem__(self, index): return self.samples[index]
    """


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ("[(torch.ones(2), 0), (torch.zeros(2), 1)]", {"x": [[1.0, 1.0], [0.0, 0.0]], "y": [0, 1]}),
        ("[{'age': 3, 'label': 'a'}, {'age': 4, 'label': 'b'}]", {"age": [3, 4], "label": ["a", "b"]}),
        ("[torch.tensor(1.5, requires_grad=True), torch.tensor(2.5)]", {"x": [1.5, 2.5]}),
        ("[(torch.ones(1, dtype=torch.bfloat16), 'a')]", {"x": [[1.0]], "y": ["a"]}),
    ],
    ids=["pairs", "dicts", "tensors", "bfloat16"],
)
def test_a_function_may_return_a_torch_dataset(
    user_module: UserModule, samples: str, expected: dict[str, list[Any]]
) -> None:
    module = user_module(f"{PAIRS}\n    def load(): return Pairs({samples})\n")

    table = read_table(f"{module}:load")

    assert {name: column_to_numpy(table, name).tolist() for name in table.column_names} == expected


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ("[(torch.ones(2), 0), (torch.ones(3), 1)]", "sample 1: 'x' has shape (3,), in sample 0 (2,)"),
        ("[(1, 2, 3)]", "sample 0 has 3 parts; expected (x, y)"),
        ("[{'a': 1}, {'b': 1}]", "sample 1 has ['b'], sample 0 has ['a']"),
        ("[]", "a dataset that holds no rows"),
    ],
)
def test_a_torch_dataset_that_makes_no_table_is_told_by_its_sample(
    user_module: UserModule, samples: str, expected: str
) -> None:
    module = user_module(f"{PAIRS}\n    def load(): return Pairs({samples})\n")

    with pytest.raises(SpecError) as caught:
        read_table(f"{module}:load")

    assert f"'{module}:load': " in str(caught.value)
    assert expected in str(caught.value)


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


@pytest.mark.parametrize("name", ["rows.parquet", "rows.npz", "rows.arrow"])
def test_a_file_with_other_content_than_its_name_says_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00\x01 not this\n1,2,3\n")

    with pytest.raises(SpecError, match="cannot be read"):
        read_table(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "npz", "arrow", "txt"])
def test_an_empty_file_is_told(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"rows.{suffix}").write_bytes(b"")

    with pytest.raises(SpecError, match=rf"rows\.{suffix}': is empty"):
        read_table(str(tmp_path))


def test_a_file_without_rows_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,label\n")

    with pytest.raises(SpecError, match=r"rows\.csv': holds no rows"):
        read_table(str(tmp_path / "rows.csv"))


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no rows"):
        read_table(str(tmp_path))
