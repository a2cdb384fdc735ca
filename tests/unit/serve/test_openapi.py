from __future__ import annotations

import json

from bigray.bundle import ModelBundle
from bigray.serve.openapi import openapi_document
from bigray.serve.protocol import decode_infer, decode_records


def example(document, path):
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]


def test_its_examples_are_requests_that_work(bundle: ModelBundle, regression_bundle: ModelBundle):
    for one in (bundle, regression_bundle):
        document = openapi_document(one.manifest, one.version)
        assert len(decode_records(json.dumps(example(document, "/predict")).encode(), one.manifest.inputs)) == 1
        infer = example(document, f"/v2/models/{one.manifest.name}/infer")
        assert len(decode_infer(json.dumps(infer).encode(), one.manifest).rows) == 1


def test_it_names_columns_and_classes(bundle: ModelBundle):
    text = json.dumps(openapi_document(bundle.manifest, "abc"))
    assert all(f'"{word}"' in text for word in ("image", "cat", "dog", "fox"))


def test_it_describes_every_route_of_the_model(bundle: ModelBundle):
    document = openapi_document(bundle.manifest, "abc")
    assert document["openapi"] == "3.1.0"
    assert {"/predict", "/v2/models/animals", "/v2/models/animals/infer"} <= set(document["paths"])
