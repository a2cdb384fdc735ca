from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.bundle import ModelBundle
from bigray.inference import Predictor
from bigray.serve import asgi as asgi_module
from bigray.serve.asgi import Limits, ModelApp
from bigray.serve.assembly import Endpoint, _tick, assemble
from bigray.serve.batching import QueueLimits
from bigray.serve.compare import SideBySide
from bigray.serve.config import BundleArgs
from bigray.serve.exchange import LONGEST_ID, MOST_HEADERS
from bigray.serve.http import Answer as HttpAnswer
from bigray.serve.http import Refusal
from bigray.serve.loaded import LoadedModel
from bigray.serve.observe.access_log import AccessLog
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.protect.keys import create_key
from bigray.serve.release.record import Release, Rollout
from bigray.serve.routes import Router
from bigray.serve.store import ModelStore, OtherModel, View
from bigray.serve.wire import bodies

IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
GOOD = json.dumps({"records": [{"image": IMAGE}]}).encode()
LIMIT = 1000
"""Bytes of a body."""
STALLS = object()
"""In place of a part of a body: nothing more comes."""
GOES_AWAY = object()
"""In place of a part of a body: the connection ends."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


def in_chunks(body: bytes, size: int = 300) -> list[bytes]:
    """As a server hands over a body that comes in pieces."""
    return [body[i : i + size] for i in range(0, len(body), size)] or [b""]


async def ask(
    app: ModelApp,
    method: str,
    path: str,
    body: bytes | Sequence[Any] = b"",
    headers: Sequence[tuple[str, str]] = (),
    *,
    root_path: str = "",
    client: tuple[str, int] | None = None,
) -> Answer:
    parts = in_chunks(body) if isinstance(body, bytes) else list(body)
    sent: list[dict] = []

    async def receive():
        part = parts.pop(0)
        if part is STALLS:
            await asyncio.Event().wait()
        if part is GOES_AWAY:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "method": method, "path": root_path + path, "root_path": root_path, "headers": raw}
    if client is not None:
        scope["client"] = client
    await app(scope, receive, send)
    start, content = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    assert int(found["content-length"]) == len(content["body"])
    return Answer(start["status"], found, content["body"])


def call(app: ModelApp, *arguments, **options) -> Answer:
    """One request, by itself."""
    return asyncio.run(ask(app, *arguments, **options))


def predict(app: ModelApp, headers: Sequence[tuple[str, str]] = (), **options) -> Answer:
    return call(app, "POST", "/predict", GOOD, headers, **options)


def make_endpoint(release: Release, **args: Any) -> Endpoint:
    settings = BundleArgs.model_validate({"bundle": release.bundle, "max_body_mb": LIMIT / 2**20, **args})
    return assemble(release.bundle, settings, num_threads=1)


@pytest.fixture(scope="module")
def endpoint(release: Release) -> Endpoint:
    return make_endpoint(release)


@pytest.fixture
def app(endpoint: Endpoint) -> ModelApp:
    return endpoint.app


def canary_store(live: LoadedModel, candidate: LoadedModel, share: float = 0.5) -> ModelStore:
    """Of a replica that lets a candidate answer a share of the requests."""
    store = ModelStore(live)
    rollout = Rollout(kind="canary", release=Release(version=candidate.version, bundle="/b"), share=share)
    held = {live.version: live, candidate.version: candidate}
    store.set_view(View(live, held, rollout, SideBySide("canary", live, candidate)))
    return store


async def no_numbers() -> HttpAnswer:
    return HttpAnswer(b"{}")


def make_app(store: ModelStore, telemetry: Telemetry | None = None, **options: Any) -> ModelApp:
    """An app around a store that a test has made itself."""
    router = Router(store, LIMIT, no_numbers, no_numbers)
    given = {"guard": Guard(), "limits": Limits(LIMIT), "tick": lambda: None} | options
    return ModelApp(store, router, telemetry=telemetry or Telemetry(), **given)


# ----- answers


def test_a_good_request_is_answered_as_offline(app, bundle: ModelBundle, predictor: Predictor):
    answer = predict(app)
    offline = predictor.run(np.array([IMAGE], np.float32))
    assert answer.status == 200
    assert answer.headers["x-bigray-version"] == answer.document["version"] == bundle.version
    (prediction,) = answer.document["predictions"]
    assert prediction["label"] == offline.labels[0]
    assert np.allclose(prediction["probabilities"], offline.probabilities[0], atol=1e-6)


def test_arrays_go_both_ways(app, predictor: Predictor):
    body = io.BytesIO()
    np.save(body, np.array([IMAGE] * 3, np.float32))
    npy = "application/x-npy"
    answer = call(app, "POST", "/predict", body.getvalue(), [("content-type", npy), ("accept", npy)])
    assert answer.headers["content-type"] == npy
    expected = predictor.run(np.array([IMAGE] * 3, np.float32)).probabilities
    assert np.allclose(np.load(io.BytesIO(answer.body)), expected, atol=1e-6)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/animals",
        "/v2/models/animals/ready",
        "/v2/models/animals/config",
        "/openapi.json",
        "/card",
        "/stats",
        "/metrics",
    ],
)
def test_every_get_route_answers_and_a_head_the_same(app, path):
    answer = call(app, "GET", path)
    assert answer.status == 200
    head = call(app, "HEAD", path)
    assert head.status == 200
    assert head.headers["content-type"] == answer.headers["content-type"]


def test_a_browser_gets_the_page_and_a_program_the_routes(app):
    page = call(app, "GET", "/", b"", [("accept", "text/html,application/xhtml+xml")])
    assert page.headers["content-type"].startswith("text/html")
    document = call(app, "GET", "/").document
    assert document["name"] == "animals"
    assert "POST /predict" in document["routes"]
    assert "POST /v2/models/animals/infer" in document["routes"]


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


def test_a_websocket_is_closed(app):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1003}]


# ----- refusals


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/predict", b"not json", 400),
        ("POST", "/predict", b"", 400),
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
    assert "\n" not in answer.document["error"]
    assert predict(app).status == 200


def test_a_wrong_method_names_the_right_one(app):
    assert call(app, "GET", "/predict").headers["allow"] == "POST"


@pytest.mark.parametrize("prefix", ["/", "/v2/models/", "/v2/models/animals/"])
def test_of_a_path_that_leads_nowhere_only_the_beginning_is_repeated(app, prefix):
    answer = call(app, "GET", prefix + "y" * 5000)
    assert answer.status == 404
    assert len(answer.document["error"]) < 200
    assert "y" * 81 not in answer.document["error"]


def test_an_internal_failure_tells_the_caller_nothing_about_the_code(make_model, caplog):
    def broken(rows):
        raise RuntimeError("secret detail")

    with caplog.at_level(logging.ERROR, "ray.serve"):
        answer = predict(make_app(ModelStore(make_model(run=broken))))
    assert answer.status == 500
    assert answer.document == {"error": "internal error; the replica's log has the details"}
    assert "secret detail" in caplog.text


# ----- bodies


def test_a_body_in_many_parts_is_put_together(app):
    assert call(app, "POST", "/predict", [bytes([byte]) for byte in GOOD]).status == 200


@pytest.mark.parametrize("size", [1, 7, 1001, 5000])
def test_a_body_over_the_limit_is_413_in_any_number_of_parts(app, size):
    answer = call(app, "POST", "/predict", in_chunks(b"x" * 5000, size))
    assert answer.status == 413
    assert answer.document["error"].startswith("body: 0.0 MB is over the limit of")


def test_a_body_at_the_limit_is_read(app):
    assert call(app, "POST", "/predict", GOOD + b" " * (LIMIT - len(GOOD))).status == 200


def test_a_body_over_the_limit_is_read_to_its_end_so_that_its_sender_can_read_the_answer(app):
    answer = call(app, "POST", "/predict", b"x" * 50_000, [("content-length", "50000")])
    assert (answer.status, answer.headers.get("connection")) == (413, None)


def test_of_a_body_that_is_announced_as_huge_no_more_is_read(app):
    parts = [b"x", STALLS]
    answer = call(app, "POST", "/predict", parts, [("content-length", str(10**12))])
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert answer.document["error"].startswith("body: 953674.3 MB is over the limit")


def test_a_body_that_turns_out_huge_is_not_read_to_its_end(app, monkeypatch):
    monkeypatch.setattr(asgi_module, "DRAINED_BYTES", 5000)
    answer = call(app, "POST", "/predict", [b"x" * 1000] * 6 + [STALLS])
    assert (answer.status, answer.headers["connection"]) == (413, "close")


@pytest.mark.parametrize("parts", [[STALLS], [GOOD[:5], STALLS], [b"x", b"", b"x", STALLS]])
def test_a_body_that_stalls_is_408(make_model, parts):
    app = make_app(ModelStore(make_model()), limits=Limits(LIMIT, body_timeout_s=0.02))
    answer = call(app, "POST", "/predict", [*parts, b"never"], [("content-length", "500")])
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert answer.document["error"] == "body: not complete within 0.02 s"
    assert predict(app).status == 200


@pytest.mark.parametrize("parts", [[b"x", GOES_AWAY], [b"", b"", GOES_AWAY]])
def test_a_caller_that_goes_away_in_its_body_disturbs_nobody(app, endpoint, parts):
    before = endpoint.telemetry.snapshot()["load"]["ongoing"]
    answer = call(app, "POST", "/predict", parts)
    assert (answer.status, answer.document["error"]) == (400, "body: the connection ended in it")
    assert endpoint.telemetry.snapshot()["load"]["ongoing"] == before == 0
    assert predict(app).status == 200


@pytest.mark.parametrize("length", ["-5", "12x", "", "1e9"])
def test_a_length_that_is_none_is_not_believed(app, length):
    assert predict(app, [("content-length", length)]).status == 200


def test_too_many_headers_are_refused(app):
    many = [(f"x-header-{number}", "x") for number in range(MOST_HEADERS + 1)]
    assert predict(app, many).status == 431
    assert predict(app, [("x-long", "x" * 100_000)]).status == 431
    assert predict(app, many[:20]).status == 200


def test_bodies_that_come_slowly_are_held_up_to_a_number_of_bytes(make_model, monkeypatch):
    monkeypatch.setattr(asgi_module, "LEAST_HELD_BYTES", 0)  # four bodies of the largest size then
    app = make_app(ModelStore(make_model()), limits=Limits(LIMIT, body_timeout_s=0.1))

    async def story():
        slow = [asyncio.create_task(ask(app, "POST", "/predict", [b" " * 990, b" ", STALLS, b"x"])) for _ in range(4)]
        await asyncio.sleep(0.01)
        refused = await ask(app, "POST", "/predict", [b" " * 500, GOOD])
        whole = await ask(app, "POST", "/predict", [GOOD])
        given_up = await asyncio.gather(*slow)
        return refused, whole, given_up, await ask(app, "POST", "/predict", [b" " * 500, GOOD])

    refused, whole, given_up, later = asyncio.run(story())
    assert (refused.status, refused.headers["retry-after"], refused.headers["connection"]) == (503, "1", "close")
    assert "bodies" in refused.document["error"]
    assert (whole.status, [one.status for one in given_up], later.status) == (200, [408] * 4, 200)


# ----- pictures


@contextmanager
def slow_pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Pictures are decoded once the event is set."""
    gate = threading.Event()

    def decode(body, manifest):
        assert gate.wait(20)
        return np.array([IMAGE], np.float32)

    monkeypatch.setitem(bodies._DECODERS, "image/png", decode)
    yield gate
    gate.set()


