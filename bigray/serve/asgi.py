"""The HTTP application of an endpoint: raw ASGI, so that nothing stands between the server and the model.

Runs in the replica under Serve, in the gate's candidate process, and anywhere else an ASGI application runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from bigray.errors import SpecError
from bigray.serve.http import Answer, Headers, Refusal, Request
from bigray.serve.loaded import LoadedModel
from bigray.serve.observe.access_log import AccessLog
from bigray.serve.observe.telemetry import MODEL_ROUTES, Telemetry
from bigray.serve.protect.guard import Guard
from bigray.serve.routes import OPEN, Route, Router
from bigray.serve.store import ModelStore
from bigray.serve.under_way import CLOSE, Attended, UnderWay

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DRAINED_BYTES = 64 * 2**20
"""A body over the limit is read to its end up to this size, since a client that is still sending cannot read an answer;
of a larger one the connection is closed."""
TICK_S = 0.2
ID_BYTES = 8
LONGEST_ID = 128
MOST_HEADERS, MOST_HEADER_BYTES = 128, 64 * 1024

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 10.0
    """A body that has not come whole by then is refused with 408."""


class ModelApp:
    """Answers every route of the models in a store (one event loop)."""

    def __init__(
        self,
        store: ModelStore,
        router: Router,
        *,
        guard: Guard,
        telemetry: Telemetry,
        limits: Limits,
        tick: Callable[[], None],
        access_log: AccessLog | None = None,
    ) -> None:
        """`tick` is called several times a second while the server runs."""
        self._tick = tick
        self._store, self._router, self._guard = store, router, guard
        self._telemetry, self._limits, self._access_log = telemetry, limits, access_log
        self._under_way = UnderWay(limits.body_timeout_s)
        self._ticking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer_http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _answer_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._ticking is None or self._ticking.done():
            self._start_ticking()
        started = time.perf_counter()
        exchange = _Exchange(scope, dict(scope["headers"]), self._under_way.begin(receive))
        try:
            answer = await self._answer(exchange, receive)
        except asyncio.CancelledError:
            refusal = exchange.attended.fault
            if refusal is None or exchange.attended.task is None:
                raise
            if exchange.attended.task.uncancel() > 0:
                raise  # the server ends it as well
            self._count_refusal(refusal, exchange)
            answer = _error(refusal.status, refusal.message, refusal.headers)
        except Refusal as refusal:
            self._count_refusal(refusal, exchange)
            answer = _error(refusal.status, refusal.message, refusal.headers)
        except SpecError as error:
            answer = _error(400, _one_line(str(error)))
        except Exception:
            _logger.exception("bigray: a request failed")
            answer = _error(500, "internal error; the replica's log has the details")
        finally:
            self._under_way.end(exchange.attended)
            if exchange.is_model_route:
                self._telemetry.ongoing(-1)
        self._record(exchange, answer, time.perf_counter() - started)
        await _send_answer(send, answer, exchange.answer_headers(self._store))

    async def _answer(self, exchange: _Exchange, receive: Receive) -> Answer:
        _check_headers(exchange.scope["headers"])
        route = self._router.find(exchange.path, exchange.method)
        exchange.route = route.kind
        if route.kind in MODEL_ROUTES:
            exchange.is_model_route = True
            self._telemetry.ongoing(1)
        if route.scope != OPEN:
            key = self._guard.authorize(exchange.headers, route.scope)
            exchange.key_id = key.id if key is not None else ""
        body = await self._read_body(exchange, receive)
        request = Request(exchange.method, exchange.path, exchange.headers, body)
        if route.handler is not None:
            return await route.handler(request)
        return await self._ask_model(exchange, route, request)

    async def _ask_model(self, exchange: _Exchange, route: Route, request: Request) -> Answer:
        name = route.model
        if name is not None and not self._store.is_loaded(name):
            await self._store.load(name)
        chosen = self._store.find(name, route.version, exchange.sticky())
        chosen.batcher.check_room()  # before the body is decoded: refusing has to be cheap
        question = route.decode(request, chosen)
        exchange.rows = len(question.rows)
        exchange.answered = chosen  # what fails from here on is this version's
        predictions, exchange.answered = await self._store.predict(chosen, question.rows)
        return question.encode(predictions, exchange.answered)

    async def _read_body(self, exchange: _Exchange, receive: Receive) -> bytes:
        message = await receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            body = await self._read_rest(exchange, receive, body)
        exchange.attended.is_reading = False
        exchange.body_bytes = len(body)
        if len(body) > self._limits.max_body_bytes:
            raise self._too_large(len(body))
        return body

    async def _read_rest(self, exchange: _Exchange, receive: Receive, first: bytes) -> bytes:
        announced = _content_length(exchange.headers)
        if announced > max(DRAINED_BYTES, self._limits.max_body_bytes):
            raise self._too_large(announced, CLOSE)
        chunks, size, more = [first], len(first), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "body: the connection ended in it", CLOSE)
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > max(DRAINED_BYTES, self._limits.max_body_bytes):
                raise self._too_large(size, CLOSE)
            if size <= self._limits.max_body_bytes:
                chunks.append(chunk)
            more = message.get("more_body", False)
        if size > self._limits.max_body_bytes:
            raise self._too_large(size)
        return b"".join(chunks)

    def _too_large(self, size: int, headers: Headers = ()) -> Refusal:
        limit_mb = self._limits.max_body_bytes / 2**20
        return Refusal(
            413, f"body: {size / 2**20:.1f} MB is over the limit of {limit_mb:g} MB; send fewer rows", headers
        )

    async def _live(self, receive: Receive, send: Send) -> None:
        """From the server's start to its end."""
        self._start_ticking()
        while True:
            message = await receive()
            is_end = message["type"] == "lifespan.shutdown"
            if is_end:
                if self._ticking is not None:
                    self._ticking.cancel()
                if self._access_log is not None:
                    await asyncio.to_thread(self._access_log.close)
            await send({"type": f"{message['type']}.complete"})
            if is_end:
                return

    def _start_ticking(self) -> None:
        self._ticking = asyncio.get_running_loop().create_task(self._keep_ticking())

    async def _keep_ticking(self) -> None:
        while True:
            self._under_way.look_after()
            self._tick()
            await asyncio.sleep(TICK_S)

    def _count_refusal(self, refusal: Refusal, exchange: _Exchange) -> None:
        if refusal.status == 503 and exchange.is_model_route:
            self._telemetry.shed(self._store.view.live.name)
        elif refusal.status in (401, 403, 408, 413, 429):
            self._telemetry.refused(str(refusal.status))

    def _record(self, exchange: _Exchange, answer: Answer, seconds: float) -> None:
        model = exchange.answered
        name, version = (model.name, model.version) if model is not None else ("", "")
        self._telemetry.record(
            name, version, exchange.route, answer.status, seconds, exchange.rows, exchange.body_bytes
        )
        if self._access_log is not None:
            self._access_log.write(
                id=exchange.request_id(),
                method=exchange.method,
                path=exchange.path,
                status=answer.status,
                seconds=seconds,
                rows=exchange.rows,
                body_bytes=exchange.body_bytes,
                model=name,
                version=version,
                key_id=exchange.key_id,
                client=exchange.client(),
            )


