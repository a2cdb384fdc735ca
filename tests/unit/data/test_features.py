from __future__ import annotations

import base64
import copy
import datetime
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bigray.data.features import Column, FeatureSchema, _plain_numbers, column_to_numpy
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


# ----- columns that are no plain numbers

MIXED = FeatureSchema(
    columns=(
        Column(name="size", nullable=True),
        Column(name="colour", kind="category", categories=("1", "blue", "true"), nullable=True),
        Column(name="grade", kind="category", categories=("a", "b"), unknown="refuse"),
        Column(name="day", kind="date"),
    )
)
WHOLE = {"size": 1.5, "colour": "blue", "grade": "b", "day": "1970-01-02"}
NAN = float("nan")


@pytest.mark.parametrize(
    ("changed", "codes"),
    [
        ({}, [1.5, 1, 1, 1]),
        ({"size": None}, [NAN, 1, 1, 1]),
        ({"size": NAN}, [NAN, 1, 1, 1]),
        ({"size": ""}, [NAN, 1, 1, 1]),
        ({"colour": ""}, [1.5, NAN, 1, 1]),
        ({"colour": None}, [1.5, NAN, 1, 1]),
        ({"colour": "red"}, [1.5, -1, 1, 1]),
        ({"colour": True}, [1.5, 2, 1, 1]),
        ({"colour": "true"}, [1.5, 2, 1, 1]),
        ({"colour": 1}, [1.5, 0, 1, 1]),
        ({"colour": 1.0}, [1.5, 0, 1, 1]),
        ({"colour": 1.5}, [1.5, -1, 1, 1]),
        ({"day": "1970-01-02T12:00:00"}, [1.5, 1, 1, 1.5]),
        ({"day": "1970-01-02T12:00:00+12:00"}, [1.5, 1, 1, 1]),
        ({"day": "1969-12-31T18:00Z"}, [1.5, 1, 1, -0.25]),
        ({"day": 20_000}, [1.5, 1, 1, 20_000]),
    ],
)
def test_a_value_of_any_kind_has_one_code_in_records_rows_and_tables(
    changed: dict[str, Any], codes: list[float]
) -> None:
    record = {**WHOLE, **changed}
    expected = np.array([codes], np.float32)

    np.testing.assert_array_equal(MIXED.from_records([record]), expected)
    np.testing.assert_array_equal(MIXED.checked([list(record.values())]), expected)
    np.testing.assert_array_equal(
        MIXED.from_table(pa.table({name: [value] for name, value in record.items()})), expected
    )


@pytest.mark.parametrize(
    "days",
    [
        pa.array([datetime.date(1970, 1, 2), datetime.date(1969, 12, 31)]),
        pa.array([86_400_000, -86_400_000], pa.date64()),
        pa.array([86_400, -86_400], pa.timestamp("s")),
        pa.array([86_400_000_000_999, -86_400_000_000_999], pa.timestamp("ns", tz="Asia/Tokyo")),
        pa.array(["1970-01-02", "1969-12-31"]).dictionary_encode(),
    ],
    ids=str,
)
def test_dates_of_every_arrow_type_are_days_since_1970_in_utc(days: pa.Array) -> None:
    schema = FeatureSchema(columns=(Column(name="day", kind="date"),))

    np.testing.assert_array_equal(schema.from_table(pa.table({"day": days})), [[1], [-1]])


def test_codes_can_be_turned_back_into_records_that_have_them() -> None:
    codes = np.array([[NAN, 2, 0, 19_723.33], [1e-3, -1, 1, -0.1], [0, NAN, 1, 1]], np.float32)

    records = MIXED.to_records(codes)

    assert records[2] == {"size": 0.0, "colour": None, "grade": "b", "day": "1970-01-02T00:00:00+00:00"}
    np.testing.assert_array_equal(MIXED.from_records(records), codes)


FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"grade": None}, "'grade' is empty"),
    ({"grade": ""}, "'grade' is empty"),
    ({"grade": "c"}, "'grade' is not a category that training saw: 'c'"),
    ({"day": "yesterday"}, "'day': expected a date such as .*, got 'yesterday'"),
    ({"day": "2024-02-30"}, "'day': expected a date such as .*, got '2024-02-30'"),
    ({"day": True}, "'day': expected a date such as .*, got True"),
    ({"day": None}, "'day' is empty"),
    ({"size": "big"}, "'size': expected a number, got 'big'"),
    ({"size": float("inf")}, "'size' is no finite number"),
    ({"size": 1e39}, "'size' is no finite number"),
    ({"colour": float("inf")}, "'colour': expected a category, got inf"),
]


@pytest.mark.parametrize(("changed", "expected"), FAULTY, ids=[expected for _, expected in FAULTY])
def test_a_value_without_a_code_is_refused_with_its_row_and_column(changed: dict[str, Any], expected: str) -> None:
    record = {**WHOLE, **changed}
    table = pa.table({name: pa.array([value]) for name, value in record.items()})

    with pytest.raises(SpecError, match=rf"^records\[1\]: {expected}$"):
        MIXED.from_records([WHOLE, record])
    with pytest.raises(SpecError, match=f"^row 0: {expected}$"):
        MIXED.from_table(table)
    with pytest.raises(SpecError, match=f"^row 7: {expected}$"):
        MIXED.from_table(table, rows=[7])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1.0, "blue", "a"]], r"records\[0\]: expected 4 values"),
        ([3.0], r"records\[0\]: expected 4 values, got 3.0"),
        ([[[1.0], "blue", "a", 3]], r"records\[0\]: 'size': expected a number, got \[1.0\]"),
        ([[1.0, ["blue"], "a", 3]], r"records\[0\]: 'colour': expected a category, got \['blue'\]"),
        ([[10**400, "blue", "a", 3]], r"records\[0\]: 'size' is no finite number"),
        ([[1, 10**5000, "a", 3]], r"records\[0\]: 'colour': expected a category, got a huge number"),
        ([], "expected a list of rows of 4 values"),
        ("blue", "expected a list of rows of 4 values"),
        (np.zeros((1, 3)), r"wrong shape \(1, 3\), expected \(rows, 4\)"),
        (np.array([["a", "b", "c", "d"]]), "expected numbers"),
    ],
)
def test_rows_of_another_form_are_refused(values: Any, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        MIXED.checked(values)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ({"day": pa.array([2**62], pa.timestamp("s"))}, "column 'day' holds dates beyond the year 290,000"),
        ({"day": pa.array([5], pa.duration("s"))}, "row 0: 'day': expected a date"),
        ({"colour": pa.array([b"blue"])}, "row 0: 'colour': expected a category, got b'blue'"),
        ({"colour": pa.array([["blue"]])}, "column 'colour' is list<item: string>, which has no values to compare"),
        ({"size": pa.array([[1.0]])}, "column 'size' is list<item: double>, which has no values to compare"),
    ],
    ids=["far away", "a duration", "bytes", "a list", "a list of numbers"],
)
def test_columns_of_types_that_cannot_be_encoded_are_refused(column: dict[str, pa.Array], expected: str) -> None:
    table = pa.table({name: [value] for name, value in WHOLE.items()} | column)

    with pytest.raises(SpecError, match=expected):
        MIXED.from_table(table)


def test_an_array_of_numbers_holds_raw_values_and_not_codes() -> None:
    schema = FeatureSchema(columns=(Column(name="a"), Column(name="b", kind="category", categories=("3", "4"))))

    np.testing.assert_array_equal(schema.checked(np.array([[0.5, 4], [0.5, 0]])), [[0.5, 1], [0.5, -1]])


def test_a_table_with_empty_cells_is_refused_where_nothing_may_be_missing() -> None:
    for table in (
        pa.table({"height": [1, 2], "width": [1.0, None]}),
        pa.table({"height": [1, 2], "width": ["1", "x"]}),
    ):
        with pytest.raises(
            SpecError, match=r"column 'width' holds NaN .* first in row 1|row 0: 'width': expected a numb"
        ):
            SCALARS.from_table(table)


