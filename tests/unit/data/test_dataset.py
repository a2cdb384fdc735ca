from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from bigray.data.dataset import Dataset, prepare_dataset, table_to_records
from bigray.data.features import Column
from bigray.data.sources import table_from_arrays
from bigray.errors import SpecError
from bigray.specs import BuiltInTask, DataSpec, SplitSpec

NUM_ROWS = 120


def _columns() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "a": generator.normal(2.0, 3.0, NUM_ROWS),
        "b": generator.integers(0, 50, NUM_ROWS),
        "label": generator.choice(["cat", "dog", "fox"], NUM_ROWS),
    }


def _prepare(folder: Path, table: pa.Table, task: BuiltInTask = "classification", **spec: Any) -> Dataset:
    path = folder / "rows.parquet"
    parquet.write_table(table, path)
    return prepare_dataset(DataSpec.model_validate({"source": str(path), "target": "label", **spec}), task)


def _faults(folder: Path, table: pa.Table, task: BuiltInTask = "classification", **spec: Any) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        _prepare(folder, table, task, **spec)
    return caught.value.faults


def test_the_parts_are_sealed_off_and_described(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, pa.table(_columns()))

    assert sum(dataset.num_rows.values()) == NUM_ROWS
    assert dataset.arrays.x_train.shape == (dataset.num_rows["train"], 2)
    assert dataset.arrays.x_train.dtype == np.float32
    assert dataset.arrays.y_val.dtype == np.int64
    assert [column.name for column in dataset.inputs.columns] == ["a", "b"]
    assert dataset.outputs.class_names == ("cat", "dog", "fox")
    assert dataset.outputs.num_outputs == 3
    assert dataset.holdout.column_names == ["a", "b", "label"]


def test_ranges_are_of_raw_values_and_know_nothing_of_the_holdout(tmp_path: Path) -> None:
    columns = _columns()
    columns["a"] = columns["a"].astype(np.float64) * 0.1
    dataset = _prepare(tmp_path, pa.table(columns), normalize="standard")

    sealed = set(dataset.holdout.column("a").to_pylist())
    seen = [value for value in columns["a"].tolist() if value not in sealed]
    assert dataset.ranges["a"] == pytest.approx((min(seen), max(seen)), rel=1e-6)
    assert set(dataset.ranges) == {"a", "b"}


def test_targets_are_the_numbers_of_their_class_names(tmp_path: Path) -> None:
    table = pa.table({"a": np.arange(NUM_ROWS), "label": np.where(np.arange(NUM_ROWS) % 2, "odd", "even")})
    dataset = _prepare(tmp_path, table)
    names = np.array(dataset.outputs.class_names)[dataset.arrays.y_train]

    np.testing.assert_array_equal(names, np.where(dataset.arrays.x_train[:, 0] % 2, "odd", "even"))


def test_the_holdout_keeps_its_raw_values_and_true_answers(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, pa.table(_columns()), normalize="standard")
    raw = set(zip(_columns()["a"].tolist(), _columns()["label"].tolist(), strict=True))

    held_out = list(zip(dataset.holdout.column("a").to_pylist(), dataset.holdout_targets(), strict=True))

    assert len(held_out) == dataset.num_rows["holdout"] > 0
    assert set(held_out) <= raw


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pa.array([0.0, 1.0]), (0, 1)),
        (pa.array([False, True]), (0, 1)),
        (pa.array([3, 5], pa.int8()), (3, 5)),
        (pa.array(["0.0", "yes"]), ("0.0", "yes")),
        (
            pa.array([0, 86_400_000_000], pa.timestamp("us")),
            ("1970-01-01T00:00:00.000000", "1970-01-02T00:00:00.000000"),
        ),
    ],
    ids=["floats", "booleans", "integers", "strings", "times"],
)
def test_the_true_answers_are_class_names(tmp_path: Path, labels: pa.Array, names: tuple[int | str, ...]) -> None:
    rows = np.arange(NUM_ROWS)
    dataset = _prepare(tmp_path, pa.table({"a": rows, "label": labels.take(pa.array(rows % 2))}))
    truth = dataset.holdout_targets()

    assert dataset.outputs.class_names == names
    assert truth == [names[row % 2] for row in dataset.holdout.column("a").to_pylist()]
    assert {type(name) for name in truth} == {type(names[0])}