class _Exchange:
    """What becomes known of one request on its way."""

    __slots__ = (
        "_id",
        "answered",
        "attended",
        "body_bytes",
        "headers",
        "is_model_route",
        "key_id",
        "method",
        "path",
        "route",
        "rows",
        "scope",
    )

    def __init__(self, scope: Scope, headers: Mapping[bytes, bytes], attended: Attended) -> None:
        self.scope, self.headers, self.attended = scope, headers, attended
        self.method: str = scope["method"]
        self.path: str = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        self.route, self.key_id, self.rows, self.body_bytes = "other", "", 0, 0
        self.is_model_route = False
        self.answered: LoadedModel | None = None
        self._id = ""

    def request_id(self) -> str:
        """The caller's own where it is harmless to repeat, else one of ours."""
        if not self._id:
            given = self.headers.get(b"x-request-id", b"")[:LONGEST_ID].decode("ascii", "ignore")
            self._id = given if given and given.isprintable() else os.urandom(ID_BYTES).hex()
        return self._id

    def sticky(self) -> str:
        """What stays the same from one request of a caller to the next, where the caller says so.

        Else each request is a caller of its own: behind a proxy all have one address, and one API key may stand for
        all users of a service, so either would put the whole traffic on one side of a canary.
        """
        given = self.headers.get(b"x-bigray-key") or self.headers.get(b"x-forwarded-for")
        return given.decode("latin-1") if given else self.request_id()

    def client(self) -> str:
        forwarded = self.headers.get(b"x-forwarded-for")
        if forwarded:
            return forwarded.decode("latin-1")
        client = self.scope.get("client")
        return str(client[0]) if client else ""

    def answer_headers(self, store: ModelStore) -> Headers:
        version = self.answered.version if self.answered is not None else store.view.live.version
        return ((b"x-bigray-version", version.encode()), (b"x-request-id", self.request_id().encode()))


async def _send_answer(send: Send, answer: Answer, headers: Headers) -> None:
    length = (b"content-length", str(len(answer.body)).encode())
    sent = ((b"content-type", answer.content_type), length, *headers, *answer.headers)
    await send({"type": "http.response.start", "status": answer.status, "headers": sent})
    await send({"type": "http.response.body", "body": answer.body})


def _check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """HAProxy has limits of its own; a replica can be reached without it, and its HTTP parser has none."""
    if len(headers) > MOST_HEADERS or sum(len(name) + len(value) for name, value in headers) > MOST_HEADER_BYTES:
        raise Refusal(431, f"headers: more than {MOST_HEADERS}, or {MOST_HEADER_BYTES // 1024} kB of them", CLOSE)


def _error(status: int, message: str, headers: Headers = ()) -> Answer:
    return Answer(orjson.dumps({"error": message}), status=status, headers=headers)


def _one_line(message: str) -> str:
    return "; ".join(message.splitlines())


def _content_length(headers: Mapping[bytes, bytes]) -> int:
    text = headers.get(b"content-length", b"")
    return int(text) if text.isdigit() else 0
