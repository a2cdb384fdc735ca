"""What is told of a job's rows before anything is trained on them."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
from PIL import Image

from bigray.data.inspection import image_sheet, inspect

KINDS = {"age": "number", "city": "category"}


def table(ages, cities, labels):
    return pa.table({"age": pa.array(ages, pa.float64()), "city": cities, "sick": labels})


def parts(**tables):
    usual = {"train": table([30, 40, 50, 60], ["Rom", "Bonn", "Rom", "Rom"], ["no", "yes", "no", "yes"])}
    return {**usual, **tables}


def report(**tables):
    return inspect(parts(**tables), "sick", KINDS, is_classes=True)


def test_rows_are_counted_by_part_and_class():
    found = report(holdout=table([35], ["Rom"], ["no"]))
    assert found.rows == {"train": 4, "holdout": 1}
    assert found.classes == {"no": {"train": 2, "holdout": 1}, "yes": {"train": 2, "holdout": 0}}
    assert "class 'yes' has no rows in holdout" in found.warnings


def test_a_column_of_numbers_has_its_range_its_gaps_and_its_outliers():
    ages = [*range(20, 60), 4000, None, float("nan")]
    number, category = report(train=table(ages, ["Rom"] * 43, ["no"] * 43)).columns
    assert (number.low, number.high, number.missing, number.outliers) == (20, 4000, 2, 1)
    assert number.distinct == 41
    assert (category.distinct, category.most_common, category.missing) == (1, (("Rom", 43),), 0)


def test_a_column_with_one_value_is_told():
    found = report(train=table([1, 2], ["Rom", "Rom"], ["no", "yes"]))
    assert "column 'city' has one value in all rows, which teaches nothing" in found.warnings


def test_rows_with_the_features_of_training_rows_are_a_leak():
    found = report(holdout=table([30, 99], ["Rom", "Rom"], ["yes", "no"]))
    assert found.leaks == {"train, holdout": 1}
    assert found.contradictions == 1
    assert any("1 rows of holdout have the same features as rows of train" in line for line in found.warnings)


def test_rows_that_are_there_twice_are_counted():
    found = report(train=table([1, 1, 1], ["a", "a", "a"], ["no", "no", "no"]))
    assert (found.duplicates, found.contradictions, found.leaks) == (2, 0, {})


def test_a_class_that_is_ten_times_as_large_is_told():
    found = report(train=table(range(12), ["a"] * 12, ["no"] * 11 + ["yes"]))
    assert any("class 'no' has 11 rows and class 'yes' 1" in line for line in found.warnings)


def test_clean_data_has_no_warning():
    assert report(validation=table([33, 44], ["Bonn", "Rom"], ["no", "yes"])).warnings == ()


def test_it_is_json():
    document = json.loads(json.dumps(report().to_json()))
    assert document["rows"] == {"train": 4}
    assert document["examples"][0] == {"age": 30.0, "city": "Rom", "sick": "no"}


def test_a_sheet_shows_the_classes_in_turn():
    images = np.zeros((4, 3, 8, 8), dtype=np.uint8)
    images[3, 0] = 255  # the only picture of its class, the last of all
    sheet = np.asarray(Image.open(io.BytesIO(image_sheet(images, ["a", "a", "a", "b"]))))
    assert sheet[30, 68 + 30].tolist() == [255, 0, 0]
    assert sheet[30, 30].tolist() == [0, 0, 0]
