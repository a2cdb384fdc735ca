from __future__ import annotations

import asyncio
import gzip
import json

import numpy as np
import pytest

from bigray.errors import SpecError
from bigray.serve.http import Answer, Refusal, Request
from bigray.serve.routes import MOST_FOUND, OPEN, PREDICT, Router
from bigray.serve.store import ModelStore, OtherModel, View

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
GOOD = json.dumps({"records": [{"image": IMAGE}]}).encode()


async def numbers() -> Answer:
    return Answer(b'{"numbers": true}')


@pytest.fixture
def router(make_model) -> Router:
    others = {"plants": OtherModel("plants", "/plants", lambda: make_model("c" * 12, name="plants"))}
    return Router(ModelStore(make_model(), others), 1000, numbers, numbers)


def refusal(router: Router, method: str, path: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        router.find(path, method)
    return caught.value


@pytest.mark.parametrize(
    ("method", "path", "kind", "scope"),
    [
        ("GET", "/", "page", OPEN),
        ("GET", "/card", "page", PREDICT),
        ("GET", "/stats", "stats", PREDICT),
        ("GET", "/metrics", "metrics", PREDICT),
        ("GET", "/openapi.json", "other", PREDICT),
        ("POST", "/predict", "predict", PREDICT),
        ("POST", "/generate", "generate", PREDICT),
        ("GET", "/v2", "other", OPEN),
        ("GET", "/v2/health/live", "health", OPEN),
        ("GET", "/v2/health/ready", "health", OPEN),
        ("POST", "/v2/repository/index", "other", PREDICT),
        ("GET", "/v2/models/animals", "other", PREDICT),
        ("GET", "/v2/models/animals/ready", "health", OPEN),
        ("GET", "/v2/models/animals/config", "other", PREDICT),
        ("POST", "/v2/models/animals/infer", "infer", PREDICT),
        ("POST", "/v2/models/animals/generate", "generate", PREDICT),
        ("POST", "/v2/models/animals/versions/0123456789ab/infer", "infer", PREDICT),
    ],
)
def test_each_path_has_its_route_and_what_it_takes_to_ask_it(router, method, path, kind, scope):
    route = router.find(path, method)
    assert (route.kind, route.scope) == (kind, scope)
    assert (route.handler is None) == (kind in ("predict", "infer", "generate"))
    if method == "GET":
        assert router.find(path, "HEAD") == route


def test_a_model_and_its_version_come_from_the_path(router):
    route = router.find("/v2/models/plants/versions/abc/infer", "POST")
    assert (route.model, route.version) == ("plants", "abc")
    assert router.find("/v2/models/animals/infer", "POST").version is None
    assert router.find("/predict", "POST").model is None, "the channel's own"


@pytest.mark.parametrize(
    "path",
    ["", "/v2/", "/v3", "//predict", "/predict/", "/v2/models/animals/other", "/v2/models/animals/versions/1/other"],
)
def test_other_paths_are_404_with_the_place_of_a_list(router, path):
    found = refusal(router, "GET", path)
    assert (found.status, found.message) == (404, f"{path}: no such route; GET /openapi.json lists them")


@pytest.mark.parametrize("path", ["/v2/models/", "/v2/models/stones", "/v2/models/stones/versions/1/infer"])
def test_another_models_paths_are_404(router, path):
    found = refusal(router, "GET", path)
    assert found.status == 404
    assert "is not served here; POST /v2/repository/index lists the models" in found.message


@pytest.mark.parametrize("path", ["/" + "y" * 500, "/v2/models/" + "y" * 500, "/v2/models/animals/" + "y" * 500])
def test_of_a_long_path_80_characters_are_repeated(router, path):
    found = refusal(router, "GET", path)
    assert found.message.count("y") <= 81
    assert "y" * 81 not in found.message


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict", b"POST"),
        ("PUT", "/", b"GET"),
        ("DELETE", "/v2/models/animals", b"GET"),
        ("HEAD", "/v2/models/animals/infer", b"POST"),
        ("x" * 500, "/card", b"GET"),
    ],
)
def test_another_method_is_405_and_named(router, method, path, allowed):
    found = refusal(router, method, path)
    assert (found.status, found.headers) == (405, ((b"allow", allowed),))
    assert len(found.message) < 120


def test_every_listed_route_is_one(router):
    listed = router.listed()
    assert listed == sorted(listed)
    for line in listed:
        method, path = line.split(" ")
        assert router.find(path, method)


@pytest.mark.parametrize("path", ["/stats", "/metrics"])
def test_numbers_come_from_who_has_them(router, path):
    answer = asyncio.run(router.find(path, "GET").handler(Request("GET", path, {}, b"")))
    assert answer.body == b'{"numbers": true}'


# ----- questions for a model


def decode(router: Router, body: bytes, headers: dict[bytes, bytes] | None = None, path: str = "/predict"):
    route = router.find(path, "POST")
    return route.decode(Request("POST", path, headers or {}, body), router._store.view.live)


def test_a_body_becomes_rows_and_the_answer_is_written_for_the_version_that_made_it(router, make_model):
    question = decode(router, GOOD)
    assert np.array_equal(question.rows, np.array([IMAGE], np.float32))
    by = make_model("d" * 12, "fox")
    answer = question.encode(asyncio.run(by.submit(question.rows)), by)
    assert json.loads(answer.body)["version"] == by.version
    assert json.loads(answer.body)["predictions"][0]["label"] == "fox"


def test_a_compressed_body_is_read(router):
    question = decode(router, gzip.compress(GOOD), {b"content-encoding": b"gzip"})
    assert np.array_equal(question.rows, np.array([IMAGE], np.float32))


def test_a_small_body_that_grows_beyond_the_limit_is_refused(router):
    with pytest.raises(Refusal) as caught:
        decode(router, gzip.compress(b" " * 10**6), {b"content-encoding": b"gzip"})
    assert caught.value.status == 413


def test_what_is_no_row_is_a_fault_of_the_caller(router):
    with pytest.raises(SpecError):
        decode(router, b"{}")


@pytest.mark.parametrize("length", [b"x", b"-1", b"10000"])
def test_a_wrong_length_of_the_header_part_is_a_fault_of_the_caller(router, length):
    with pytest.raises((SpecError, Refusal)) as caught:
        decode(router, b"{}", {b"inference-header-content-length": length}, "/v2/models/animals/infer")
    assert getattr(caught.value, "status", 400) == 400


def test_a_route_that_was_found_before_is_not_one_when_its_model_has_gone(make_model):
    store = ModelStore(make_model())
    router = Router(store, 1000, numbers, numbers)
    path = "/v2/models/animals/infer"
    assert router.find(path, "POST") == router.find(path, "POST")
    store.set_view(View(make_model("b" * 12, name="beasts")))
    assert refusal(router, "POST", path).status == 404
    assert router.find("/v2/models/beasts/infer", "POST").model == "beasts"


def test_versions_that_callers_make_up_are_not_all_kept(router):
    for number in range(3 * MOST_FOUND):
        path = f"/v2/models/animals/versions/{number}/infer"
        assert router.find(path, "POST").version == router.find(path, "POST").version == str(number)
    assert len(router._found) == MOST_FOUND
