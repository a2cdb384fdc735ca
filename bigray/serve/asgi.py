"""The HTTP application of an endpoint: raw ASGI, so that nothing stands between the server and the model.

Runs in the replica under Serve, in the gate's candidate process, and anywhere else an ASGI application runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bigray.errors import SpecError
from bigray.inference import Predictions
from bigray.serve.exchange import Exchange, content_length
from bigray.serve.explaining import ExplanationDesk
from bigray.serve.generation.answering import answer_generation
from bigray.serve.http import TRY_AGAIN, Answer, Headers, Refusal, Request, Streamed
from bigray.serve.loaded import LoadedModel
from bigray.serve.observe.access_log import AccessLog
from bigray.serve.observe.telemetry import MODEL_ROUTES, Telemetry
from bigray.serve.pictures import is_picture, may_hold_pictures, picture_desk
from bigray.serve.protect.guard import Guard
from bigray.serve.routes import OPEN, Question, Route, Router
from bigray.serve.store import ModelStore
from bigray.serve.under_way import CLOSE, GONE, Attended, UnderWay

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Reply = Callable[[Answer, Headers], None]

DRAINED_BYTES = 64 * 2**20
"""A body over the limit is read to its end up to this size, since a client that is still sending cannot read an answer;
of a larger one the connection is closed."""
BODIES_AT_ONCE, LEAST_HELD_BYTES = 4, 256 * 2**20
"""Bodies that come in parts are held up to so many of the largest allowed, or that many bytes where it is more: they
come as slowly as their senders like. A body that comes in one piece is decoded before the next one is looked at."""
TICK_S = 0.2
READS_WITHIN_S = 30.0
"""A caller that takes no more of a streamed answer for so long has gone."""

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 10.0
    """A body that has not come whole by then is refused with 408."""
    request_timeout_s: float = 30.0
    """A picture that is not decoded by then is given up with 504; all else that waits, the batchers give up."""
    max_queue_s: float = 1.0
    """Work on pictures, in seconds, that may wait; one beyond it is refused with 503."""


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
        self._pictures = picture_desk(limits.request_timeout_s, limits.max_queue_s)
        self._held_bytes = 0
        self._most_held_bytes = max(BODIES_AT_ONCE * limits.max_body_bytes, LEAST_HELD_BYTES)
        self._ticking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer_http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _answer_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._see_to_ticking()
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        exchange = Exchange(scope["method"], path, scope["headers"], scope.get("client"))
        attended = self._under_way.begin(receive)
        try:
            found = await self._answer(exchange, attended)
            answer = await self._stream(found, exchange, send) if isinstance(found, Streamed) else found
        except asyncio.CancelledError:
            refusal = attended.fault
            if refusal is None or attended.task is None:
                raise
            if attended.task.uncancel() > 0:
                raise  # the server ends it as well
            answer = self._refused(refusal, exchange)
        except Exception as error:
            answer = self._refused(error, exchange)
        finally:
            self._under_way.end(attended)
            self._held_bytes -= exchange.held_bytes
            if exchange.is_model_route:
                self._telemetry.ongoing(-1)
        self._record(exchange, answer)
        if not exchange.is_begun:
            await _send_answer(send, answer, exchange.answer_headers(self._store.view.live.version))
        elif answer.status != 499:
            await send({"type": "http.response.body", "body": b""})

    def quick_route(self, exchange: Exchange) -> Route | None:
        """Where a POST leads that `answer_soon` answers.

        None where it takes the ASGI way: what asks no model, a picture, a body over the limit, a model to be loaded.
        """
        if content_length(exchange.headers) > self._limits.max_body_bytes or is_picture(exchange.headers):
            return None
        try:
            route = self._router.find(exchange.path, exchange.method)
        except Refusal:
            return None
        asks_once = route.handler is None and route.generates is None and route.explains is None
        is_quick = asks_once and (route.model is None or self._store.is_loaded(route.model))
        return route if is_quick else None

    def answer_soon(self, exchange: Exchange, route: Route, body: bytes, reply: Reply) -> asyncio.Future[Any] | None:
        """Answer a request whose body is here without a task for it: `reply` is called once.

        It is called at once, or when the future that is returned is done. To cancel that is to give the request up.
        """
        self._see_to_ticking()
        exchange.body_bytes = len(body)
        try:
            exchange.check_headers()
            self._admit(exchange, route)
            if len(body) > self._limits.max_body_bytes:
                raise self._too_large(len(body))
            chosen = self._store.find(route.model, route.version, exchange.sticky())
            chosen.batcher.check_room()
            request = Request(exchange.method, exchange.path, exchange.headers, body)
            if _is_dear(route, request, chosen):
                return self._answer_later(exchange, route, request, reply)
            question = route.decode(request, chosen)
            exchange.rows = len(question.rows)
            exchange.answered = chosen
            asked = self._store.ask(chosen, question.rows)
        except Exception as error:
            self._reply(exchange, self._refused(error, exchange), reply)
            return None
        asked.add_done_callback(partial(self._on_answer, exchange, question, reply))
        return asked

    def _answer_later(self, exchange: Exchange, route: Route, request: Request, reply: Reply) -> asyncio.Future[Any]:
        asked = asyncio.get_running_loop().create_task(self._ask_model(exchange, route, request))
        asked.add_done_callback(partial(self._on_late_answer, exchange, reply))
        return asked

    def _on_late_answer(self, exchange: Exchange, reply: Reply, asked: asyncio.Future[Answer]) -> None:
        try:
            answer = asked.result()
        except asyncio.CancelledError:
            answer = self._refused(Refusal(499, GONE), exchange)
        except Exception as error:
            answer = self._refused(error, exchange)
        self._reply(exchange, answer, reply)

    def _on_answer(self, exchange: Exchange, question: Question, reply: Reply, asked: asyncio.Future[Any]) -> None:
        try:
            result = asked.result()
            if not isinstance(result, Predictions):
                result, exchange.answered = result
            assert exchange.answered is not None, "it was set before it was asked"
            answer = question.encode(result, exchange.answered)
        except asyncio.CancelledError:
            answer = self._refused(Refusal(499, GONE), exchange)
        except Exception as error:
            answer = self._refused(error, exchange)
        self._reply(exchange, answer, reply)

    def _reply(self, exchange: Exchange, answer: Answer, reply: Reply) -> None:
        if exchange.is_model_route:
            self._telemetry.ongoing(-1)
        self._record(exchange, answer)
        reply(answer, exchange.answer_headers(self._store.view.live.version))

    async def _answer(self, exchange: Exchange, attended: Attended) -> Answer | Streamed:
        exchange.check_headers()
        route = self._router.find(exchange.path, exchange.method)
        self._admit(exchange, route)
        if route.handler is None:
            self._check_room(exchange, route)
        body = await self._read_body(exchange, attended)
        request = Request(exchange.method, exchange.path, exchange.headers, body)
        if route.handler is not None:
            return await route.handler(request)
        if route.generates is not None:
            return await self._generate(exchange, route, request)
        if route.explains is not None:
            return await self._explain(exchange, route, route.explains, request)
        return await self._ask_model(exchange, route, request)

    def _admit(self, exchange: Exchange, route: Route) -> None:
        """Count a request, and refuse one whose caller may not ask."""
        exchange.route = route.kind
        if route.kind in MODEL_ROUTES:
            exchange.is_model_route = True
            self._telemetry.ongoing(1)
        if route.model is not None and self._store.knows(route.model):  # else callers could make labels of metrics
            exchange.model = route.model
        if route.scope != OPEN:
            key = self._guard.authorize(exchange.headers, route.scope)
            exchange.key_id = key.id if key is not None else ""

    def _check_room(self, exchange: Exchange, route: Route) -> None:
        """Refuse what would wait too long before its body is read; a model that is not in memory has room."""
        if is_picture(exchange.headers):
            self._pictures.check_room()
        if route.explains is not None:
            route.explains.check_room()
        elif route.model is None or self._store.is_loaded(route.model):
            self._store.find(route.model, route.version, exchange.sticky()).batcher.check_room()

    async def _ask_model(self, exchange: Exchange, route: Route, request: Request) -> Answer:
        chosen = await self._choose(exchange, route)
        question = await self._decode(route, request, chosen)
        exchange.rows = len(question.rows)
        exchange.answered = chosen  # what fails from here on is this version's
        predictions, exchange.answered = await self._store.predict(chosen, question.rows)
        return question.encode(predictions, exchange.answered)

    async def _explain(
        self, exchange: Exchange, route: Route, explanations: ExplanationDesk, request: Request
    ) -> Answer:
        """Rows are decoded as for a prediction, and never meet others in a batch."""
        chosen = await self._find(exchange, route)
        explanations.check_supported(chosen)
        rows = (await self._decode(route, request, chosen)).rows
        exchange.rows, exchange.answered = len(rows), chosen
        return await explanations.answer(chosen, rows, request.header(b"accept"))

    async def _decode(self, route: Route, request: Request, chosen: LoadedModel) -> Question:
        if _is_dear(route, request, chosen):
            return await self._pictures.run(route.decode, request, chosen)
        return route.decode(request, chosen)

    async def _find(self, exchange: Exchange, route: Route) -> LoadedModel:
        name = route.model
        if name is not None and not self._store.is_loaded(name):
            await self._store.load(name)
        return self._store.find(name, route.version, exchange.sticky())

    async def _choose(self, exchange: Exchange, route: Route) -> LoadedModel:
        chosen = await self._find(exchange, route)
        chosen.batcher.check_room()  # again: the body may have come slowly, and to decode one that is refused is dear
        return chosen

    async def _generate(self, exchange: Exchange, route: Route, request: Request) -> Answer | Streamed:
        """Text, for which the model is asked once a token: its rows meet those of all others in the model's batches."""
        chosen = await self._choose(exchange, route)
        assert route.generates is not None, "else it would not go this way"
        asked = route.generates(request, chosen)
        self._held_bytes, exchange.held_bytes = self._held_bytes - exchange.held_bytes, 0  # it may take minutes
        exchange.answered = chosen
        vocabulary = chosen.manifest.outputs.class_names

        async def ask(window: NDArray[np.float32]) -> NDArray[np.float32]:
            predictions, by = await self._store.predict(chosen, window)
            if by.manifest.outputs.class_names != vocabulary:  # a canary failed, and the version before knows others
                raise Refusal(500, "the version that wrote this text has failed; try again")
            exchange.answered = by
            exchange.rows += 1
            assert predictions.probabilities is not None, "a model of language has them"
            return predictions.probabilities

        return await answer_generation(asked, chosen.manifest, chosen.version, ask)

    async def _stream(self, answer: Streamed, exchange: Exchange, send: Send) -> Answer:
        """Send all of an answer but its end; what is returned is for the records alone."""
        status = answer.status
        async with aclosing(answer.pieces) as pieces:  # type: ignore[type-var]  # of an async generator, which has it
            piece = await anext(pieces)
            headers = exchange.answer_headers(self._store.view.live.version)
            head = ((b"content-type", answer.content_type), *headers, *answer.headers)
            exchange.is_begun = True
            await send({"type": "http.response.start", "status": answer.status, "headers": head})
            await _send_piece(send, piece)
            try:
                async for piece in pieces:
                    await _send_piece(send, piece)
            except Exception as error:
                refused = self._refused(error, exchange)
                status = refused.status
                if status != 499:
                    await _send_piece(send, answer.encode_fault(orjson.loads(refused.body)["error"]))
        return Answer(b"", answer.content_type, status)

    async def _read_body(self, exchange: Exchange, attended: Attended) -> bytes:
        message = await attended.receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            body = await self._read_rest(exchange, attended.receive, body)
        attended.is_reading = False
        exchange.body_bytes = len(body)
        if len(body) > self._limits.max_body_bytes:
            raise self._too_large(len(body))
        return body

    async def _read_rest(self, exchange: Exchange, receive: Receive, first: bytes) -> bytes:
        announced = content_length(exchange.headers)
        if announced > max(DRAINED_BYTES, self._limits.max_body_bytes):
            raise self._too_large(announced, CLOSE)
        self._hold(exchange, len(first))
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
                self._hold(exchange, len(chunk))
                chunks.append(chunk)
            more = message.get("more_body", False)
        if size > self._limits.max_body_bytes:
            raise self._too_large(size)
        return b"".join(chunks)

    def _hold(self, exchange: Exchange, size: int) -> None:
        """Count bytes that stay in memory until the request is answered."""
        exchange.held_bytes += size
        self._held_bytes += size
        if self._held_bytes > self._most_held_bytes:
            held_mb = self._most_held_bytes / 2**20
            raise Refusal(
                503, f"overloaded: bodies of {held_mb:g} MB are being read; try again later", (*TRY_AGAIN, *CLOSE)
            )

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

    def _see_to_ticking(self) -> None:
        if self._ticking is None or self._ticking.done():
            self._start_ticking()

    def _start_ticking(self) -> None:
        self._ticking = asyncio.get_running_loop().create_task(self._keep_ticking())

    async def _keep_ticking(self) -> None:
        while True:
            self._under_way.look_after()
            self._tick()
            await asyncio.sleep(TICK_S)

    def _refused(self, error: Exception, exchange: Exchange) -> Answer:
        """What to answer where there is no answer."""
        if isinstance(error, Refusal):
            self._count_refusal(error, exchange)
            return _error(error.status, error.message, error.headers)
        if isinstance(error, SpecError):
            return _error(400, _one_line(str(error)))
        _logger.error("bigray: a request failed", exc_info=error)
        return _error(500, "internal error; the replica's log has the details")

    def _count_refusal(self, refusal: Refusal, exchange: Exchange) -> None:
        if refusal.status == 503 and exchange.is_model_route:
            self._telemetry.shed(exchange.model or self._store.view.live.name)
        elif refusal.status in (401, 403, 408, 413, 429):
            self._telemetry.refused(str(refusal.status))

    def _record(self, exchange: Exchange, answer: Answer) -> None:
        seconds = time.perf_counter() - exchange.started
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


def _is_dear(route: Route, request: Request, chosen: LoadedModel) -> bool:
    """Whether a body may hold pictures, and is to be decoded where nobody waits for it but its caller."""
    takes_records = route.kind != "infer"
    return is_picture(request.headers) or (takes_records and may_hold_pictures(request, chosen.manifest))


async def _send_answer(send: Send, answer: Answer, headers: Headers) -> None:
    length = (b"content-length", str(len(answer.body)).encode())
    sent = ((b"content-type", answer.content_type), length, *headers, *answer.headers)
    await send({"type": "http.response.start", "status": answer.status, "headers": sent})
    await send({"type": "http.response.body", "body": answer.body})


async def _send_piece(send: Send, piece: bytes) -> None:
    try:
        async with asyncio.timeout(READS_WITHIN_S):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except TimeoutError:
        raise Refusal(499, GONE) from None


def _error(status: int, message: str, headers: Headers = ()) -> Answer:
    return Answer(orjson.dumps({"error": message}), status=status, headers=headers)


def _one_line(message: str) -> str:
    return "; ".join(message.splitlines())
