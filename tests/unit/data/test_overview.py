"""What `bigray data` finds in a job's data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bigray.data.overview import TableReport, TextReport, look_at, to_pixels
from bigray.errors import SpecError
from bigray.specs import BuiltInTask, ColumnSpec, DataSpec


def _spec(folder: Path, header: str, rows: list[str], **settings: Any) -> DataSpec:
    (folder / "rows.csv").write_text("\n".join([header, *rows]) + "\n")
    return DataSpec(source=str(folder / "rows.csv"), **settings)


def _look(spec: DataSpec, task: BuiltInTask) -> TableReport:
    found = look_at(spec, task)
    assert isinstance(found, TableReport)
    return found


@pytest.fixture
def gaps(tmp_path: Path) -> DataSpec:
    rows = [f"{number if number % 10 else ''},{number / 7:.3f},{number % 3}" for number in range(60)]
    return _spec(tmp_path, "size,weight,label", rows, target="label")


def test_gaps_that_training_refuses_are_shown_and_not_an_error(gaps: DataSpec) -> None:
    found = _look(gaps, "classification")

    assert {column.name: column.missing for column in found.report.columns} == {"size": 6, "weight": 0}
    assert found.warnings[0] == (
        "column 'size' has 6 empty values, which training refuses: "
        "fill them in the source, or say what to do in data.missing"
    )


@pytest.mark.parametrize("columns", [{}, {"size": ColumnSpec(missing="mean")}])
def test_gaps_that_the_job_fills_are_no_warning(gaps: DataSpec, columns: dict[str, ColumnSpec]) -> None:
    update = {"columns": columns} if columns else {"missing": "median"}

    assert _look(gaps.model_copy(update=update), "classification").warnings == ()


def test_rows_that_are_left_out_are_counted(gaps: DataSpec) -> None:
    found = _look(gaps.model_copy(update={"missing": "drop"}), "classification")

    assert sum(found.rows.values()) == 54
    assert found.warnings == ("data.missing: left out 6 rows with empty values",)


def test_the_parts_and_classes_are_those_of_training(gaps: DataSpec) -> None:
    from bigray.data.dataset import prepare_dataset

    found = _look(gaps, "classification")

    assert found.rows == prepare_dataset(gaps.model_copy(update={"missing": "mean"}), "classification").num_rows
    assert sorted(found.report.classes) == ["0", "1", "2"]
    assert {name: sum(counts.values()) for name, counts in found.report.classes.items()} == {"0": 20, "1": 20, "2": 20}


def test_of_many_labels_a_row_counts_for_each_that_it_has(tmp_path: Path) -> None:
    rows = [f"{number},{'red|round' if number % 2 else 'red'}" for number in range(40)]
    found = _look(_spec(tmp_path, "x,labels", rows, target="labels"), "multilabel")

    assert {name: sum(counts.values()) for name, counts in found.report.classes.items()} == {"red": 40, "round": 20}


def test_a_target_of_numbers_has_a_range_and_no_classes(tmp_path: Path) -> None:
    rows = [f"{number},{2 * number}" for number in range(41)]
    found = _look(_spec(tmp_path, "x,y", rows, target="y"), "regression")

    assert found.report.classes == {}
    assert found.target_range == (0, 40, 80)


def test_windows_of_tokens_in_a_table_are_no_classes(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, (60, 9))
    np.savez(tmp_path / "a.npz", window=tokens[:, :-1], next=tokens[:, 1:])
    found = _look(DataSpec(source=str(tmp_path / "a.npz"), target="next"), "language")

    assert (found.report.classes, found.shape) == ({}, (8,))


def test_of_a_text_the_vocabulary_and_the_stretches_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 250)
    spec = DataSpec(source=str(tmp_path / "a.txt"), target="next", context=10, stride=5)
    found = look_at(spec, "language")

    assert isinstance(found, TextReport)
    assert (found.vocabulary, found.level, found.example) == ((" ", "a", "b", "c"), "character", "abc abc ab")
    assert found.tokens == {"train": 695, "validation": 140, "holdout": 140}
    assert found.warnings == ()


def test_the_sheet_has_pictures_also_of_arrays_of_numbers(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(40, 8, 8))
    np.savez(tmp_path / "a.npz", image=images, label=np.arange(40) % 4)
    found = _look(DataSpec(source=str(tmp_path / "a.npz"), target="label"), "classification")

    assert Image.open(io.BytesIO(found.sheet())).format == "PNG"
    assert found.report.columns[0].type == "double"
    assert found.shape == (8, 8)


def test_a_table_has_no_sheet(gaps: DataSpec) -> None:
    with pytest.raises(SpecError, match="--sheet: is for images, and the inputs are 2 columns"):
        _look(gaps, "classification").sheet()


def test_bytes_stay_as_they_are_and_numbers_are_stretched_to_the_range_of_bytes() -> None:
    pixels = np.array([[[3, 200]]], np.uint8)

    assert to_pixels(pixels).tolist() == [[[[3, 200]]]]
    assert to_pixels(pixels.astype(np.float32)).tolist() == [[[[0, 255]]]]
    assert to_pixels(np.zeros((1, 3, 2, 2), np.float32)).shape == (1, 3, 2, 2)
