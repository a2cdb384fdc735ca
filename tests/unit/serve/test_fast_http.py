from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from bigray.serve import fast_http, heads
from bigray.serve.asgi import Limits, ModelApp
from bigray.serve.compare import SideBySide
from bigray.serve.direct import DirectApp
from bigray.serve.fast_http import BareFront, FastHttp
from bigray.serve.http import Answer as HttpAnswer
from bigray.serve.loaded import LoadedModel
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.protect.keys import create_key
from bigray.serve.release.record import Release, Rollout
from bigray.serve.routes import Router
from bigray.serve.store import ModelStore, View
from tests.unit.serve.conftest import labelled

LIMIT = 100_000
RECORD = {"image": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]}
GOOD = json.dumps({"records": [RECORD]}).encode()
LARGE = json.dumps({"records": [RECORD] * 1500}).encode()
"""More than uvicorn keeps of a body that nobody reads."""
TENSOR = {"name": "image", "datatype": "FP32", "shape": [1, 2, 3], "data": [1, 2, 3, 4, 5, 6]}
INFER = json.dumps({"inputs": [TENSOR]}).encode()


class Counting(BareFront):
    """Sees what goes the short way."""

    def __init__(self) -> None:
        self.num_short = self.num_open = 0

    def count(self, change: int) -> None:
        self.num_short += change > 0
        self.num_open += change


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, of_head: bool = False) -> Answer:
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        length = 0 if of_head else int(headers.get("content-length", 0))
        return Answer(int(first.split()[1]), headers, await self.reader.readexactly(length))

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer()

    async def is_at_end(self) -> bool:
        return await self.reader.read() == b""


@dataclass(frozen=True)
class Endpoint:
    app: ModelApp
    front: Any
    """`Counting`, if not told otherwise."""
    telemetry: Telemetry
    state: ServerState
    port: int

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))


def request(body: bytes = GOOD, *headers: str, start: str = "POST /predict", length: bool = True) -> bytes:
    announced = [f"content-length: {len(body)}"] if length else []
    return "\r\n".join((f"{start} HTTP/1.1", "host: x", *announced, *headers, "", "")).encode() + body


def chunked(body: bytes = GOOD, *headers: str, start: str = "POST /predict") -> bytes:
    """The same the ASGI way."""
    parts = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    return request(b"", "transfer-encoding: chunked", *headers, start=start, length=False) + parts


async def no_numbers() -> HttpAnswer:
    return HttpAnswer(b"{}")