def test_the_true_answers_of_a_regression_are_its_values(tmp_path: Path) -> None:
    table = pa.table({"a": np.arange(NUM_ROWS), "label": np.arange(NUM_ROWS) / 4})
    dataset = _prepare(tmp_path, table, "regression")

    assert dataset.holdout_targets() == dataset.holdout.column("label").to_pylist()


def test_standardisation_is_fitted_on_the_training_rows_only(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, pa.table(_columns()), normalize="standard")
    raw = _prepare(tmp_path, pa.table(_columns()), normalize="none")

    np.testing.assert_allclose(dataset.preprocessing.center, raw.arrays.x_train.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(dataset.preprocessing.scale, raw.arrays.x_train.std(axis=0, dtype=np.float64))
    np.testing.assert_array_equal(dataset.arrays.x_val, dataset.preprocessing.apply(raw.arrays.x_val))


def test_a_holdout_value_has_no_part_in_the_standardisation(tmp_path: Path) -> None:
    columns = _columns()
    before = _prepare(tmp_path, pa.table(columns), normalize="standard")
    sealed = before.holdout.column("a")[0].as_py()
    # the changed row may change sides with its hash; only a change that leaves it sealed tells something
    for value in range(1000, 1100):
        changed = np.where(columns["a"] == sealed, float(value), columns["a"])
        after = _prepare(tmp_path, pa.table({**columns, "a": changed}), normalize="standard")
        if float(value) in after.holdout.column("a").to_pylist() and after.num_rows == before.num_rows:
            break
    else:
        pytest.fail("no changed value kept its row in the holdout")

    assert after.preprocessing == before.preprocessing
    assert after.fingerprint != before.fingerprint


def test_a_constant_column_is_0_and_not_nan(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, pa.table({**_columns(), "b": np.full(NUM_ROWS, 7)}), normalize="standard")

    assert np.all(dataset.arrays.x_train[:, 1] == 0)
    assert np.all(dataset.arrays.x_val[:, 1] == 0)


def test_the_named_features_are_used_in_their_order(tmp_path: Path) -> None:
    table = pa.table({**_columns(), "comment": ["x"] * NUM_ROWS})
    dataset = _prepare(tmp_path, table, features=["b", "a"])

    assert [column.name for column in dataset.inputs.columns] == ["b", "a"]


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 5)])
def test_a_tensor_column_is_the_input_as_it_is(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).normal(size=(NUM_ROWS, *shape)).astype(np.float32)
    dataset = _prepare(tmp_path, table_from_arrays({"image": images, "label": np.arange(NUM_ROWS) % 3}))

    assert dataset.inputs.input_shape == shape
    assert dataset.arrays.x_train.shape[1:] == shape
    assert {image.tobytes() for image in dataset.arrays.x_train} <= {image.tobytes() for image in images}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (np.arange(NUM_ROWS) % 3 + 5, (5, 6, 7)),
        (np.arange(NUM_ROWS) % 2 == 0, (0, 1)),
        ((np.arange(NUM_ROWS) % 2).astype(float), (0, 1)),
    ],
    ids=["integers", "booleans", "whole floats"],
)
def test_classes_may_be_numbers(tmp_path: Path, values: Any, names: tuple[int, ...]) -> None:
    assert _prepare(tmp_path, pa.table({**_columns(), "label": values})).outputs.class_names == names


def test_regression_targets_are_values(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, pa.table({"a": np.arange(NUM_ROWS), "label": np.arange(NUM_ROWS) / 4}), "regression")

    np.testing.assert_array_equal(dataset.arrays.y_train, dataset.arrays.x_train[:, 0] / 4)
    assert dataset.arrays.y_train.dtype == np.float32
    assert (dataset.outputs.num_outputs, dataset.outputs.class_names) == (1, ())


@pytest.mark.parametrize(
    "features",
    [{"a": np.arange(NUM_ROWS) % 2 == 0}, {"a": np.arange(NUM_ROWS) % 2 == 0, "b": np.arange(NUM_ROWS) % 3 == 0}],
    ids=["one", "two"],
)
def test_the_example_row_is_one_that_an_endpoint_accepts_even_where_all_features_are_booleans(
    tmp_path: Path, features: dict[str, Any]
) -> None:
    dataset = _prepare(tmp_path, pa.table({**features, "label": np.arange(NUM_ROWS)}), "regression")

    np.testing.assert_array_equal(dataset.inputs.from_records([dataset.example])[0], dataset.arrays.x_train[0])