def test_a_table_without_a_column_is_refused_by_its_name() -> None:
    with pytest.raises(SpecError, match="no column 'width'; the columns are: 'height'"):
        SCALARS.from_table(pa.table({"height": [1]}))


def test_a_schema_that_was_used_can_be_sent_to_another_process() -> None:
    MIXED.from_records([WHOLE])

    sent = copy.deepcopy(MIXED)

    assert sent == MIXED
    assert set(sent.__getstate__()["__dict__"]) == {"columns"}


PHOTO = FeatureSchema(columns=(Column(name="photo", shape=(1, 2, 2), kind="image"),))


def test_a_picture_in_base64_is_its_pixels() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [7, 9]], np.uint8)).save(buffer, "PNG")

    codes = PHOTO.from_records([{"photo": base64.b64encode(buffer.getvalue()).decode()}])

    np.testing.assert_array_equal(codes, [[[[0, 255], [7, 9]]]])
    np.testing.assert_array_equal(PHOTO.from_table(pa.table({"photo": [buffer.getvalue()]})), codes)
    np.testing.assert_array_equal(PHOTO.from_records(PHOTO.to_records(codes)), codes)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("no base64!", "photo: expected numbers, or a PNG or JPEG in base64"), ("AAAA", "photo: not a PNG or JPEG")],
)
def test_text_that_is_no_picture_is_refused(value: str, expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        PHOTO.from_records([{"photo": value}])


def test_bytes_that_are_no_picture_are_refused_with_their_row() -> None:
    with pytest.raises(SpecError, match=r"^column 'photo': row 0: not a PNG or JPEG"):
        PHOTO.from_table(pa.table({"photo": [b"x"]}))


# ----- plain numbers are read a quick way, which must mean the same as the thorough one

EXACT = 2**53
"""Whole numbers up to here are the same in 64 bits of an integer and of a float."""
ONE = FeatureSchema(columns=(Column(name="height"),))
CUBE = FeatureSchema(columns=(Column(name="cube", shape=(2, 1, 3)),))
VECTOR = FeatureSchema(columns=(Column(name="vector", shape=(3,)),))
SCHEMAS = {"one column": ONE, "two columns": SCALARS, "1-D": VECTOR, "2-D": IMAGE, "3-D": CUBE}

numbers = st.one_of(
    st.floats(width=32),
    st.floats(),
    st.integers(-EXACT + 1, EXACT - 1),
    st.sampled_from([0, -0.0, 1e39, -1e39, 1e-50, 5e-324, float("nan"), float("inf"), 2**24 + 1, 3.4028236e38]),
)
others = st.one_of(st.booleans(), st.none(), st.text(max_size=3), st.just({}), st.just([]), st.just((1.0,)))


def _nested(draw: st.DrawFn, shape: tuple[int, ...], odd: float) -> Any:
    """Numbers in lists of this shape; a share `odd` of the places holds something else, or another length."""
    if draw(st.floats(0, 1)) < odd:
        return draw(st.one_of(others, numbers, st.lists(numbers, max_size=4)))
    if not shape:
        return draw(numbers)
    length = shape[0] + (draw(st.sampled_from([-1, 1])) if draw(st.floats(0, 1)) < odd else 0)
    values = [_nested(draw, shape[1:], odd) for _ in range(length)]
    return tuple(values) if draw(st.floats(0, 1)) < odd else values


@st.composite
def records_of(draw: st.DrawFn, schema: FeatureSchema) -> list[dict[str, Any]]:
    odd = draw(st.sampled_from([0.0, 0.0, 0.03, 0.2]))
    num_rows = draw(st.integers(1, 4))
    return [{column.name: _nested(draw, column.shape, odd) for column in schema.columns} for _ in range(num_rows)]


def _read(read: Callable[[], Any]) -> tuple[str, Any]:
    try:
        values = read()
    except SpecError as refusal:
        return "refused", str(refusal)
    assert values.dtype == np.float32
    return "read", (values.shape, values.tobytes())


def _quickly(schema: FeatureSchema, records: list[dict[str, Any]]) -> tuple[str, Any]:
    return _read(lambda: schema.from_records(records))


def _thoroughly(schema: FeatureSchema, records: list[dict[str, Any]]) -> tuple[str, Any]:
    return _read(lambda: schema.checked(schema._values(records)))


@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_records_mean_the_same_read_quickly_and_thoroughly(name: str, data: st.DataObject) -> None:
    schema = SCHEMAS[name]
    records = data.draw(records_of(schema))

    assert _quickly(schema, records) == _thoroughly(schema, records)


def _of(values: Any) -> list[dict[str, Any]]:
    return [{"height": values[0], "width": values[1]}]


@pytest.mark.parametrize(
    ("schema", "records"),
    [
        (SCALARS, _of([True, False])),
        (SCALARS, _of([True, 1.0])),
        (SCALARS, _of([1.0, True])),
        (SCALARS, [*_of([1.0, 2.0]), *_of([False, True])]),
        (SCALARS, _of(["1", 2.0])),
        (SCALARS, _of([1.0, "2"])),
        (SCALARS, _of([None, 2.0])),
        (SCALARS, _of([1.0, {}])),
        (SCALARS, _of([[1.0], [2.0]])),
        (SCALARS, _of([[1.0], 2.0])),
        (SCALARS, _of([10**400, 1.0])),
        (SCALARS, _of([1e39, 1.0])),
        (IMAGE, [{"image": [[1, 2, 3], [4, 5, 6]]}]),
        (IMAGE, [{"image": [[1, 2, 3], [4, 5]]}]),
        (IMAGE, [{"image": [[1, 2], [3, 4], [5, 6]]}]),
        (IMAGE, [{"image": [1, 2, 3]}]),
        (IMAGE, [{"image": []}]),
        (IMAGE, [{"image": [[True, False, True], [False, True, False]]}]),
        (IMAGE, [{"image": [[True, 2, 3], [4, 5, 6]]}]),
        (IMAGE, [{"image": "abcdef"}]),
        (IMAGE, [{"image": ["abc", "def"]}]),
        (IMAGE, [{"image": ((1, 2, 3), (4, 5, 6))}]),
        (CUBE, [{"cube": [[[1, 2, 3]], [[4, 5, 6]]]}]),
        (CUBE, [{"cube": [[[1, 2, 3]], [[4, 5, None]]]}]),
        (CUBE, [{"cube": [[1, 2, 3], [4, 5, 6]]}]),
    ],
)
def test_odd_values_mean_the_same_read_quickly_and_thoroughly(
    schema: FeatureSchema, records: list[dict[str, Any]]
) -> None:
    assert _quickly(schema, records) == _thoroughly(schema, records)


@pytest.mark.parametrize(
    "value", [2**60 + 2**36 + 1, -(2**60) - 2**36 - 1, 2**63, 2**64 - 1, 2**64, -(2**70)], ids=lambda value: f"{value}"
)
@pytest.mark.parametrize("other", [0, 0.5], ids=["beside a whole number", "beside a fraction"])
def test_huge_whole_numbers_mean_the_same_read_quickly_and_thoroughly(value: int, other: float) -> None:
    assert _quickly(SCALARS, _of([value, other])) == _thoroughly(SCALARS, _of([value, other]))


def test_plain_numbers_are_read_the_quick_way() -> None:
    """Else the tests above would compare the thorough way with itself."""
    for schema in SCHEMAS.values():
        rows = np.ones((2, *schema.input_shape)).tolist()
        found = _plain_numbers(rows, schema.input_shape)
        assert found is not None
        assert found.shape == (2, *schema.input_shape)
