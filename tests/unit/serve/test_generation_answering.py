"""`POST /generate` as a caller sees it: an application around a small model that knows the alphabet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bigray.bundle import OutputSchema
from bigray.data.features import Column, FeatureSchema
from bigray.data.text import lengths
from bigray.inference import Predictions
from bigray.serve import asgi as asgi_module
from bigray.serve.asgi import ModelApp
from bigray.serve.batching import Batcher, Capacity
from bigray.serve.compare import SideBySide
from bigray.serve.generation import answering
from bigray.serve.generation.answering import decode_generation
from bigray.serve.http import Refusal
from bigray.serve.loaded import LoadedModel
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.protect.keys import create_key
from bigray.serve.release.record import Release, Rollout
from bigray.serve.store import ModelStore, View
from bigray.serve.wire.openapi import openapi_document
from tests.unit.serve.test_asgi import ask, call, make_app
from tests.unit.serve.test_fast_http import request, run, serving, until

ABC = ("a", "b", "c")
CONTEXT = 4
Run = Callable[[np.ndarray], Predictions]


def after_each_the_next(rows: np.ndarray) -> Predictions:
    last = rows[np.arange(len(rows)), lengths(rows) - 1].astype(int)
    probabilities = np.full((len(rows), 3), 0.01, np.float32)
    probabilities[np.arange(len(rows)), (last + 1) % 3] = 0.98
    return Predictions([ABC[i] for i in probabilities.argmax(axis=1)], probabilities, None)


@pytest.fixture
def make_writer(make_model: Callable[..., LoadedModel]) -> Callable[..., LoadedModel]:
    def make(run: Run = after_each_the_next, vocabulary: tuple[str, ...] = ABC, **options: Any) -> LoadedModel:
        model = make_model(run=run, **options)
        column = Column(name="text", shape=(CONTEXT,), kind="text", categories=vocabulary)
        changed = {
            "inputs": FeatureSchema(columns=(column,)),
            "example": {"text": [0, 1, 2, 0]},
            "outputs": OutputSchema(task="language", num_outputs=3, target="next", class_names=vocabulary),
        }
        return replace(model, manifest=model.manifest.model_copy(update=changed))

    return make


class Caller:
    """One that reads a streamed answer as it comes, and may go away."""

    def __init__(self, app: ModelApp, **asked: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.has_news = asyncio.Event()
        self.gone = asyncio.Event()
        self._body: bytes | None = json.dumps({"prompt": "a", "temperature": 0, **asked}).encode()
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.has_news.set()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def events(self) -> list[dict[str, Any]]:
        return events_of(b"".join(message["body"] for message in self.sent[1:]))


def events_of(body: bytes) -> list[dict[str, Any]]:
    lines = body.decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def generate(app: ModelApp, **asked: Any) -> Caller:
    async def story() -> Caller:
        caller = Caller(app, **asked)
        await asyncio.wait_for(caller.task, 20)
        return caller

    return asyncio.run(story())


def test_each_token_is_an_event_and_the_last_one_tells_how_many(make_writer):
    telemetry = Telemetry()
    caller = generate(make_app(ModelStore(make_writer()), telemetry), max_tokens=5)
    headers = dict(caller.sent[0]["headers"])
    assert (caller.status, headers[b"content-type"], headers[b"x-bigray-version"]) == (
        200,
        b"text/event-stream",
        b"a" * 12,
    )
    assert b"content-length" not in headers
    assert caller.events == [{"text": letter} for letter in "bcabc"] + [{"done": True, "tokens": 5}]
    assert [message.get("more_body", False) for message in caller.sent[1:]] == [True] * 6 + [False]
    (series,) = telemetry.snapshot()["requests"]
    assert (series["route"], series["statuses"], series["rows"]) == ("generate", {"200": 1}, 5)
    assert telemetry.snapshot()["load"]["ongoing"] == 0


def test_without_stream_the_text_comes_whole(make_writer):
    body = json.dumps({"prompt": "abca", "max_tokens": 9, "temperature": 0, "stop": "ca", "stream": False}).encode()
    app = make_app(ModelStore(make_writer()))
    for path in ("/generate", "/v2/models/animals/generate", f"/v2/models/animals/versions/{'a' * 12}/generate"):
        answer = call(app, "POST", path, body)
        assert answer.document == {"model": "animals", "version": "a" * 12, "text": "b", "tokens": 3}


@pytest.mark.parametrize("is_slow", [False, True])
def test_the_streams_of_several_callers_share_batches(make_writer, is_slow):
    batches: list[int] = []

    def run(rows: np.ndarray) -> Predictions:
        batches.append(len(rows))
        return after_each_the_next(rows)

    async def story() -> list[Caller]:
        app = make_app(ModelStore(make_writer(run, is_slow=is_slow)))
        callers = [Caller(app, max_tokens=10) for _ in range(8)]
        await asyncio.gather(*(caller.task for caller in callers))
        return callers

    callers = asyncio.run(story())
    assert all(caller.events[-1] == {"done": True, "tokens": 10} for caller in callers)
    assert max(batches) == 8
    assert len(batches) < 20


def test_a_caller_that_goes_away_ends_its_text(make_writer, monkeypatch):
    monkeypatch.setattr("bigray.serve.under_way.WATCHED_AFTER_S", 0.0)
    monkeypatch.setattr(asgi_module, "TICK_S", 0.001)
    telemetry = Telemetry()

    async def story() -> Caller:
        caller = Caller(make_app(ModelStore(make_writer()), telemetry), max_tokens=10_000)
        await caller.has_news.wait()
        caller.gone.set()
        await asyncio.wait_for(caller.task, 20)
        return caller

    caller = asyncio.run(story())
    assert caller.status == 200
    assert "done" not in caller.events[-1]
    assert telemetry.snapshot()["requests"][0]["statuses"] == {"499": 1}


def test_a_caller_that_does_not_read_is_given_up(make_writer, monkeypatch):
    monkeypatch.setattr(asgi_module, "READS_WITHIN_S", 0.01)

    class Deaf(Caller):
        async def _send(self, message: dict[str, Any]) -> None:
            await super()._send(message)
            if len(self.sent) > 3:
                await asyncio.Event().wait()

    async def story() -> Caller:
        caller = Deaf(make_app(ModelStore(make_writer())), max_tokens=10_000)
        await asyncio.wait_for(caller.task, 20)
        return caller

    assert len(asyncio.run(story()).sent) == 4


def test_a_model_that_fails_on_the_way_says_so_in_the_last_event(make_writer, caplog):
    left = iter([True, True, False])

    def run(rows: np.ndarray) -> Predictions:
        if not next(left):
            raise RuntimeError("secret detail")
        return after_each_the_next(rows)

    telemetry = Telemetry()
    caller = generate(make_app(ModelStore(make_writer(run)), telemetry))
    error = {"error": "internal error; the replica's log has the details"}
    assert (caller.status, caller.events) == (200, [{"text": "b"}, {"text": "c"}, error])
    assert caller.sent[-1].get("more_body", False) is False
    assert telemetry.snapshot()["requests"][0]["statuses"] == {"500": 1}


def test_a_model_that_fails_at_once_is_an_error_as_anywhere(make_writer):
    def run(rows: np.ndarray) -> Predictions:
        raise RuntimeError("secret detail")

    for stream in (True, False):
        assert generate(make_app(ModelStore(make_writer(run))), stream=stream).status == 500


def test_numbers_that_are_not_finite_end_a_text(make_writer):
    def run(rows: np.ndarray) -> Predictions:
        return Predictions(["a"] * len(rows), np.full((len(rows), 3), np.nan, np.float32), None)

    assert generate(make_app(ModelStore(make_writer(run)))).status == 500


def test_a_text_that_has_begun_waits_while_others_fill_the_queue(make_writer, monkeypatch):
    monkeypatch.setattr(answering, "ASKS_AGAIN_S", 0.0)
    no_room = {6, 7, 8}
    asked = 0

    class Crowded(Batcher):
        def check_room(self) -> None:
            nonlocal asked
            asked += 1
            if asked in no_room:
                raise Refusal(503, "overloaded")

    batcher = Crowded(after_each_the_next, Capacity(8, 1e-4, False))
    caller = generate(make_app(ModelStore(replace(make_writer(), batcher=batcher))), max_tokens=6)
    assert caller.events[-1] == {"done": True, "tokens": 6}
    assert asked > max(no_room)


def test_a_version_with_another_vocabulary_does_not_go_on_with_the_text(make_writer):
    left = iter([True, True, False])

    def failing(rows: np.ndarray) -> Predictions:
        if not next(left, False):
            raise RuntimeError
        return after_each_the_next(rows)

    live, candidate = make_writer(vocabulary=("x", "y", "z")), make_writer(failing, version="b" * 12)
    store = ModelStore(live)
    rollout = Rollout(kind="canary", release=Release(version=candidate.version, bundle="/b"), share=1.0)
    held = {live.version: live, candidate.version: candidate}
    store.set_view(View(live, held, rollout, SideBySide("canary", live, candidate)))
    caller = generate(make_app(store))
    assert [*caller.events[:-1], "error" in caller.events[-1]] == [{"text": "b"}, {"text": "c"}, True]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "body: not JSON"),
        (b"[]", "body: expected a JSON object"),
        (b"{}", "prompt: field required"),
        (b'{"prompt": ""}', "prompt: string should have at least 1 character"),
        (b'{"prompt": "a", "max_tokens": "9"}', "max_tokens: input should be a valid integer"),
        (b'{"prompt": "a", "max_tokens": 100000}', "max_tokens: input should be less than or equal to 10000"),
        (b'{"prompt": "a", "best_of": 2}', "best_of: extra inputs are not permitted"),
        (b'{"prompt": "a!"}', "prompt: '!' is not one of the 3 characters of the training text"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_bad_request_is_a_400(make_writer, body, fault, stream):
    body = body if stream or not body.startswith(b'{"') else body[:-1] + b', "stream": false}'
    answer = call(make_app(ModelStore(make_writer())), "POST", "/generate", body)
    assert answer.status == 400
    assert answer.document["error"].startswith(fault)


def test_a_body_of_another_type_is_refused(make_writer):
    answer = call(make_app(ModelStore(make_writer())), "POST", "/generate", b"a", [("content-type", "text/csv")])
    assert answer.status == 415


def test_a_model_of_another_task_writes_no_text(make_model):
    model = make_model()
    answer = call(make_app(ModelStore(model)), "POST", "/generate", b'{"prompt": "a"}')
    assert (answer.status, answer.document["error"]) == (404, "model 'animals' writes no text: it predicts 'label'")
    assert "POST /generate" not in call(make_app(ModelStore(model)), "GET", "/").document["routes"]
    assert "/generate" not in openapi_document(model.manifest, "abc")["paths"]
    with pytest.raises(Refusal):
        decode_generation(b"{}", "", model.manifest)


def test_it_is_listed_and_described_where_there_is_text(make_writer):
    model = make_writer()
    routes = call(make_app(ModelStore(model)), "GET", "/").document["routes"]
    assert {"POST /generate", "POST /v2/models/animals/generate"} <= set(routes)
    paths = openapi_document(model.manifest, "abc")["paths"]
    for path in ("/generate", "/v2/models/animals/generate", "/v2/models/animals/versions/{version}/generate"):
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        assert decode_generation(json.dumps(content["example"]).encode(), "", model.manifest)
        assert set(paths[path]["post"]["responses"]["200"]["content"]) == {"text/event-stream", "application/json"}


def test_what_has_no_room_at_first_is_refused(make_writer):
    class Full(Batcher):
        def check_room(self) -> None:
            raise Refusal(503, "overloaded")

    model = replace(make_writer(), batcher=Full(after_each_the_next, Capacity(8, 1e-4, False)))
    assert generate(make_app(ModelStore(model))).status == 503


def test_it_takes_the_key_that_predictions_take(make_writer, tmp_path):
    path = str(tmp_path / "keys.json")
    secret = create_key(path, "writer")
    app = make_app(ModelStore(make_writer()), guard=Guard(path))
    body = b'{"prompt": "a", "stream": false}'
    assert call(app, "POST", "/generate", body).status == 401
    allowed = asyncio.run(ask(app, "POST", "/generate", body, [("x-api-key", secret)]))
    assert allowed.status == 200


def test_over_a_connection_it_comes_in_chunks_and_the_connection_is_kept(make_writer):
    async def story() -> tuple[bytes, int, int]:
        async with serving(make_writer()) as endpoint:
            client = await endpoint.connect()
            bodies = []
            for _ in range(2):
                await client.send(request(b'{"prompt": "a", "max_tokens": 3}', start="POST /generate"))
                head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
                assert "transfer-encoding: chunked" in head
                bodies.append(await client.reader.readuntil(b"0\r\n\r\n"))
            assert bodies[1].count(b"data: ") == 4
            record = b'{"records": [{"text": "ab"}]}'
            return bodies[1], (await client.ask(request(record))).status, endpoint.front.num_short

    body, status, num_short = run(story())
    assert body.endswith(b'data: {"done":true,"tokens":3}\n\n\r\n0\r\n\r\n')
    assert (status, num_short) == (200, 1)


def test_a_connection_that_is_cut_ends_its_text(make_writer, monkeypatch):
    monkeypatch.setattr("bigray.serve.under_way.WATCHED_AFTER_S", 0.0)
    monkeypatch.setattr(asgi_module, "TICK_S", 0.001)

    async def story() -> list[dict[str, Any]]:
        async with serving(make_writer()) as endpoint:
            client = await endpoint.connect()
            await client.send(request(b'{"prompt": "a", "max_tokens": 10000}', start="POST /generate"))
            await client.reader.readuntil(b"data: ")
            client.writer.close()
            await until(lambda: bool(endpoint.telemetry.snapshot()["requests"]))
            return endpoint.telemetry.snapshot()["requests"]

    (series,) = run(story())
    assert series["statuses"] == {"499": 1}
    assert series["counts"] == [0] * len(series["counts"])