def test_the_example_is_a_raw_training_row(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(NUM_ROWS, 2, 2)).astype(np.float32)
    table = table_from_arrays({"image": images, "label": np.arange(NUM_ROWS) % 2})
    dataset = _prepare(tmp_path, table, normalize="standard")
    row = dataset.inputs.from_records([dataset.example])

    np.testing.assert_array_equal(dataset.preprocessing.apply(row)[0], dataset.arrays.x_train[0])


def test_records_of_a_table_hold_plain_values() -> None:
    table = table_from_arrays({"x": np.array([1, 2]), "image": np.zeros((2, 1, 2)), "name": np.array(["a", "b"])})

    assert table_to_records(table) == [
        {"x": 1, "image": [[0.0, 0.0]], "name": "a"},
        {"x": 2, "image": [[0.0, 0.0]], "name": "b"},
    ]


def test_a_missing_target_is_told_with_a_near_match(tmp_path: Path) -> None:
    assert _faults(tmp_path, pa.table(_columns()), target="lable") == (
        "data.target: no column 'lable', did you mean 'label'?",
    )


def test_missing_features_are_told_together_with_a_missing_target(tmp_path: Path) -> None:
    faults = _faults(tmp_path, pa.table(_columns()), target="x", features=["a", "c", "d"])

    assert [fault.split(" ")[0] for fault in faults] == ["data.target:", "data.features:", "data.features:"]


def test_the_target_cannot_be_a_feature(tmp_path: Path) -> None:
    assert _faults(tmp_path, pa.table(_columns()), features=["a", "label"]) == ("data.features: 'label' is the target",)


def test_a_table_of_nothing_but_the_target_is_told(tmp_path: Path) -> None:
    (fault,) = _faults(tmp_path, pa.table({"label": [0, 1]}))

    assert "has no column besides the target" in fault


def _with(**columns: Any) -> pa.Table:
    return pa.table({**_columns(), **columns})


def _one(value: Any, usual: Any) -> list[Any]:
    return [value, *[usual] * (NUM_ROWS - 1)]


