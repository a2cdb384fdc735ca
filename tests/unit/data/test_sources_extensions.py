from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from pyarrow import parquet

from bigray.data.features import column_to_numpy
from bigray.data.sources import read_table
from bigray.errors import SpecError

RAN: list[Any] = []
"""What deserialising an extension type has unpickled."""


class Trusting(pa.ExtensionType):
    """As careless as they come: unpickles whatever stands beside its name."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "test.trusting")

    def __arrow_ext_serialize__(self) -> bytes:
        return pickle.dumps("anything")

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Trusting:
        RAN.append(pickle.loads(serialized))
        return cls()


@pytest.fixture
def trusting() -> Iterator[Trusting]:
    kind = Trusting()
    pa.register_extension_type(kind)
    RAN.clear()
    yield kind
    pa.unregister_extension_type("test.trusting")


def _write_parquet(table: pa.Table, path: Path) -> None:
    parquet.write_table(table, path)


def _write_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _write_file(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


Writer = Callable[[pa.Table, Path], None]
FORMATS = [(_write_parquet, "rows.parquet"), (_write_stream, "rows.arrow"), (_write_file, "rows.arrow")]
formats = pytest.mark.parametrize(("write", "name"), FORMATS, ids=["parquet", "stream", "file"])


def _described_as(values: pa.Array, name: str, content: bytes) -> pa.Table:
    """A column under the name of an extension type that nothing here has registered."""
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": content}
    return pa.table([values], schema=pa.schema([pa.field("x", values.type, metadata=metadata)]))


def test_pyarrow_by_itself_unpickles_what_is_in_the_file(trusting: Trusting, tmp_path: Path) -> None:
    column = pa.ExtensionArray.from_storage(trusting, pa.array([1, 2]))
    _write_parquet(pa.table({"x": column}), tmp_path / "rows.parquet")
    RAN.clear()

    parquet.read_table(tmp_path / "rows.parquet")

    assert RAN  # else the next test holds for nothing


@formats
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_in_a_file_is_unpickled(
    trusting: Trusting, tmp_path: Path, write: Writer, name: str, nested: bool
) -> None:
    column: pa.Array = pa.ExtensionArray.from_storage(trusting, pa.array([1, 2]))
    if nested:
        column = pa.StructArray.from_arrays([column], ["inner"])
    write(pa.table({"x": column}), tmp_path / name)
    RAN.clear()

    if nested:
        assert read_table(str(tmp_path / name)).column("x").to_pylist() == [{"inner": 1}, {"inner": 2}]
    else:
        with pytest.raises(SpecError, match=r"column 'x' is of the extension type 'test\.trusting'.* not unpickled"):
            read_table(str(tmp_path / name))

    assert not RAN


@formats
@pytest.mark.parametrize("shape_of", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"])
def test_the_tensors_of_ray_data_are_tensors(tmp_path: Path, write: Writer, name: str, shape_of: str) -> None:
    write(_described_as(pa.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]), shape_of, b"[2, 2]"), tmp_path / name)

    assert column_to_numpy(read_table(str(tmp_path / name)), "x").tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


@formats
@pytest.mark.parametrize(
    ("values", "kind", "content", "expected"),
    [
        ([[1.0, 2.0]], "ray.data.arrow_tensor_v2", pickle.dumps((2,)), "not unpickled"),
        ([[1.0, 2.0]], "ray.data.arrow_tensor_v2", b"[3]", "does not hold tensors of shape"),
        ([[1.0, 2.0], None], "ray.data.arrow_tensor_v2", b"[2]", "does not hold tensors of shape"),
        ([[1.0, 2.0]], "ray.data.arrow_tensor_v2", b"[-2]", "is a tensor described as"),
        ([1.0], "ray.data.arrow_tensor_v2", b"[1]", "does not hold tensors of shape"),
    ],
)
def test_a_tensor_that_is_not_what_it_says_is_told(
    tmp_path: Path, write: Writer, name: str, values: list[Any], kind: str, content: bytes, expected: str
) -> None:
    write(_described_as(pa.array(values), kind, content), tmp_path / name)

    with pytest.raises(SpecError, match=rf"{name}': column 'x' .*{expected}"):
        read_table(str(tmp_path / name))


@formats
def test_a_type_that_nobody_here_knows_is_read_as_its_storage(tmp_path: Path, write: Writer, name: str) -> None:
    write(_described_as(pa.array([1, 2]), "somebody.else", b'{"unit": "m"}'), tmp_path / name)

    found = read_table(str(tmp_path / name))

    assert found.column("x").to_pylist() == [1, 2]
    assert found.schema.field("x").type == pa.int64()
    assert not found.schema.field("x").metadata


@formats
def test_bigrays_own_tensors_and_other_columns_keep_their_types(tmp_path: Path, write: Writer, name: str) -> None:
    table = pa.table(
        {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(2, 2, 3)),
            "label": pa.array(["a", "b"]).dictionary_encode(),
            "when": pa.array([1, 2], pa.timestamp("ms")),
        }
    )
    write(table, tmp_path / name)

    found = read_table(str(tmp_path / name))

    assert found.schema.types[1:] == table.schema.types[1:]
    assert column_to_numpy(found, "image").tolist() == column_to_numpy(table, "image").tolist()


@formats
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_file_that_was_cut_is_told(tmp_path: Path, write: Writer, name: str, keep: float) -> None:
    write(pa.table({"x": np.arange(5000)}), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(keep * len(content))])

    with pytest.raises(SpecError, match=rf"{name}': cannot be read: ") as caught:
        read_table(str(tmp_path / name))

    assert len(str(caught.value).splitlines()) == 1


def test_a_footer_with_two_schemas_is_refused(tmp_path: Path) -> None:
    # of the two, one could be shown to a check and the other to the reader
    parquet.write_table(pa.table({"x": [1], "ARROW:schema": [2]}), tmp_path / "rows.parquet")

    with pytest.raises(SpecError, match="more than once"):
        read_table(str(tmp_path / "rows.parquet"))