def test_while_a_picture_is_decoded_other_requests_are_answered(app, monkeypatch):
    async def story(gate):
        picture = asyncio.create_task(ask(app, "POST", "/predict", b"x", [("content-type", "Image/PNG")]))
        await asyncio.sleep(0.01)
        other = await ask(app, "POST", "/predict", GOOD)
        assert not picture.done()
        gate.set()
        return other.status, (await picture).status

    with slow_pictures(monkeypatch) as gate:
        assert asyncio.run(story(gate)) == (200, 200)


def test_no_more_pictures_wait_than_can_be_decoded_in_time(app, monkeypatch):
    monkeypatch.setattr(app._pictures, "_most_waiting", 2)

    async def story(gate):
        sent = [asyncio.create_task(ask(app, "POST", "/predict", b"x", [("content-type", "image/png")])) for _ in "123"]
        await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
        unread = await ask(app, "POST", "/predict", [STALLS], [("content-type", "image/png")])
        gate.set()
        return unread, await asyncio.gather(*sent)

    with slow_pictures(monkeypatch) as gate:
        unread, answers = asyncio.run(story(gate))
    assert unread.status == 503
    assert sorted(one.status for one in answers) == [200, 200, 503]
    (refused,) = [one for one in answers if one.status == 503]
    assert refused.headers["retry-after"] == "1"


