from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bigray.data.features import Column, FeatureSchema, column_to_numpy
from bigray.data.sources import table_from_arrays
from bigray.errors import SpecError

SCALARS = FeatureSchema(columns=(Column(name="height"), Column(name="width")))
IMAGE = FeatureSchema(columns=(Column(name="image", shape=(2, 3)),))


def test_scalars_mean_the_same_as_records_and_as_a_table() -> None:
    records = [{"width": 2.5, "height": 1}, {"height": 3, "width": 4.25, "not asked for": "x"}]
    table = pa.table({"width": [2.5, 4.25], "other": ["x", "y"], "height": [1, 3]})

    from_records = SCALARS.from_records(records)

    np.testing.assert_array_equal(from_records, SCALARS.from_table(table))
    np.testing.assert_array_equal(from_records, np.array([[1, 2.5], [3, 4.25]], dtype=np.float32))
    assert from_records.dtype == np.float32


def test_tensors_mean_the_same_as_records_and_as_a_table() -> None:
    images = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    table = table_from_arrays({"image": images})
    as_lists = pa.table({"image": pa.array(images.tolist(), pa.list_(pa.list_(pa.float32())))})
    records = [{"image": image.tolist()} for image in images]

    np.testing.assert_array_equal(IMAGE.from_table(table), images)
    np.testing.assert_array_equal(IMAGE.from_table(as_lists), images)
    np.testing.assert_array_equal(IMAGE.from_records(records), images)


def test_the_input_shape_is_that_of_one_sample() -> None:
    assert (SCALARS.input_shape, SCALARS.is_tensor, SCALARS.tensor_name) == ((2,), False, "features")
    assert (IMAGE.input_shape, IMAGE.is_tensor, IMAGE.tensor_name) == ((2, 3), True, "image")


GOOD = {"height": 1.0, "width": 2.0}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{**GOOD, "width": float("nan")}], "NaN or infinite"),
        ([{**GOOD, "width": float("inf")}], "NaN or infinite"),
        ([{**GOOD, "width": 1e300}], "NaN or infinite"),
        ([{**GOOD, "width": "2.0"}], "expected numbers, got '2.0'"),
        ([{**GOOD, "width": None}], "expected numbers, got None"),
        ([{"height": True, "width": False}], "expected numbers, got True"),
        ([{**GOOD, "width": [1.0]}], "ragged values"),
        ([{"height": [1.0], "width": [1.0]}], r"wrong shape \(1, 2, 1\), expected \(rows, 2\)"),
        ([GOOD, {"height": 1.0}], r"records\[1\]: missing 'width'"),
        ([GOOD, [1.0, 2.0]], r"records\[1\]: expected an object with 'height', 'width', got list"),
        ([], "at least one row"),
        (GOOD, "expected a list"),
    ],
)
def test_records_that_are_no_rows_are_refused(records: Any, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        SCALARS.from_records(records)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([[1, 2], [3, 4]], r"image: wrong shape \(1, 2, 2\), expected \(rows, 2, 3\)"),
        ([[1, 2, 3], [4, 5]], "image: ragged values"),
        ([[1, 2, 3], [4, 5, "6"]], "image: expected numbers, got '6'"),
        (7, "image: wrong shape"),
    ],
)
def test_a_tensor_of_another_form_is_refused(value: Any, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        IMAGE.from_records([{"image": value}])


def test_an_array_without_rows_is_refused() -> None:
    with pytest.raises(SpecError, match="wrong shape"):
        IMAGE.checked(np.zeros((0, 2, 3), dtype=np.float32))


def test_a_missing_column_of_many_is_named_without_listing_them_all() -> None:
    schema = FeatureSchema(columns=tuple(Column(name=f"f{number}") for number in range(64)))

    with pytest.raises(SpecError, match=r"records\[0\]: missing 'f0', 'f1', 'f2', 'f3', 'f4' and 59 more"):
        schema.from_records([{}])


def test_a_sliced_or_chunked_column_keeps_its_rows() -> None:
    images = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    lists = pa.table({"image": pa.array(images.tolist())})
    for table in (table_from_arrays({"image": images}), lists, pa.concat_tables([lists.slice(0, 1), lists.slice(1)])):
        np.testing.assert_array_equal(column_to_numpy(table, "image"), images)
        np.testing.assert_array_equal(column_to_numpy(table.slice(1, 2), "image"), images[1:3])


def test_lists_of_different_lengths_are_refused_with_both_lengths() -> None:
    with pytest.raises(SpecError, match=r"column 'x' holds lists of different lengths \(1 to 2\)"):
        column_to_numpy(pa.table({"x": [[1.0], [1.0, 2.0]]}), "x")


def test_a_dictionary_column_is_decoded() -> None:
    table = pa.table({"label": pa.array(["b", "a", "b"]).dictionary_encode()})

    assert column_to_numpy(table, "label").tolist() == ["b", "a", "b"]
