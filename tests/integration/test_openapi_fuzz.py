"""Schemathesis against the endpoint's own description: what it says is accepted, refused and answered, is."""

from __future__ import annotations

import pytest

from bigray.data.features import Column
from bigray.serve.sample import write_sample_bundle
from bigray.serve.standalone import standalone_app

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import hypothesis  # noqa: E402

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory):
    columns = (Column(name="width"), Column(name="height"))
    location = write_sample_bundle(
        str(tmp_path_factory.mktemp("fuzz")), name="area", columns=columns, class_names=("small", "large"), onnx=False
    )
    app = standalone_app(location, allow_factories=("bigray.models:*",))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_what_is_answered_is_what_the_description_says(case) -> None:
    # JSON Schema cannot say that a shape fits its data, or that bytes are a picture: so a body that the description
    # allows may be refused with a 400, which is checked to be described as well
    case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])
