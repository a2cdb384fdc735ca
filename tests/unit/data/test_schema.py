from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from bigray.data.schema import infer_kinds
from bigray.errors import SpecError
from bigray.specs import DataSpec

PNG = b"\x89PNG\r\n\x1a\n..."


def _spec(**columns: str) -> DataSpec:
    return DataSpec.model_validate(
        {"source": "s", "target": "t", "columns": {name: {"kind": kind} for name, kind in columns.items()}}
    )


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([1, 2, None, 4]), "number"),
        (pa.array([1.5, 2, None, 4], pa.float16()), "number"),
        (pa.array([True, False, None, True]), "number"),
        (pa.array([Decimal("1.5")] * 4), "number"),
        (pa.array(["a", None, "", "a"]), "category"),
        (pa.array(["1", "2.5", "1", "1", "1"]), "category"),
        (pa.array(["2024-01-01", "a", "a", "a", "a"]), "category"),
        (pa.array(["20240101"] * 4), "category"),
        (pa.array(["a", "b", "a", "a", "a"]).dictionary_encode(), "category"),
        (pa.array([1, 2, 1]).dictionary_encode(), "number"),
        (pa.array(["2024-01-01", "2024-05-31T12:00:00Z", "", None]), "date"),
        (pa.array([datetime.date(2024, 1, 1)]), "date"),
        (pa.array([0], pa.timestamp("ns", tz="UTC")), "date"),
        (pa.array([[1.0, 2.0]]), "tensor"),
        (pa.array([[[1], [2]]], pa.list_(pa.list_(pa.int8(), 1), 2)), "tensor"),
        (pa.array([None, PNG]), "image"),
        (pa.array([b"\xff\xd8\xff.."], pa.large_binary()), "image"),
    ],
)
def test_the_kind_of_a_column_is_told_by_its_values(values: pa.Array, kind: str) -> None:
    assert infer_kinds(pa.table({"x": values}), ["x"], _spec()) == {"x": kind}


def test_a_column_marked_as_pictures_is_one_whatever_its_first_bytes() -> None:
    field = pa.field("x", pa.binary(), metadata={b"bigray": b"image"})

    assert infer_kinds(pa.table([pa.array([b"cut"])], schema=pa.schema([field])), ["x"], _spec()) == {"x": "image"}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["1", "2", "3"], "category"),
        ([1, 2, 3], "category"),
        ([1.0, 2.0, 3.0], "date"),
        (["2024-01-01", "x", "y"], "date"),
        ([[0.0], [1.0], [2.0]], "image"),
    ],
)
def test_the_job_may_say_otherwise(values: list[Any], told: str) -> None:
    assert infer_kinds(pa.table({"x": values}), ["x"], _spec(x=told)) == {"x": told}


@pytest.mark.parametrize(
    ("values", "columns", "expected"),
    [
        (
            pa.array([f"word {i}" for i in range(10)]),
            {},
            "data.source: column 'x' is text with 10 distinct values in 10 rows; name the columns to use in "
            'data.features, or set data.columns.x.kind = "category"',
        ),
        (pa.array([f"word {i % 1001}" for i in range(4000)]), {}, "is text with 1,001 distinct values in 4,000 rows"),
        (pa.array([None, ""]), {}, "data.source: column 'x' is empty in every row; leave it out in data.features"),
        (pa.nulls(2), {}, "data.source: column 'x' is empty in every row"),
        (pa.array([b"bytes"]), {}, "data.source: column 'x' is binary, not numeric, text, dates or images"),
        (pa.array([["a"]]), {}, "data.source: column 'x' is list<item: string>, not numeric"),
        (pa.array([{"a": 1}]), {}, "data.source: column 'x' is struct<a: int64>, not numeric"),
        (pa.array(["1"]), {"x": "number"}, "data.columns.x.kind: 'number', but the column is string"),
        (pa.array([1]), {"x": "image"}, "data.columns.x.kind: 'image', but the column is int64"),
        (pa.array([[1]]), {"x": "category"}, "data.columns.x.kind: 'category', but the column is list<item: int64>"),
        (pa.array([1]), {"y": "number"}, "data.columns: no column 'y'"),
    ],
)
def test_a_column_that_a_model_cannot_be_given_is_told(
    values: pa.Array, columns: dict[str, str], expected: str
) -> None:
    with pytest.raises(SpecError) as caught:
        infer_kinds(pa.table({"x": values}), ["x"], _spec(**columns))

    (fault,) = caught.value.faults
    assert fault.startswith(expected) or expected in fault


def test_all_columns_at_fault_are_told_together() -> None:
    table = pa.table({"a": [b"x"], "b": [[1.0]], "c": pa.nulls(1), "d": [1]})

    with pytest.raises(SpecError) as caught:
        infer_kinds(table, table.column_names, _spec())

    assert [fault.split("'")[1] for fault in caught.value.faults] == ["a", "c", "b"]