def test_a_picture_is_waited_for_as_long_as_any_request(make_model, monkeypatch):
    app = make_app(ModelStore(make_model()), limits=Limits(LIMIT, request_timeout_s=0.02))
    with slow_pictures(monkeypatch):
        answer = call(app, "POST", "/predict", b"x", [("content-type", "image/png")])
    assert (answer.status, answer.document["error"]) == (504, "no answer within 0.02 s")


def test_a_picture_that_is_none_is_refused_from_its_thread_too(app):
    answer = call(app, "POST", "/predict", b"x", [("content-type", "image/png")])
    assert (answer.status, answer.document["error"]) == (400, "body: not a PNG or JPEG that can be read")


# ----- request ids and versions


def test_every_answer_has_an_id_of_its_own(app):
    answers = [predict(app), predict(app), call(app, "GET", "/nowhere"), call(app, "GET", "/v2")]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 4
    assert all(len(id_) == 16 and int(id_, 16) >= 0 for id_ in ids)


def test_a_callers_own_id_is_repeated(app):
    assert predict(app, [("x-request-id", "order 17/b")]).headers["x-request-id"] == "order 17/b"


@pytest.mark.parametrize("given", ["a\r\nset-cookie: x=1", "\x1b[31mred", "\x00", "", "\x7f"])
def test_an_id_that_could_do_harm_is_replaced(app, given):
    answer = predict(app, [("x-request-id", given)])
    assert len(answer.headers["x-request-id"]) == 16
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(("given", "kept"), [("x" * 5000, "x" * LONGEST_ID), ("caf\xe9", "caf")])
def test_of_an_id_no_more_is_repeated_than_a_header_may_hold(app, given, kept):
    assert predict(app, [("x-request-id", given)]).headers["x-request-id"] == kept


