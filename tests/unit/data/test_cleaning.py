"""Missing values by every policy, through `prepare_dataset` as a job does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bigray.data.cleaning import missing_mask, rows_named
from bigray.data.dataset import Dataset, prepare_dataset
from bigray.errors import SpecError
from bigray.specs import DataSpec

NUM_ROWS = 200
GAPS = np.arange(NUM_ROWS) % 5 == 0
NUMBERS = np.random.default_rng(0).gamma(2.0, 3.0, NUM_ROWS).round(3)
COLOURS = np.random.default_rng(1).choice(["blue", "red", "red", "red"], NUM_ROWS)


def _table(**columns: Any) -> pa.Table:
    numbers = [None if gap else value for gap, value in zip(GAPS, NUMBERS.tolist(), strict=True)]
    colours = ["" if gap else value for gap, value in zip(GAPS, COLOURS.tolist(), strict=True)]
    days = [f"2024-01-{1 + row % 28:02}" for row in range(NUM_ROWS)]
    labels = ["no", "yes"] * (NUM_ROWS // 2)
    return pa.table({"number": numbers, "colour": colours, "day": days, "label": labels} | columns)


def _prepare(folder: Path, table: pa.Table | None = None, **spec: Any) -> Dataset:
    parquet.write_table(_table() if table is None else table, folder / "rows.parquet")
    document = {"source": str(folder / "rows.parquet"), "target": "label", **spec}
    return prepare_dataset(DataSpec.model_validate(document), "classification")


def _faults(folder: Path, table: pa.Table | None = None, **spec: Any) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        _prepare(folder, table, **spec)
    return caught.value.faults


def test_gaps_stop_the_job_unless_it_says_what_to_do_with_them(tmp_path: Path) -> None:
    assert _faults(tmp_path) == tuple(
        f"data.source: column '{name}' has 40 empty values (in rows 0, 5, 10, 15, 20 and 35 more); fill them in the "
        f"source, or say what to do in data.missing"
        for name in ("number", "colour")
    )


def test_rows_with_gaps_are_left_out_and_told(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, missing="drop")

    assert sum(dataset.num_rows.values()) == NUM_ROWS - 40
    assert dataset.notes == ("data.missing: left out 40 rows with empty values",)
    assert not any(column.nullable for column in dataset.inputs.columns)
    assert None not in dataset.holdout.column("number").to_pylist()


@pytest.mark.parametrize(("policy", "statistic"), [("mean", np.mean), ("median", np.median)])
def test_gaps_are_filled_with_what_training_rows_say(tmp_path: Path, policy: str, statistic: Any) -> None:
    dataset = _prepare(tmp_path, missing=policy, missing_indicator=True)
    number, colour, day = dataset.preprocessing.steps
    x_train = dataset.arrays.x_train
    told = x_train[:, 1] == 1

    assert 20 < told.sum() < 40
    known = x_train[~told, 0].astype(np.float64)
    assert number.fill == pytest.approx(statistic(known), rel=1e-6)
    assert set(x_train[told, 0]) == {np.float32(number.fill)}
    assert number.fill != pytest.approx(statistic(NUMBERS[~GAPS]), rel=1e-6)  # some known values were held out
    assert (colour.fill, colour.indicator) == (1.0, True)
    assert dataset.inputs.columns[1].categories == ("blue", "red")
    np.testing.assert_array_equal(x_train[told, 2:5], [[0, 1, 1]] * int(told.sum()))
    assert (day.indicator, day.width) == (False, 5)  # nothing was missing, so nothing could be learnt of it


def test_gaps_are_filled_with_a_constant_by_column(tmp_path: Path) -> None:
    columns = {
        "number": {"missing": "constant", "missing_value": -1},
        "colour": {"missing": "constant", "missing_value": "none", "missing_indicator": True},
        "day": {"missing": "constant", "missing_value": "1970-01-11"},
    }
    dataset = _prepare(tmp_path, columns=columns)
    x_train, colour = dataset.arrays.x_train, dataset.inputs.columns[1]
    told = x_train[:, 4] == 1

    assert [step.fill for step in dataset.preprocessing.steps] == [-1.0, 1.0, 10.0]
    assert colour.categories == ("blue", "none", "red")
    assert set(x_train[told, 0]) == {-1.0}
    np.testing.assert_array_equal(x_train[told, 1:4], [[0, 1, 0]] * int(told.sum()))


def test_a_column_of_its_own_policy_leaves_the_others_to_theirs(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, missing="mean", columns={"colour": {"missing": "drop"}})

    assert sum(dataset.num_rows.values()) == NUM_ROWS - 40
    assert [column.nullable for column in dataset.inputs.columns] == [True, False, True]


def test_filled_columns_are_scaled_and_categories_and_indicators_stay_0_and_1(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, missing="mean", missing_indicator=True, normalize="standard")
    x_train = dataset.arrays.x_train

    np.testing.assert_allclose(x_train[:, [0, 5]].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(x_train[:, [0, 5]].std(axis=0), 1, atol=1e-4)
    assert set(np.unique(x_train[:, 1:5])) == {0.0, 1.0}


def test_categories_are_those_of_the_training_rows(tmp_path: Path) -> None:
    sealed = _prepare(tmp_path, missing="drop").holdout.column("number").to_pylist()
    colours = ["green" if number in sealed else colour for number, colour in zip(NUMBERS, COLOURS, strict=True)]
    test = _table(colour=colours).filter(pa.array(np.isin(NUMBERS, sealed) & ~GAPS))
    parquet.write_table(test, tmp_path / "test.parquet")
    train = _table(colour=COLOURS).filter(pa.array(~np.isin(NUMBERS, sealed) & ~GAPS))
    split = {"source": None, "train": str(tmp_path / "rows.parquet"), "test": str(tmp_path / "test.parquet")}

    dataset = _prepare(tmp_path, train, **split)

    assert dataset.num_rows["holdout"] == test.num_rows
    assert dataset.inputs.columns[1].categories == ("blue", "red")
    assert set(dataset.inputs.from_table(dataset.holdout)[:, 1]) == {-1.0}
    assert _faults(tmp_path, train, unknown_category="refuse", **split) == (
        f"data.source: row {train.num_rows}: 'colour' is not a category that training saw: 'green'; "
        'set data.unknown_category = "ignore", or leave those rows out of the source',
    )


BAD: list[tuple[str, pa.Table, dict[str, Any], str]] = [
    (
        "labels that are missing",
        _table(label=[None, "", *["a", "b"] * 99]),
        {"missing": "mean"},
        "data.target: column 'label' has 2 empty values (in rows 0, 1); leave those rows out of the source",
    ),
    (
        "NaN as a label",
        _table(label=[float("nan"), *[1.0] * 100, *[0.0] * 99]),
        {"missing": "mean"},
        "data.target: column 'label' has 1 empty values (in row 0)",
    ),
    ("labels of one value", _table(label=["a"] * NUM_ROWS), {"missing": "mean"}, "has a single class (a)"),
    ("no complete row", _table(number=pa.nulls(NUM_ROWS, pa.float64())), {"missing": "drop"}, "leaves no row"),
    (
        "nothing to fit on",
        _table(number=pa.nulls(NUM_ROWS, pa.float64())),
        {"missing": "median"},
        "data.source: column 'number' is empty in every training row; leave it out in data.features",
    ),
    (
        "a constant of another kind",
        _table(),
        {"missing": "constant", "missing_value": "none"},
        "data.missing_value: 'none' cannot fill column 'number', which holds numbers; set data.columns.number.missing",
    ),
    (
        "an infinite value among gaps",
        _table(number=[None, float("inf"), *[1.0] * 198]),
        {"missing": "drop", "features": ["number"]},
        "data.source: column 'number' holds NaN or infinite values, first in row 1 of 1 such rows",
    ),
    (
        "an infinite value where gaps are filled",
        _table(number=[None, float("inf"), *[1.0] * 198]),
        {"missing": "mean", "features": ["number"]},
        "data.source: row 1: 'number' is no finite number",
    ),
    (
        "a date that is none",
        _table(day=["2024-01-01", "soon", *["2024-01-02", "2024-01-03"] * 99]),
        {"features": ["day"], "columns": {"day": {"kind": "date"}}},
        "data.source: row 1: 'day': expected a date such as",
    ),
    ("more components than inputs", _table(), {"features": ["day"], "pca": 6}, "data.pca: 6 components, but there are"),
    ("a group that is not there", _table(), {"group": "patient"}, "data.group: no column 'patient'"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "spec", "expected"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_data_that_cannot_be_cleaned_is_told_in_a_line(
    tmp_path: Path, table: pa.Table, spec: dict[str, Any], expected: str
) -> None:
    (fault,) = [fault for fault in _faults(tmp_path, table, **spec) if "'day'" not in fault or "'day'" in expected]

    assert expected in fault


def test_a_class_that_no_training_row_has_is_told_with_its_rows(tmp_path: Path) -> None:
    parquet.write_table(_table(label=["no", "maybe"] * 100).slice(0, 4), tmp_path / "test.parquet")

    (fault,) = _faults(
        tmp_path, source=None, train=str(tmp_path / "rows.parquet"), test=str(tmp_path / "test.parquet"), missing="mean"
    )

    assert fault == (
        "data.target: 'maybe' of 'label' is in no training row, only in rows 1, 3 of data.test; "
        "give it more rows, or leave it out of the source"
    )


def test_a_regression_target_of_one_value_is_told(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"x": np.arange(50.0), "label": np.full(50, 2.5)}), tmp_path / "rows.parquet")

    with pytest.raises(SpecError, match=r"^data\.target: 'label' is 2\.5 in every training row; there is nothing to"):
        prepare_dataset(DataSpec(source=str(tmp_path / "rows.parquet"), target="label"), "regression")


def test_rows_of_a_group_stay_together_and_the_group_is_no_input(tmp_path: Path) -> None:
    patients = [f"p{row // 10}" for row in range(NUM_ROWS)]
    dataset = _prepare(tmp_path, _table(patient=patients, number=np.arange(NUM_ROWS)), group="patient", missing="drop")

    sealed = {int(number) // 10 for number in dataset.holdout.column("number").to_pylist()}
    seen = {int(number) // 10 for number in (*dataset.arrays.x_train[:, 0], *dataset.arrays.x_val[:, 0])}
    assert [column.name for column in dataset.inputs.columns] == ["number", "colour", "day"]
    assert sealed and not sealed & seen


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.chunked_array([["a", ""], [None]]), [False, True, True]),
        (pa.array([1.0, float("nan"), None]), [False, True, True]),
        (pa.array(["a", "", None]).dictionary_encode(), [False, True, True]),
        (pa.array([1, None]), [False, True]),
        (pa.nulls(2), [True, True]),
    ],
)
def test_null_nan_and_the_empty_string_are_missing(values: Any, expected: list[bool]) -> None:
    assert missing_mask(pa.table({"x": values}).column("x")).tolist() == expected


def test_rows_are_named_up_to_a_few() -> None:
    assert rows_named([3]) == "row 3"
    assert rows_named(np.arange(2000)) == "rows 0, 1, 2, 3, 4 and 1,995 more"