@asynccontextmanager
async def serving(
    models: ModelStore | LoadedModel, *, guard: Guard | None = None, front: Any = None, **options: Any
) -> AsyncIterator[Endpoint]:
    """Connections as in a replica, in this process."""
    store = ModelStore(models) if isinstance(models, LoadedModel) else models
    telemetry, front = Telemetry(), front or Counting()
    app = ModelApp(
        store,
        Router(store, LIMIT, no_numbers, no_numbers),
        guard=guard or Guard(),
        telemetry=telemetry,
        limits=Limits(LIMIT),
        tick=lambda: None,
    )
    config = uvicorn.Config(app, lifespan="off", access_log=False, log_config=None, **options)
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: FastHttp(app, front, config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    yield Endpoint(app, front, telemetry, state, server.sockets[0].getsockname()[1])
    server.close()
    for connection in tuple(state.connections):
        connection.transport.abort()


def run(story: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(story, 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


class Gate:
    """A model that answers when it is let."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.rows: list[int] = []

    def __call__(self, rows):
        self.rows.append(len(rows))
        self.begun.set()
        assert self.open.wait(10)
        return labelled("cat", len(rows))


@pytest.fixture
def model(make_model) -> LoadedModel:
    return make_model()


@pytest.mark.parametrize(
    ("start", "body", "headers", "status"),
    [
        ("POST /predict", GOOD, (), 200),
        ("POST /predict", GOOD, ("accept: application/x-npy",), 200),
        ("POST /v2/models/animals/infer", INFER, (), 200),
        ("POST /v2/models/animals/versions/aaaaaaaaaaaa/infer", INFER, (), 200),
        ("POST /v2/models/animals/versions/bbbbbbbbbbbb/infer", INFER, (), 404),
        ("POST /predict", b"{", (), 400),
        ("POST /predict", b"", (), 400),
        ("POST /predict", GOOD, ("content-type: text/rtf",), 415),
        ("POST /predict", GOOD, ("content-encoding: gzip",), 400),
        ("POST /predict", GOOD, tuple(f"x-{number}: x" for number in range(130)), 431),
    ],
)
def test_an_answer_is_the_same_on_either_way(model, start, body, headers, status):
    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            short = await client.ask(request(body, "x-request-id: mine", *headers, start=start))
            assert endpoint.front.num_short == 1
            if status == 431:  # which ends the connection
                client = await endpoint.connect()
            long = await client.ask(chunked(body, "x-request-id: mine", *headers, start=start))
            assert (endpoint.front.num_short, endpoint.front.num_open) == (1, 0)
            return short, long, endpoint.telemetry.snapshot()

    short, long, counted = run(story())
    assert short.status == status
    assert short == long
    assert [sum(series["statuses"].values()) for series in counted["requests"]] == [2]
    assert counted["load"]["ongoing"] == 0


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request(start="POST /nowhere"), 404),
        (request(start="POST /v2/models/other/infer"), 404),
        (request(b"", start="GET /card"), 200),
        (request(b"", start="GET /predict"), 405),
        (request(start="PUT /predict"), 405),
        (request(start="POST /predict?x=1"), 200),
        (request(start="POST /predic%74"), 200),
        (request(start="POST http://x/predict"), 200),
        (request(INFER, start="POST /v2/models/animals/versions/%61aaaaaaaaaaa/infer"), 200),
        (request(INFER, start="POST /v2/models/animals/versions/aaaaaaaaaaaa?x=/infer"), 405),
        (request(b"x" * (LIMIT + 1)), 413),
        (request(b"x", "content-type: image/png"), 400),
        (request(b"", "connection: upgrade", "upgrade: h2c"), 400),
        (request(b"", length=False), 400),
        (request().replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
    ],
)
def test_what_is_not_plain_takes_the_asgi_way(model, data, status):
    async def story():
        async with serving(model) as endpoint:
            return await (await endpoint.connect()).ask(data), endpoint.front.num_short

    answer, num_short = run(story())
    assert (answer.status, num_short) == (status, 0)


def test_a_head_is_answered_without_a_body(model):
    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            await client.send(request(b"", start="HEAD /card"))
            head = await client.answer(of_head=True)
            return head.status, int(head.headers["content-length"]), (await client.ask(request())).status

    status, length, after = run(story())
    assert (status, after) == (200, 200)
    assert length > 0


def test_a_connection_is_kept_and_closed_as_asked(model):
    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            first = await client.ask(request())
            last = await client.ask(request(GOOD, "connection: close"))
            return first, last, await client.is_at_end(), endpoint.state.total_requests

    first, last, is_at_end, total = run(story())
    assert ("connection" in first.headers, last.headers["connection"]) == (False, "close")
    assert is_at_end
    assert total == 2


def test_the_servers_own_headers_are_those_of_the_moment(model):
    async def story():
        async with serving(model) as endpoint:
            client, dates = await endpoint.connect(), []
            for date in (b"one", b"two"):
                endpoint.state.default_headers = [(b"date", date)]
                dates.append((await client.ask(request())).headers["date"])
            return dates

    assert run(story()) == ["one", "two"]


def test_pipelined_requests_are_answered_in_order(model):
    kinds = (
        request,
        chunked,
        lambda body, *headers: request(b"", *headers, start="GET /card"),
        lambda body, *headers: request(b"{", *headers),
    )
    names = [f"{number}" for number in range(40)]

    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            await client.send(b"".join(kinds[int(name) % 4](GOOD, f"x-request-id: {name}") for name in names))
            answers = [await client.answer() for _ in names]
            return answers, endpoint.front.num_open

    answers, num_open = run(story())
    assert [answer.headers["x-request-id"] for answer in answers] == names
    assert [answer.status for answer in answers] == [200, 200, 200, 400] * 10
    assert num_open == 0


def test_a_great_many_refused_requests_at_once_are_all_answered(model):
    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            sending = asyncio.create_task(client.send(request(b"") * 3000))
            statuses = {(await client.answer()).status for _ in range(3000)}
            await sending
            return statuses

    assert run(story()) == {400}


@pytest.mark.parametrize("size", [1, 50])
def test_a_body_in_pieces_goes_the_short_way(model, size):
    async def story():
        async with serving(model) as endpoint:
            client, data = await endpoint.connect(), request()
            for i in range(0, len(data), size):
                await client.send(data[i : i + size])
                await asyncio.sleep(0)
            return (await client.answer()).status, endpoint.front.num_short

    assert run(story()) == (200, 1)


@pytest.mark.parametrize("body", [GOOD, LARGE])
def test_a_slow_or_large_body_is_left_to_the_application(model, body, monkeypatch):
    monkeypatch.setattr(fast_http, "PATIENCE_S", 0.0 if body is GOOD else 60.0)

    async def story():
        async with serving(model) as endpoint:
            client, data = await endpoint.connect(), request(body)
            for part in (data[:-100], data[-100:-50], data[-50:]):
                await client.send(part)
                await asyncio.sleep(0.05)
            answers = [await client.answer(), await client.ask(request())]
            return [answer.status for answer in answers], endpoint.front.num_short, endpoint.front.num_open

    assert run(story()) == ([200, 200], 1, 0)


def test_an_answer_waits_for_a_caller_that_does_not_read(model):
    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            await client.ask(request())
            (connection,) = endpoint.state.connections
            connection.pause_writing()
            await client.send(request())
            await until(lambda: endpoint.telemetry.snapshot()["total"]["requests"] == 2)
            connection.resume_writing()
            return (await client.answer()).status, endpoint.front.num_short

    assert run(story()) == (200, 1)


def test_who_expects_it_is_told_to_continue(model):
    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            head, body = request(GOOD, "expect: 100-continue").split(b"\r\n\r\n")
            first = await client.ask(head + b"\r\n\r\n")
            return first.status, (await client.ask(body)).status

    assert run(story()) == (100, 200)


def test_a_request_whose_caller_has_gone_is_not_computed(make_model):
    gate = Gate()

    async def story():
        async with serving(make_model(run=gate, is_slow=True)) as endpoint:
            stays, goes = await endpoint.connect(), await endpoint.connect()
            await stays.send(request())
            await until(gate.begun.is_set)
            await goes.send(request())
            await until(lambda: endpoint.front.num_open == 2)
            goes.writer.close()
            await until(lambda: endpoint.front.num_open == 1)
            gate.open.set()
            status = (await stays.answer()).status
            return status, endpoint.front.num_open, endpoint.telemetry.snapshot()

    status, num_open, counted = run(story())
    assert (status, num_open, gate.rows) == (200, 0, [1])
    assert counted["load"]["ongoing"] == 0
    assert {name: count for one in counted["requests"] for name, count in one["statuses"].items()} == {
        "200": 1,
        "499": 1,
    }


def test_a_caller_may_go_at_any_byte(model):
    async def story():
        async with serving(model) as endpoint:
            for end in range(0, len(request()), 7):
                client = await endpoint.connect()
                await client.send(request()[:end])
                client.writer.close()
            await until(lambda: not endpoint.state.connections)
            return (await (await endpoint.connect()).ask(request())).status, endpoint.front.num_open

    assert run(story()) == (200, 0)


def test_a_server_that_ends_answers_what_it_has_begun(make_model):
    gate = Gate()

    async def story():
        async with serving(make_model(run=gate, is_slow=True)) as endpoint:
            idle, busy = await endpoint.connect(), await endpoint.connect()
            await busy.send(request())
            await until(gate.begun.is_set)
            for connection in tuple(endpoint.state.connections):
                connection.shutdown()
            assert await idle.is_at_end()
            gate.open.set()
            return await busy.answer(), await busy.is_at_end()

    answer, is_at_end = run(story())
    assert (answer.status, answer.headers["connection"], is_at_end) == (200, "close", True)


def test_a_server_that_ends_waits_for_a_body(model, monkeypatch):
    monkeypatch.setattr(fast_http, "PATIENCE_S", 0.02)

    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            await client.send(request()[:-1])
            await until(lambda: bool(endpoint.state.connections))
            await asyncio.sleep(0)
            (connection,) = endpoint.state.connections
            await until(lambda: connection.cycle is not None)
            connection.shutdown()
            await asyncio.sleep(0.1)
            return (await client.ask(request()[-1:])).headers["connection"], await client.is_at_end()

    assert run(story()) == ("close", True)


def test_a_connection_with_a_request_is_not_idle(make_model):
    gate = Gate()

    async def story():
        async with serving(make_model(run=gate, is_slow=True), timeout_keep_alive=0) as endpoint:
            client = await endpoint.connect()
            await client.send(request(b"{") + request())
            first = await client.answer()
            await until(gate.begun.is_set)
            await asyncio.sleep(0.05)
            gate.open.set()
            return first.status, (await client.answer()).status

    assert run(story()) == (400, 200)


def test_a_model_that_fails_is_an_error(make_model):
    def fail(rows):
        raise ValueError("secret")

    async def story():
        async with serving(make_model(run=fail)) as endpoint:
            client = await endpoint.connect()
            return await client.ask(request()), await client.ask(chunked(GOOD)), endpoint.front.num_open

    short, long, num_open = run(story())
    assert (short.status, short.body, num_open) == (500, long.body, 0)


def test_keys_are_asked_for(model, tmp_path):
    keys = str(tmp_path / "keys.json")
    secret = create_key(keys, "anna")

    async def story():
        async with serving(model, guard=Guard(keys)) as endpoint:
            client = await endpoint.connect()
            statuses = [
                (await client.ask(request(GOOD, *headers))).status
                for headers in ((), ("x-api-key: no",), (f"authorization: Bearer {secret}",))
            ]
            return statuses, endpoint.front.num_short, endpoint.telemetry.snapshot()["refused"]

    assert run(story()) == ([401, 401, 200], 3, {"401": 2})


def test_a_canary_answers_its_share(make_model):
    live, candidate = make_model("a" * 12, "cat"), make_model("b" * 12, "dog")
    store = ModelStore(live)
    rollout = Rollout(kind="canary", release=Release(version=candidate.version, bundle="/b"), share=0.5)
    beside = SideBySide("canary", live, candidate)
    store.set_view(View(live, {live.version: live, candidate.version: candidate}, rollout, beside))

    async def story():
        async with serving(store) as endpoint:
            client = await endpoint.connect()
            answers = [await client.ask(request(GOOD, f"x-bigray-key: {number}")) for number in range(40)]
            return answers, endpoint.front.num_short

    answers, num_short = run(story())
    assert num_short == 40
    seen = {(one.headers["x-bigray-version"], json.loads(one.body)["predictions"][0]["label"]) for one in answers}
    assert seen == {("a" * 12, "cat"), ("b" * 12, "dog")}
    counted = beside.comparison()
    assert counted.live.requests + counted.candidate.requests == 40


class ServesReplica:
    """What bigray reads of Serve's replica."""

    def __init__(self) -> None:
        self._route_prefix = "/second"
        self._metrics_manager = SimpleNamespace(_num_ongoing_requests=0)

    async def direct_ingress(self, scope, receive, send) -> None:
        raise AssertionError("not asked")


def test_behind_serve_the_prefix_is_taken_off_and_the_request_counted(make_model):
    gate, replica = Gate(), ServesReplica()

    def num_ongoing() -> int:
        return replica._metrics_manager._num_ongoing_requests

    async def story():
        front = DirectApp(None, replica.direct_ingress)
        async with serving(make_model(run=gate, is_slow=True), front=front) as endpoint:
            client, elsewhere = await endpoint.connect(), await endpoint.connect()
            await client.send(request(start="POST /second/predict"))
            await until(gate.begun.is_set)
            during = num_ongoing()
            await elsewhere.send(request())
            await until(lambda: endpoint.telemetry.snapshot()["load"]["ongoing"] == 2)
            beside = num_ongoing()
            gate.open.set()
            return (await client.answer()).status, during, beside, num_ongoing()

    assert run(story()) == (200, 1, 1, 0)


def test_a_connection_that_rests_too_long_is_closed_and_one_that_is_asked_again_is_not(model):
    async def story():
        async with serving(model, timeout_keep_alive=0.3) as endpoint:
            resting, asking = await endpoint.connect(), await endpoint.connect()
            await resting.ask(request())
            is_closed = asyncio.create_task(resting.is_at_end())
            statuses = []
            while not is_closed.done():
                statuses.append((await asking.ask(request())).status)
                await asyncio.sleep(0.05)
            statuses.append((await asking.ask(request())).status)
            return is_closed.result(), set(statuses), await asking.is_at_end()

    assert run(story()) == (True, {200}, True)


def test_what_does_not_become_a_request_is_bounded_as_on_any_connection(model):
    async def story():
        async with serving(model) as endpoint:
            large, slow = await endpoint.connect(), await endpoint.connect()
            await large.ask(request())
            refused = await large.ask(request()[:30] + b"x" * (heads.MOST_HEAD_BYTES + 1))
            await slow.ask(request())
            await slow.send(request()[:30])
            (connection,) = endpoint.state.connections
            await until(lambda: connection.timeout_keep_alive_task is None)
            connection.look_after(0.0)
            connection.look_after(heads.HEAD_TIMEOUT_S + 1)
            return refused.status, await large.is_at_end(), (await slow.answer()).status, await slow.is_at_end()

    assert run(story()) == (431, True, 408, True)


@pytest.mark.parametrize("protocol", ["x", "websocket"])
@pytest.mark.parametrize("is_at_once", [True, False])
def test_a_request_for_another_protocol_ends_the_connection_and_repeats_no_answer(model, protocol, is_at_once):
    inner = request(GOOD, "x-request-id: smuggled")
    outer = request(inner, "connection: upgrade", f"upgrade: {protocol}")

    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            await client.ask(request())
            refused = await client.ask(outer if is_at_once else outer.removesuffix(inner))
            if not is_at_once:
                client.writer.write(inner)
            return refused.status, await client.reader.read(), endpoint.front, endpoint.telemetry.snapshot()

    status, rest, front, counted = run(story())
    assert (status, rest, front.num_short, front.num_open) == (400, b"", 1, 0)
    assert counted["total"]["requests"] == 1


@pytest.mark.parametrize(("size", "status", "num_short"), [(len(GOOD), 200, 1), (LIMIT + 1, 413, 0)])
@pytest.mark.parametrize("blanks", [" ", "\t", " \t "])
def test_blanks_behind_the_length_of_a_body_do_not_hide_it(model, size, status, num_short, blanks):
    body = GOOD + b" " * (size - len(GOOD))

    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            answer = await client.ask(request(body, f"content-length: {size}{blanks}", length=False))
            return answer.status, endpoint.front.num_short

    assert run(story()) == (status, num_short)


def test_a_body_over_the_limit_is_refused_however_it_came_here(model):
    async def story():
        async with serving(model) as endpoint:
            call = fast_http.QuickCall("/predict", [(b"content-length", b"1")], None)
            route, answers = endpoint.app.quick_route(call), []
            asked = endpoint.app.answer_soon(call, route, b" " * (LIMIT + 1), lambda answer, _: answers.append(answer))
            return asked, [answer.status for answer in answers], endpoint.telemetry.snapshot()

    asked, statuses, counted = run(story())
    assert (asked, statuses, counted["refused"], counted["load"]["ongoing"]) == (None, [413], {"413": 1}, 0)


def test_what_is_gathered_of_a_body_is_bounded_by_itself(model, monkeypatch):
    monkeypatch.setattr(fast_http, "PATIENCE_S", 60.0)
    monkeypatch.setattr(fast_http, "content_length", lambda headers: 0)  # as if it could not be read

    async def story():
        async with serving(model) as endpoint:
            client, data = await endpoint.connect(), request(LARGE)
            await client.send(data[:-1])
            await until(lambda: endpoint.telemetry.snapshot()["load"]["ongoing"] == 1)
            return (await client.ask(data[-1:])).status, endpoint.front.num_short

    assert run(story()) == (200, 0)


def test_a_connection_that_rests_keeps_no_model_in_memory(model):
    async def story():
        async with serving(model) as endpoint:
            client = await endpoint.connect()
            await client.ask(request())
            (connection,) = endpoint.state.connections
            return connection.cycle.answered

    assert run(story()) is None


@pytest.mark.parametrize("is_closing", [True, False])
def test_a_client_that_does_not_read_its_answer_is_let_go_and_a_slow_one_is_not(model, is_closing):
    answer = b"x" * (32 * 2**20)

    async def story():
        async with serving(model) as endpoint:
            deaf, slow = await endpoint.connect(), await endpoint.connect()
            for client in (deaf, slow):
                await client.ask(request())
            connections = {one.client[1]: one for one in endpoint.state.connections}
            of_deaf, of_slow = (connections[one.writer.get_extra_info("sockname")[1]] for one in (deaf, slow))
            for connection in (of_deaf, of_slow):
                connection.transport.write(answer)
                if is_closing:
                    connection.transport.close()
                connection.look_after(0.0)
                connection.look_after(heads.UNREAD_TIMEOUT_S)
            unread = of_slow.transport.get_write_buffer_size()
            while of_slow.transport.get_write_buffer_size() == unread:
                await slow.reader.read(2**20)
            for connection in (of_deaf, of_slow):
                connection.look_after(heads.UNREAD_TIMEOUT_S + 1)
            await until(lambda: of_deaf not in endpoint.state.connections)
            return of_slow in endpoint.state.connections

    assert run(story())