def test_the_version_in_the_header_is_the_one_that_answered(make_model):
    live, candidate = make_model("a" * 12, "cat"), make_model("b" * 12, "dog")
    app = make_app(canary_store(live, candidate))

    answers = [predict(app, [("x-bigray-key", f"caller {number}")]) for number in range(60)]
    again = [predict(app, [("x-bigray-key", f"caller {number}")]) for number in range(60)]

    versions = [answer.headers["x-bigray-version"] for answer in answers]
    assert versions == [answer.headers["x-bigray-version"] for answer in again], "a caller stays on its side"
    assert set(versions) == {live.version, candidate.version}
    labels = {live.version: "cat", candidate.version: "dog"}
    for answer in answers:
        version = answer.headers["x-bigray-version"]
        assert answer.document["version"] == version
        assert answer.document["predictions"][0]["label"] == labels[version]


def test_callers_that_say_nothing_of_themselves_are_spread_by_request(make_model):
    live, candidate = make_model("a" * 12), make_model("b" * 12)
    app = make_app(canary_store(live, candidate))
    found = {predict(app, client=("10.0.0.1", 5)).headers["x-bigray-version"] for _ in range(60)}
    assert found == {live.version, candidate.version}


def test_what_a_canary_fails_is_answered_by_the_live_version_under_its_own_name(make_model):
    def broken(rows):
        raise RuntimeError("broken")

    live, candidate = make_model("a" * 12, "cat"), make_model("b" * 12, run=broken)
    telemetry = Telemetry()
    answer = predict(make_app(canary_store(live, candidate, share=1.0), telemetry))
    assert (answer.status, answer.headers["x-bigray-version"]) == (200, live.version)
    assert answer.document["version"] == live.version
    assert [one["version"] for one in telemetry.snapshot()["requests"]] == [live.version]


# ----- keys


