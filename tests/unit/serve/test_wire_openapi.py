from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from bigray.bundle import ModelBundle
from bigray.inference import Predictor
from bigray.serve.wire.bodies import decode_predict, encode_records
from bigray.serve.wire.openapi import openapi_document
from bigray.serve.wire.protocol import decode_infer, describe_model, encode_infer


@pytest.fixture(params=["bundle", "regression_bundle"])
def one(request: pytest.FixtureRequest) -> ModelBundle:
    return request.getfixturevalue(request.param)


def content(document: dict[str, Any], path: str, media_type: str = "application/json") -> dict[str, Any]:
    return document["paths"][path]["post"]["requestBody"]["content"][media_type]


def answer_schema(document: dict[str, Any], path: str, method: str = "post") -> dict[str, Any]:
    schema = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
    return schema | {"components": document["components"]}


def test_its_examples_are_requests_that_work(one: ModelBundle):
    document = openapi_document(one.manifest, one.version)
    predict = content(document, "/predict")
    jsonschema.validate(predict["example"], predict["schema"])
    body = json.dumps(predict["example"]).encode()
    assert len(decode_predict(body, "application/json", one.manifest)) == 1
    infer = content(document, f"/v2/models/{one.manifest.name}/infer")
    jsonschema.validate(infer["example"], infer["schema"])
    assert len(decode_infer(json.dumps(infer["example"]).encode(), one.manifest).rows) == 1


def test_its_example_of_csv_works(regression_bundle: ModelBundle):
    csv = content(openapi_document(regression_bundle.manifest, "abc"), "/predict", "text/csv")
    jsonschema.validate(csv["example"], csv["schema"])
    assert len(decode_predict(csv["example"].encode(), "text/csv", regression_bundle.manifest)) == 1


def test_answers_are_what_it_says(one: ModelBundle):
    document = openapi_document(one.manifest, one.version)
    predictions = Predictor(one).run(np.ones((2, *one.manifest.inputs.input_shape), np.float32))
    jsonschema.validate(json.loads(encode_records(predictions, "m", "v")), answer_schema(document, "/predict"))
    infer = f"/v2/models/{one.manifest.name}/infer"
    request = decode_infer(json.dumps(content(document, infer)["example"]).encode(), one.manifest)
    jsonschema.validate(json.loads(encode_infer(predictions, request, "m", "v").body), answer_schema(document, infer))
    model = answer_schema(document, f"/v2/models/{one.manifest.name}", "get")
    jsonschema.validate(describe_model(one.manifest, ["a"], "torch"), model)


def test_a_record_that_cannot_be_predicted_is_outside_its_schema(regression_bundle: ModelBundle):
    schema = content(openapi_document(regression_bundle.manifest, "abc"), "/predict")["schema"]
    for record in (
        {"width": 1},
        {"width": "1", "height": 2},
        {"width": None, "height": 2},
        {"width": 1e39, "height": 2},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"records": [record]}, schema)


def test_it_names_columns_and_classes(bundle: ModelBundle):
    text = json.dumps(openapi_document(bundle.manifest, "abc"))
    assert all(f'"{word}"' in text for word in ("image", "cat", "dog", "fox"))


def test_it_describes_every_route(bundle: ModelBundle):
    document = openapi_document(bundle.manifest, "abc")
    model = "/v2/models/animals"
    expected = {"/", "/card", "/stats", "/metrics", "/predict", "/openapi.json", "/v2", "/v2/repository/index"}
    expected |= {"/v2/health/live", "/v2/health/ready"}
    for root in (model, f"{model}/versions/{{version}}"):
        expected |= {root, f"{root}/ready", f"{root}/config", f"{root}/infer"}
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]) == expected


def test_pictures_are_offered_only_where_the_model_takes_them(bundle: ModelBundle, regression_bundle: ModelBundle):
    def offered(one: ModelBundle) -> set[str]:
        document = openapi_document(one.manifest, "abc")
        return set(document["paths"]["/predict"]["post"]["requestBody"]["content"])

    assert "image/png" in offered(bundle)
    assert "text/csv" not in offered(bundle)
    assert "image/png" not in offered(regression_bundle)
    assert "text/csv" in offered(regression_bundle)


def test_every_reference_leads_somewhere(one: ModelBundle):
    document = openapi_document(one.manifest, "abc")

    def references(value: Any):
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    found = set(references(document))
    assert found
    for reference in found:
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
