from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import numpy as np
import pytest

from bigray.bundle import ModelBundle
from bigray.inference import Predictor
from bigray.serve.asgi import ModelApp
from bigray.serve.batching import Batcher

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
GOOD = json.dumps({"records": [{"image": IMAGE}]}).encode()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    document: dict


def make_app(bundle: ModelBundle, run) -> ModelApp:
    return ModelApp(bundle, "torch", Batcher(run, 64, use_thread=False), max_body_bytes=1000)


@pytest.fixture
def app(bundle: ModelBundle, predictor: Predictor) -> ModelApp:
    return make_app(bundle, predictor.run)


def call(app: ModelApp, method: str, path: str, body: bytes = b"", *, chunk: int = 300, root_path: str = "") -> Answer:
    """One request, its body in chunks as a server would hand it over."""
    parts = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    sent: list[dict] = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": root_path + path, "root_path": root_path, "headers": []}
    asyncio.run(app(scope, receive, send))
    start, content = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert int(headers["content-length"]) == len(content["body"])
    return Answer(start["status"], headers, json.loads(content["body"]))


def test_a_good_request_is_answered_as_offline(app, bundle, predictor):
    answer = call(app, "POST", "/predict", GOOD)
    offline = predictor.run(np.array([IMAGE], np.float32))
    assert answer.status == 200
    assert answer.headers["x-bigray-version"] == answer.document["version"] == bundle.version
    (prediction,) = answer.document["predictions"]
    assert prediction["label"] == offline.labels[0]
    assert np.allclose(prediction["probabilities"], offline.probabilities[0], atol=1e-6)


@pytest.mark.parametrize(
    "path", ["/", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/animals", "/openapi.json"]
)
def test_every_get_route_answers(app, path):
    assert call(app, "GET", path).status == 200


def test_a_version_can_be_named_in_the_path(app, bundle):
    assert call(app, "GET", f"/v2/models/animals/versions/{bundle.version}/ready").document["ready"] is True
    assert call(app, "GET", "/v2/models/animals/versions/other").status == 404


def test_infer_answers(app):
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 2, 3], "data": [IMAGE]}
    answer = call(app, "POST", "/v2/models/animals/infer", json.dumps({"inputs": [tensor]}).encode())
    assert answer.status == 200
    assert answer.document["model_name"] == "animals"


def test_routes_work_below_a_prefix(app):
    assert call(app, "GET", "/v2/health/ready", root_path="/animals").document == {"ready": True}
    assert call(app, "GET", "", root_path="/animals").document["name"] == "animals"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/predict", b"not json", 400),
        ("POST", "/predict", b'{"records": []}', 400),
        ("POST", "/predict", b'{"records": [{"image": [1, 2]}]}', 400),
        ("POST", "/predict", b"\xff\xfe", 400),
        ("POST", "/predict", b"x" * 1001, 413),
        ("POST", "/predict", b"x" * 50_000, 413),
        ("GET", "/predict", b"", 405),
        ("DELETE", "/v2/health/ready", b"", 405),
        ("GET", "/nowhere", b"", 404),
        ("POST", "/v2/models/plants/infer", b"{}", 404),
        ("POST", "/v2/models/animals/infer", b"{}", 400),
    ],
)
def test_a_bad_request_gets_a_json_answer_and_the_next_one_is_served(app, method, path, body, status):
    answer = call(app, method, path, body)
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.document) == ["error"]
    assert call(app, "POST", "/predict", GOOD).status == 200


def test_a_wrong_method_names_the_right_one(app):
    assert call(app, "GET", "/predict").headers["allow"] == "POST"


def test_an_internal_failure_tells_the_caller_nothing_about_the_code(bundle):
    def broken(rows):
        raise RuntimeError("secret detail")

    answer = call(make_app(bundle, broken), "POST", "/predict", GOOD)
    assert answer.status == 500
    assert "secret" not in answer.document["error"]
    assert "Traceback" not in answer.document["error"]