@pytest.fixture
def keys(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def bearer(secret: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {secret}")]


def test_with_a_key_file_only_a_key_opens(release, keys):
    secret = create_key(keys, "anna")
    app = make_endpoint(release, keys=keys).app
    assert predict(app, bearer(secret)).status == 200
    assert predict(app, [("x-api-key", secret)]).status == 200
    for headers in ([], bearer("wrong"), bearer(secret + "x")):
        answer = predict(app, headers)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="bigray"')


def test_a_key_that_may_not_ask_is_403(make_model, keys, monkeypatch):
    secret = create_key(keys, "anna")
    app = make_app(ModelStore(make_model()), guard=Guard(keys))
    monkeypatch.setattr("bigray.serve.protect.keys.Key.allows", lambda key, scope: False)
    answer = predict(app, bearer(secret))
    assert (answer.status, answer.document) == (
        403,
        {"error": "this key may not do that: it lacks the scope 'predict'"},
    )


def test_a_key_that_asks_too_often_is_429_and_told_when_to_come_back(release, keys):
    secret = create_key(keys, "anna", rate_per_s=0.01)
    app = make_endpoint(release, keys=keys).app
    assert predict(app, bearer(secret)).status == 200
    answer = predict(app, bearer(secret))
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) > 1


@pytest.mark.parametrize("path", ["/", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/animals/ready"])
def test_what_says_nothing_of_the_data_is_open(release, keys, path):
    create_key(keys, "anna")
    assert call(make_endpoint(release, keys=keys).app, "GET", path).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/card"),
        ("GET", "/stats"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/v2/models/animals"),
        ("GET", "/v2/models/animals/config"),
        ("POST", "/v2/models/animals/infer"),
        ("POST", "/v2/repository/index"),
        ("POST", "/predict"),
    ],
)
def test_the_rest_is_closed(release, keys, method, path):
    create_key(keys, "anna")
    assert call(make_endpoint(release, keys=keys).app, method, path).status == 401


def test_a_body_is_not_read_of_whom_has_no_key(release, keys):
    create_key(keys, "anna")
    assert call(make_endpoint(release, keys=keys).app, "POST", "/predict", [STALLS]).status == 401


# ----- overload and other models


def test_overload_that_began_while_a_body_came_is_503_before_it_is_decoded(make_model, monkeypatch):
    room = iter([True, False])

    def check_room():
        if not next(room):
            raise Refusal(503, "overloaded")

    model = make_model()
    monkeypatch.setattr(model.batcher, "check_room", check_room)
    assert call(make_app(ModelStore(model)), "POST", "/predict", b"not even json").status == 503


def test_overload_is_503_before_the_body_is_read(make_model):
    gate = threading.Event()

    def slow(rows):
        gate.wait(20)
        raise ValueError("late")

    model = make_model(run=slow, is_slow=True, max_rows=1, limits=QueueLimits(max_requests=1))
    telemetry = Telemetry()
    app = make_app(ModelStore(model), telemetry)

    async def story():
        tasks = []
        for _ in range(2):  # one in the model, one in the queue
            tasks.append(asyncio.create_task(ask(app, "POST", "/predict", GOOD)))
            await asyncio.sleep(0.02)
        unread = await ask(app, "POST", "/predict", [STALLS])
        infer = await ask(app, "POST", "/v2/models/animals/infer", [STALLS])
        gate.set()
        await asyncio.gather(*tasks)
        return unread, infer

    refused, infer = asyncio.run(story())
    assert refused.status == infer.status == 503
    assert refused.headers["retry-after"] == "1"
    assert telemetry.snapshot()["shed"] == {"animals": 2}
    assert refused.headers["x-bigray-version"] == model.version


def test_another_model_is_loaded_when_it_is_first_asked(make_model, make_release):
    other = make_release(1)
    store = ModelStore(
        make_model(),
        {"plants": OtherModel("plants", other.bundle, lambda: make_model("c" * 12, "fox", name="plants"))},
    )
    app = make_app(store)
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 2, 3], "data": [IMAGE]}
    body = json.dumps({"inputs": [tensor]}).encode()

    assert call(app, "GET", "/v2/models/plants/ready").status == 503
    answer = call(app, "POST", "/v2/models/plants/infer", body)
    assert (answer.status, answer.document["model_name"], answer.headers["x-bigray-version"]) == (
        200,
        "plants",
        "c" * 12,
    )
    assert call(app, "GET", "/v2/models/plants/ready").status == 200
    assert call(app, "GET", "/v2/models/plants").document["name"] == "plants"


def test_the_index_tells_every_model_and_version(make_model):
    live, previous = make_model("a" * 12), make_model("b" * 12)
    store = ModelStore(live, {"plants": OtherModel("plants", "/p", lambda: make_model(name="plants"))})
    store.set_view(View(live, {live.version: live, previous.version: previous}))
    assert call(make_app(store), "POST", "/v2/repository/index").document == [
        {"name": "animals", "version": "a" * 12, "state": "READY"},
        {"name": "animals", "version": "b" * 12, "state": "READY"},
        {"name": "plants", "version": "", "state": "UNAVAILABLE"},
    ]


# ----- what is counted and written down


