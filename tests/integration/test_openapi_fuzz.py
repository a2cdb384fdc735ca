"""Schemathesis against the endpoint's own description: what it says is accepted, refused and answered, is."""

from __future__ import annotations

import importlib.util

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from bigray.data.features import Column
from bigray.serve.sample import write_sample_bundle
from bigray.serve.standalone import standalone_app

pytestmark = pytest.mark.timeout(300)
SETTINGS = hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


NUMBERS = (Column(name="width"), Column(name="height"))
MIXED = (
    Column(name="width"),
    Column(name="age", nullable=True),
    Column(name="colour", kind="category", categories=("red", "blue", "1"), nullable=True),
    Column(name="level", kind="category", categories=("low", "high"), unknown="refuse"),
    Column(name="born", kind="date", nullable=True),
)


@pytest.fixture(scope="module", params=[NUMBERS, MIXED], ids=["numbers", "mixed"])
def operations(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list:
    location = write_sample_bundle(
        str(tmp_path_factory.mktemp("fuzz")),
        name="area",
        columns=request.param,
        class_names=("small", "large"),
        params={"hidden": [8]},
        onnx=False,
    )
    app = standalone_app(location, allow_factories=("bigray.models:*",))
    api = schemathesis.openapi.from_asgi("/openapi.json", app)
    return [result.ok() for result in api.get_all_operations()]


def test_what_is_answered_is_what_the_description_says(operations) -> None:
    load_all_checks()
    assert len(CHECKS.get_all()) > 5
    asked = set()

    def check(case) -> None:
        asked.add(case.operation.path)
        # JSON Schema cannot say that a shape fits its data, or that bytes are a picture: so a body that the
        # description allows may be refused with a 400, which is checked to be described as well
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    for operation in operations:
        SETTINGS(hypothesis.given(case=operation.as_strategy())(check))()
    assert {"/predict", "/v2/models/area/infer", "/stats", "/card"} <= asked
    if importlib.util.find_spec("captum"):
        assert {"/explain", "/v2/models/area/explain"} <= asked
