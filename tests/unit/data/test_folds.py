from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bigray.data.dataset import prepare_dataset
from bigray.data.folds import Fold, prepare_with_folds
from bigray.errors import SpecError
from bigray.specs import BuiltInTask, DataSpec

NUM_ROWS = 90


def _columns() -> dict[str, Any]:
    """`a` tells the rows apart."""
    generator = np.random.default_rng(0)
    label = np.array(["cat", "dog", "fox"])[np.arange(NUM_ROWS) % 3]
    return {"a": np.arange(NUM_ROWS, dtype=np.float64), "b": generator.normal(size=NUM_ROWS), "label": label}


def _spec(folder: Path, table: pa.Table, **spec: Any) -> DataSpec:
    path = folder / "rows.parquet"
    parquet.write_table(table, path)
    return DataSpec.model_validate({"source": str(path), "target": "label", "k_folds": 3, **spec})


def _prepare(
    folder: Path, table: pa.Table | None = None, task: BuiltInTask = "classification", **spec: Any
) -> tuple[Fold, ...]:
    return prepare_with_folds(_spec(folder, pa.table(_columns()) if table is None else table, **spec), task)[1]


def test_without_k_folds_there_are_none(tmp_path: Path) -> None:
    assert _prepare(tmp_path, k_folds=None) == ()


def test_every_row_but_the_holdout_is_validated_on_once_and_trained_on_in_every_other_fold(tmp_path: Path) -> None:
    spec = _spec(tmp_path, pa.table(_columns()))
    arrays = [fold.arrays() for fold in prepare_with_folds(spec, "classification")[1]]
    sealed = set(prepare_dataset(spec, "classification").holdout.column("a").to_pylist())

    assert sealed
    parts = [(set(each.x_train[:, 0].tolist()), set(each.x_val[:, 0].tolist())) for each in arrays]
    assert sorted(row for _, fold in parts for row in fold) == sorted(set(range(NUM_ROWS)) - sealed)
    assert all(len(train) + len(fold) == NUM_ROWS - len(sealed) and not train & fold for train, fold in parts)
    assert all(np.bincount(each.y_val).min() >= 8 for each in arrays), "each class in each fold"


def test_the_source_is_read_once_for_the_usual_split_and_all_folds(
    tmp_path: Path, user_module: Callable[[str], str]
) -> None:
    """The second time the function would give other rows."""
    source = user_module(
        "import numpy as np\ntimes = 0\n\ndef load():\n    global times\n    times += 1\n"
        "    return {'a': np.arange(90.0) + 1000 * times, 'label': np.arange(90) % 3}\n"
    )
    spec = DataSpec(source=f"{source}:load", target="label", k_folds=3)
    dataset, folds = prepare_with_folds(spec, "classification")

    assert dataset.arrays.x_train.max() < 2000
    assert all(fold.arrays().x_train.max() < 2000 for fold in folds)


def test_the_folds_are_the_same_every_time_and_others_with_another_seed_of_the_split(tmp_path: Path) -> None:
    def validated(**spec: Any) -> list[list[float]]:
        return [fold.arrays().x_val[:, 0].tolist() for fold in _prepare(tmp_path, **spec)]

    assert validated() == validated()
    assert validated() != validated(split={"seed": 1})


def test_scaling_is_fitted_on_the_other_folds_alone(tmp_path: Path) -> None:
    for fold in _prepare(tmp_path, normalize="standard"):
        arrays = fold.arrays()
        np.testing.assert_allclose(arrays.x_train.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(arrays.x_train.std(axis=0), 1, atol=1e-5)
        assert abs(arrays.x_val[:, 1].mean()) > 1e-4


def test_a_category_of_one_fold_is_not_known_there(tmp_path: Path) -> None:
    columns = _columns()
    columns["b"] = np.array(["usual"] * (NUM_ROWS - 1) + ["rare"])
    folds = _prepare(tmp_path, pa.table(columns), split={"holdout": 0.0}, features=["a", "b"])

    widths = [fold.model_input_shape[0] for fold in folds]
    (alone,) = [fold for fold in folds if NUM_ROWS - 1 in fold.validation]
    assert widths.count(min(widths)) == 1
    assert alone.model_input_shape == (min(widths),)
    assert alone.inputs.columns[1].categories == ("usual",)


def test_the_size_of_the_arrays_is_known_before_they_are_made(tmp_path: Path) -> None:
    for task, columns in (("classification", _columns()), ("regression", {**_columns(), "label": np.arange(90.0)})):
        for fold in _prepare(tmp_path, pa.table(columns), task):  # type: ignore[arg-type]
            assert fold.nbytes == fold.arrays().nbytes


def test_groups_are_not_parted(tmp_path: Path) -> None:
    columns = {**_columns(), "patient": np.arange(NUM_ROWS) // 6}
    folds = _prepare(tmp_path, pa.table(columns), group="patient")

    patients = [set((fold.arrays().x_val[:, 0] // 6).tolist()) for fold in folds]
    assert all(patients)
    assert sum(map(len, patients)) == len(set.union(*patients))


def test_of_a_given_split_the_rows_to_train_on_are_cut(tmp_path: Path) -> None:
    table = pa.table(_columns())
    train, test = tmp_path / "train.parquet", tmp_path / "test.parquet"
    parquet.write_table(table.slice(0, 60), train)
    parquet.write_table(table.slice(60), test)
    spec = DataSpec(train=str(train), test=str(test), target="label", k_folds=3)

    rows = sorted(row for fold in prepare_with_folds(spec, "classification")[1] for row in fold.arrays().x_val[:, 0])
    assert rows == list(range(60))


def test_images_keep_their_shape(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(NUM_ROWS, 2, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "images.npz", image=images, label=np.arange(NUM_ROWS) % 3)
    spec = DataSpec(source=str(tmp_path / "images.npz"), target="label", k_folds=3)
    fold = prepare_with_folds(spec, "classification")[1][0]

    assert fold.arrays().x_train.shape[1:] == fold.model_input_shape == (2, 4, 4)


def test_a_class_that_one_fold_has_for_itself_is_told_with_the_fold(tmp_path: Path) -> None:
    columns = _columns()
    columns["label"][0] = "yak"
    with pytest.raises(SpecError) as caught:
        _prepare(tmp_path, pa.table(columns), split={"holdout": 0.0})

    (fault,) = caught.value.faults
    assert "data.k_folds: fold" in fault
    assert "'yak' of 'label' is in no training row, only in row 0" in fault


def test_more_folds_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"data\.k_folds: 500 folds"):
        _prepare(tmp_path, k_folds=500)


def test_a_fold_of_one_row_has_no_r2(tmp_path: Path) -> None:
    columns = {"a": np.arange(6.0), "label": np.arange(6.0) ** 2}
    with pytest.raises(SpecError, match=r"fold 1 of 5: it has one row, and val_r2 needs at least two"):
        _prepare(tmp_path, pa.table(columns), "regression", k_folds=5, split={"holdout": 0.1, "validation": 0.4})


def test_text_has_no_folds(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"data\.k_folds: the windows of one text overlap"):
        _prepare(tmp_path, task="language")
