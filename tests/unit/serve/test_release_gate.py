"""What the gate decides; that it does so with real processes is in tests/integration/test_gate.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bigray.bundle import Golden, ModelBundle, OutputSchema
from bigray.data.features import Column, FeatureSchema
from bigray.inference import Predictor
from bigray.serve.release.gate import Latency, latency_fault, schema_difference
from bigray.serve.release.golden import check_golden, describe_difference


def test_a_model_gives_its_own_golden_answers(bundle: ModelBundle, regression_bundle: ModelBundle) -> None:
    for one in (bundle, regression_bundle):
        assert check_golden(one, Predictor(one)) is None


def test_golden_answers_of_another_model_are_told_with_the_row_that_is_furthest(bundle: ModelBundle) -> None:
    assert bundle.golden is not None
    outputs = bundle.golden.outputs.copy()
    outputs[5, 1] += 3
    other = replace(bundle, golden=Golden(bundle.golden.inputs, outputs))

    difference = check_golden(other, Predictor(bundle))

    assert difference is not None
    assert difference.startswith("golden answers: row 5 of 32 is off by 3")


def test_a_bundle_without_golden_answers_does_not_pass(bundle: ModelBundle) -> None:
    assert "has no golden.safetensors" in (check_golden(replace(bundle, golden=None), Predictor(bundle)) or "")


@pytest.mark.parametrize(
    ("answered", "passes"),
    [
        ([[1.0, -200.1]], True),
        ([[1.0, -200.3]], False),
        ([[1.0, float("nan")]], False),
        ([[1.0, float("-inf")]], False),
        ([[1.0]], False),
    ],
    ids=["near", "far", "nan", "infinite", "shape"],
)
def test_answers_may_differ_by_a_thousandth_of_the_largest(answered: list[list[float]], passes: bool) -> None:
    expected = np.array([[1.0, -200.0]], np.float32)

    assert (describe_difference(np.array(answered, np.float32), expected) is None) is passes


def test_a_golden_answer_that_is_no_number_is_met_by_none() -> None:
    golden = np.array([[np.nan]], np.float32)

    assert describe_difference(np.zeros((1, 1), np.float32), golden) is not None
    assert describe_difference(golden, golden) is not None


@pytest.mark.parametrize(
    ("inputs", "outputs", "difference"),
    [
        ({}, {}, None),
        ({}, {"target": "species"}, None),
        ({"columns": (Column(name="photo", shape=(2, 3)),)}, {}, "input 'photo' is of shape (2, 3), of the live"),
        ({"columns": (Column(name="image", shape=(3, 2)),)}, {}, "input 'image' is of shape (3, 2), of the live"),
        ({}, {"class_names": ("dog", "cat", "fox")}, "outputs: class_names is ('dog', 'cat', 'fox'), of the live"),
        ({}, {"task": "regression", "class_names": ()}, "outputs: task is 'regression', of the live"),
    ],
)
def test_a_schema_differs_where_a_caller_would_trip_over_it(
    bundle: ModelBundle, inputs: dict[str, Any], outputs: dict[str, Any], difference: str | None
) -> None:
    live = bundle.manifest
    new = live.model_copy(
        update={
            "inputs": FeatureSchema(**{"columns": live.inputs.columns, **inputs}),
            "outputs": OutputSchema(**{**live.outputs.model_dump(), **outputs}),
        }
    )

    found = schema_difference(new, live)

    assert found == difference or (difference is not None and (found or "").startswith(difference))


def test_columns_in_another_order_are_another_schema(regression_bundle: ModelBundle) -> None:
    live = regression_bundle.manifest
    new = live.model_copy(update={"inputs": FeatureSchema(columns=live.inputs.columns[::-1])})

    assert schema_difference(new, live) == "inputs come in another order, 'height' first"


@pytest.mark.parametrize(
    ("p50_ms", "p99_ms", "live_ms", "slo_ms", "fault"),
    [
        (1.0, 5.0, None, None, None),
        (1.0, 5.0, None, 4.0, "p99 5.0 ms of single rows is above the SLO of 4 ms"),
        (9.0, 9.5, 1.0, None, None),
        (11.0, 12.0, 1.0, None, "p50 11.0 ms of single rows, 11 times the live version's"),
        (0.9, 1.0, 0.05, None, None),
    ],
    ids=["alone", "slo", "some slower", "much slower", "a millisecond is nothing"],
)
def test_a_version_is_too_slow_by_its_slo_or_beside_the_live_one(
    p50_ms: float, p99_ms: float, live_ms: float | None, slo_ms: float | None, fault: str | None
) -> None:
    live = None if live_ms is None else Latency(200, live_ms, live_ms)

    assert latency_fault(Latency(200, p50_ms, p99_ms), live, slo_ms) == fault