BAD: list[tuple[str, pa.Table, BuiltInTask, str]] = [
    ("nan", _with(a=_one(float("nan"), 1.0)), "classification", "NaN or infinite values"),
    ("infinity", _with(a=_one(float("inf"), 1.0)), "classification", "NaN or infinite values"),
    ("nulls", _with(a=_one(None, 1.0)), "classification", "column 'a' has 1 empty values"),
    ("nulls in the target", _with(label=_one(None, "x")), "classification", "column 'label' has 1 empty values"),
    (
        "strings",
        _with(a=[f"x{i}" for i in range(NUM_ROWS)]),
        "classification",
        "column 'a' is text with 120 distinct values",
    ),
    ("one class", _with(label=["x"] * NUM_ROWS), "classification", "has a single class (x)"),
    ("fractions", _with(label=np.arange(NUM_ROWS) / 7), "classification", "use training.task = 'regression'"),
    ("words", _with(), "regression", "is not a column of numbers, which regression needs"),
    ("nan in the target", _with(label=_one(float("nan"), 1.0)), "regression", "has 1 empty values (in row 0)"),
    (
        "vectors as regression target",
        _with(label=[[1.0, 2.0]] * NUM_ROWS),
        "regression",
        "is not a column of numbers, which regression needs",
    ),
    ("vectors as classes", _with(label=[[0, 1], [1, 0]] * (NUM_ROWS // 2)), "classification", "data.target: 'label'"),
    (
        "a tensor among scalars",
        _with(a=[[1.0, 2.0]] * NUM_ROWS),
        "classification",
        "tensor column 'a' cannot be mixed with others",
    ),
]


@pytest.mark.parametrize(("table", "task", "expected"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_data_that_cannot_be_trained_on_is_told_with_its_key(
    tmp_path: Path, table: pa.Table, task: BuiltInTask, expected: str
) -> None:
    faults = _faults(tmp_path, table, task)

    assert len(faults) == 1
    assert expected in faults[0]
    assert faults[0].startswith("data.")


def test_ragged_lists_are_told(tmp_path: Path) -> None:
    table = pa.table({"a": [[1.0], *[[1.0, 2.0]] * (NUM_ROWS - 1)], "label": np.arange(NUM_ROWS) % 2})

    assert "column 'a' holds lists of different lengths (1 to 2)" in _faults(tmp_path, table)[0]


def test_a_split_without_validation_rows_is_told(tmp_path: Path) -> None:
    table = pa.table({"a": [1.0, 2.0, 3.0], "label": [0.5, 0.1, 0.2]})

    (fault,) = _faults(tmp_path, table, "regression", split=SplitSpec(validation=0.05, holdout=0.1).model_dump())

    assert fault.startswith("data.split.validation: 0.05 leaves no row to validate on; use a larger share")


def test_rows_that_are_all_alike_cannot_be_split_and_the_fault_says_so(tmp_path: Path) -> None:
    table = pa.table({"a": [1.0] * 100, "label": [0, 1] * 50})

    (fault,) = _faults(tmp_path, table)

    assert fault.startswith("data.split: leaves no training rows")


def test_a_split_without_training_rows_is_told(tmp_path: Path) -> None:
    table = pa.table({"a": [1.0] * 8, "label": [0.5] * 8})

    assert _faults(tmp_path, table, "regression") == ("data.split: leaves no training rows",)


def test_one_validation_row_is_too_few_for_regression(tmp_path: Path) -> None:
    """The determination coefficient of a single row does not exist."""
    table = pa.table({"a": np.arange(10.0), "label": np.arange(10.0)})

    (fault,) = _faults(tmp_path, table, "regression", split={"validation": 0.1, "holdout": 0.1})

    assert fault.startswith("data.split.validation: ")


def test_a_fault_of_the_source_carries_its_key(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^data\.source: '.*none\.csv': no such file"):
        prepare_dataset(DataSpec(source=str(tmp_path / "none.csv"), target="label"), "classification")


def test_a_few_validation_rows_are_kept_as_they_came(tmp_path: Path) -> None:
    dataset = _prepare(tmp_path, pa.table(_columns()), normalize="standard")

    assert dataset.golden_rows.shape == (16, 2)
    assert dataset.golden_rows.dtype == np.float32
    kept = {row.tobytes() for row in dataset.preprocessing.apply(dataset.golden_rows)}
    assert kept <= {row.tobytes() for row in dataset.arrays.x_val}


def _photos(folder: Path, broken: int = 0) -> Path:
    """`photos/class/name.png`, the first few of them cut."""
    generator = np.random.default_rng(0)
    for row in range(60):
        path = folder / "photos" / ("cat", "dog")[row % 2] / f"{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (6, 5), dtype=np.uint8)).save(path)
        if row < broken:
            path.write_bytes(path.read_bytes()[:30])
    return folder / "photos"


def _of_photos(folder: Path, **spec: Any) -> Dataset:
    document = {"source": str(folder), "target": "label", **spec}
    return prepare_dataset(DataSpec.model_validate(document), "classification")


def test_of_a_folder_of_pictures_the_pictures_are_the_input(tmp_path: Path) -> None:
    dataset = _of_photos(_photos(tmp_path))

    assert dataset.inputs.columns == (Column(name="image", shape=(1, 6, 5), kind="image"),)
    assert dataset.outputs.class_names == ("cat", "dog")
    assert sum(dataset.num_rows.values()) == 60
    assert dataset.arrays.x_train.shape[1:] == (1, 6, 5)
    assert (dataset.arrays.x_train.min(), dataset.arrays.x_train.max()) == (0, 255)
    assert dataset.ranges == {"image": (0.0, 255.0)}


def test_broken_pictures_are_skipped_up_to_a_share_or_stop_the_job(tmp_path: Path) -> None:
    folder = _photos(tmp_path, broken=2)

    dataset = _of_photos(folder, bad_images="skip", max_bad_share=0.05, image_channels=3)
    with pytest.raises(SpecError) as stopped:
        _of_photos(folder)
    with pytest.raises(SpecError, match=r"^data\.source: column 'image': 2 of 60 pictures cannot be read"):
        _of_photos(folder, bad_images="skip", max_bad_share=0.02)

    assert sum(dataset.num_rows.values()) == 58
    assert dataset.arrays.x_train.shape[1:] == (3, 6, 5)
    assert dataset.notes == (
        "data.bad_images: left out row 0 (cat/00.png): not a PNG or JPEG that can be read and 1 more",
    )
    assert stopped.value.faults[0] == (
        "data.source: column 'image': row 0 (cat/00.png): not a PNG or JPEG that can be read"
    )


def test_a_folder_of_train_and_test_is_a_split_that_is_given(tmp_path: Path) -> None:
    photos = _photos(tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    photos.rename(root / "train")
    test = _photos(tmp_path).rename(root / "test")
    (test / "cat" / "00.png").unlink()

    dataset = _of_photos(root)

    assert dataset.num_rows["holdout"] == 59
    assert dataset.num_rows["train"] + dataset.num_rows["validation"] == 60