def test_requests_are_counted_by_version_route_and_status(release):
    endpoint = make_endpoint(release)
    app = endpoint.app
    for _ in range(3):
        predict(app)
    call(app, "POST", "/predict", b"not json")
    call(app, "GET", "/v2/health/live")
    call(app, "POST", "/predict", b"x" * 5000)

    snapshot = endpoint.telemetry.snapshot()
    counted = {(one["version"], one["route"]): one["statuses"] for one in snapshot["requests"]}
    assert counted[release.version, "predict"] == {"200": 3}
    assert counted["", "predict"] == {"400": 1, "413": 1}
    assert counted["", "health"] == {"200": 1}
    (series,) = [one for one in snapshot["requests"] if one["version"] == release.version]
    assert (series["rows"], series["bytes"], series["model"]) == (3, 3 * len(GOOD), "animals")
    assert snapshot["refused"] == {"413": 1}
    assert snapshot["load"]["ongoing"] == 0
    assert snapshot["batches"][0]["rows"] >= 3


def test_a_path_that_somebody_made_up_is_no_series_of_its_own(release):
    endpoint = make_endpoint(release)
    for number in range(50):
        call(endpoint.app, "GET", f"/made-up-{number}")
    assert [one["route"] for one in endpoint.telemetry.snapshot()["requests"]] == ["other"]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AccessLog]:
    log = AccessLog(str(tmp_path / "access.jsonl"))
    yield log
    log.close()


def lines_of(log: AccessLog, path: Path) -> list[dict[str, Any]]:
    log.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_request_is_a_line_of_the_access_log(make_model, tmp_path, log, keys):
    secret = create_key(keys, "anna")
    app = make_app(ModelStore(make_model()), guard=Guard(keys), access_log=log)
    predict(app, [*bearer(secret), ("x-request-id", "mine")], client=("10.1.2.3", 5))
    call(app, "GET", "/nowhere\n{", client=("10.1.2.3", 5))
    predict(app, [("x-forwarded-for", "1.2.3.4")], client=("10.1.2.3", 5))

    good, lost, closed = lines_of(log, tmp_path / "access.jsonl")
    assert (good["id"], good["method"], good["path"], good["status"]) == ("mine", "POST", "/predict", 200)
    assert (good["rows"], good["bytes"], good["model"], good["version"]) == (1, len(GOOD), "animals", "a" * 12)
    assert good["key"] == secret.split("_")[1]
    assert good["client"] == "10.1.2.3"
    assert (lost["path"], lost["status"], lost["model"]) == ("/nowhere\n{", 404, "")
    assert (closed["status"], closed["client"], closed["key"]) == (401, "1.2.3.4", "")
    assert secret not in (tmp_path / "access.jsonl").read_text()


@asynccontextmanager
async def serving(app: ModelApp, sent: list[str]) -> AsyncIterator[None]:
    """Between the server's start and its end."""
    messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()

    async def send(message):
        sent.append(message["type"])

    await messages.put({"type": "lifespan.startup"})
    running = asyncio.create_task(app({"type": "lifespan"}, messages.get, send))
    yield
    await messages.put({"type": "lifespan.shutdown"})
    await running


def test_while_the_server_runs_it_ticks_and_at_its_end_the_log_is_written(make_model, tmp_path, log, monkeypatch):
    monkeypatch.setattr(asgi_module, "TICK_S", 0.001)
    ticks: list[int] = []
    app = make_app(ModelStore(make_model()), access_log=log, tick=lambda: ticks.append(1))
    sent: list[str] = []

    async def story():
        async with serving(app, sent):
            while len(ticks) < 3:
                await asyncio.sleep(0.001)
            await ask(app, "POST", "/predict", GOOD)

    asyncio.run(story())
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert len((tmp_path / "access.jsonl").read_text().splitlines()) == 1


def test_who_waits_for_a_model_that_hangs_is_told_504(make_model, monkeypatch):
    monkeypatch.setattr(asgi_module, "TICK_S", 0.001)
    gate = threading.Event()
    store, telemetry = ModelStore(make_model(run=lambda rows: gate.wait(20), is_slow=True)), Telemetry()
    app = make_app(store, telemetry, tick=partial(_tick, store, telemetry, 1.0, 0.01))

    async def story():
        async with serving(app, []):
            answer = await ask(app, "POST", "/predict", GOOD)
            alive = await ask(app, "GET", "/v2/health/live")
        gate.set()
        return answer, alive

    answer, alive = asyncio.run(story())
    assert (answer.status, answer.document["error"]) == (504, "no answer within 0.01 s")
    assert alive.status == 200
    assert telemetry.snapshot()["total"]["errors"] == 1
