from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from bigray.specs import DataSpec


def _spec(**changes: Any) -> DataSpec:
    return DataSpec.model_validate({"source": "rows.csv", "target": "y", **changes})


def test_a_column_has_the_settings_of_all_where_it_has_none_of_its_own() -> None:
    spec = _spec(
        missing="constant",
        missing_value=0,
        categories="embedding",
        columns={
            "a": {"missing": "mean", "missing_indicator": True},
            "b": {"missing_value": "none", "kind": "category"},
        },
    )

    a, b, c = (spec.of_column(name) for name in "abc")

    assert (a.missing, a.missing_value, a.missing_indicator, a.kind) == ("mean", None, True, None)
    assert (b.missing, b.missing_value, b.missing_indicator, b.kind) == ("constant", "none", False, "category")
    assert (c.missing, c.missing_value, c.categories) == ("constant", 0, "embedding")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": None}, "source: give either source, or train and test"),
        ({"train": "a", "test": "b"}, "source: give either source, or train and test"),
        ({"source": None, "train": "a"}, "train, test: a given split has both"),
        ({"missing": "constant"}, "missing: 'constant' with missing_value = None; constant, and it alone, needs one"),
        ({"missing_value": 3}, "missing: 'stop' with missing_value = 3"),
        ({"columns": {"a": {"missing": "constant"}}}, "columns.a.missing: 'constant' with missing_value = None"),
        (
            {"columns": {"a": {"missing": "mean", "missing_value": 1}}},
            "columns.a.missing: 'mean' with missing_value = 1",
        ),
        ({"missing": "constant", "missing_value": float("nan")}, "use text or a finite number"),
        ({"missing": "constant", "missing_value": True}, "use text or a finite number"),
        ({"pca": 3, "columns": {"a": {"categories": "embedding"}}}, "pca: cannot be taken of categories = 'embedding'"),
        ({"image_size": [0, 3]}, "image_size: use [height, width] from 1, got [0, 3]"),
        ({"image_channels": 2}, "Input should be 1 or 3"),
        ({"columns": {"a": {"kind": "text"}}}, "Input should be 'number', 'category', 'date' or 'image'"),
    ],
)
def test_settings_that_do_not_go_together_are_told(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _spec(**changes)

    assert expected in str(caught.value)
