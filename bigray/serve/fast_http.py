"""Requests for a model straight from the connection to the application: no ASGI, no task, one write an answer.

Only the plain case goes this way: a POST for a model in memory, with a body of a known length that is here at once or
soon, on a connection with nothing else to answer. All else is uvicorn's and takes the ASGI way, with its limits: other
routes, chunked, large and slow bodies, `Expect`, pipelines, clients that do not read their answers (replica, event
loop).
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from bigray.serve.asgi import ModelApp
from bigray.serve.exchange import Exchange, content_length
from bigray.serve.heads import BoundedHttp
from bigray.serve.http import Answer, Headers
from bigray.serve.routes import Route
from bigray.serve.under_way import CLOSE

PATIENCE_S = 0.2
"""A body that takes longer to come is a slow one; one that does not come in one piece may be `HIGH_WATER_LIMIT` large,
which is what uvicorn keeps of any."""
CLOCK_S = 0.001
"""What the clock of an event loop can tell apart."""
NOT_PLAIN = frozenset({b"transfer-encoding", b"expect", b"upgrade"})


class Front(Protocol):
    """What is in front of the application."""

    def below_prefix(self, path: str) -> str | None:
        """The path as the application knows it; None for one that is not the application's."""

    def count(self, change: int) -> None:
        """A request is to be answered (+1), or is over (-1)."""


class BareFront:
    """Nothing is."""

    def below_prefix(self, path: str) -> str | None:
        return path

    def count(self, change: int) -> None:
        pass


def use_fast_http(config: uvicorn.Config, app: ModelApp, front: Front | None = None) -> None:
    """Have the server of `config`, which runs `app`, answer requests for a model the short way.

    `front` stands for what the ASGI way has in front of `app`. Connections that are open already stay as they are.
    """
    connect = partial(FastHttp, app, front or BareFront())
    config.http = connect  # type: ignore[assignment]
    if config.loaded:
        config.http_protocol_class = connect  # type: ignore[assignment]


class QuickCall(Exchange):
    """A request on the short way; the server reads two of its fields as those of uvicorn's own cycle."""

    __slots__ = ("asked", "gathered_bytes", "keep_alive", "leads_to", "patience", "pieces", "response_complete")

    def __init__(self, path: str, headers: list[tuple[bytes, bytes]], client: Any) -> None:
        super().__init__("POST", path, headers, client)
        self.response_complete, self.keep_alive = False, True
        self.leads_to: Route | None = None
        self.pieces: list[bytes] = []
        self.gathered_bytes = 0
        """Of the pieces."""
        self.patience: asyncio.TimerHandle | None = None
        """Runs while the rest of its body is awaited."""
        self.asked: asyncio.Future[Any] | None = None

    def is_plain(self) -> bool:
        """Whether it says how long its body is, and nothing that takes more than an answer."""
        return b"content-length" in self.headers and NOT_PLAIN.isdisjoint(self.headers)

    def give_up(self) -> None:
        """Nobody is there to read an answer."""
        if self.patience is not None:
            self.patience.cancel()
        if self.asked is not None:
            self.asked.cancel()


class FastHttp(BoundedHttp):
    """One connection."""

    def __init__(self, app: ModelApp, front: Front, **options: Any) -> None:
        super().__init__(**options)
        self._model_app, self._front = app, front
        self._is_bare = self.limit_concurrency is None and not self.access_log
        self._call: QuickCall | None = None
        """From its head until its answer; `cycle` is the same, or a request behind it."""
        self._standing: tuple[list[tuple[bytes, bytes]], bytes] = ([], b"")
        self._rest: asyncio.TimerHandle | None = None
        self._rests_since = 0.0

    # the parser's calls

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        call = self._call_to_come()
        if self._is_in_body and call is not None:
            self._await_body(call)

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()  # it is set where an answer was written before all that has come was read
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        self.refuse_upgrade()
        call = self._quick_call()
        if call is None:
            self._take_asgi_way()
            return
        self._got_on = self._is_in_body = True
        self.cycle = self._call = call  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        call = self._call_to_come()
        if call is None:
            super().on_body(body)
            return
        self._got_on = True
        call.pieces.append(body)
        call.gathered_bytes += len(body)

    def on_message_complete(self) -> None:
        call = self._call_to_come()
        if call is None:
            super().on_message_complete()
        elif call.patience is not None and self._model_app.quick_route(call) is None:
            self._hand_over(call)  # its model was let go meanwhile
            super().on_message_complete()
        else:
            self._got_on, self._is_in_body = True, False
            self._begin(call)

    def connection_lost(self, exc: Exception | None) -> None:
        call, self._call = self._call, None
        if isinstance(self.cycle, QuickCall):
            self.cycle = None  # type: ignore[assignment]
        super().connection_lost(exc)
        if call is not None:
            call.give_up()
        if self._rest is not None:
            self._rest.cancel()

    # the short way

    def _call_to_come(self) -> QuickCall | None:
        """The request the parser is at, if it goes the short way; one that was answered stays in `cycle`."""
        cycle: Any = self.cycle
        return self._call if cycle is self._call else None

    def _quick_call(self) -> QuickCall | None:
        """The request whose head has come, where it can go the short way."""
        parser, cycle = self.parser, self.cycle
        is_alone = cycle is None or cycle.response_complete
        if not self._is_bare or not is_alone or self.flow.write_paused or parser.get_method() != b"POST":
            return None
        url = self.url
        if b"?" in url or b"%" in url or b"#" in url or parser.get_http_version() != "1.1":
            return None
        path = self._front.below_prefix(url.decode("latin-1"))
        if path is None:
            return None
        call = QuickCall(path, self.headers, self.client)
        if call.is_plain():
            call.leads_to = self._model_app.quick_route(call)
        call.keep_alive = parser.should_keep_alive()
        return call if call.leads_to is not None else None

    def _begin(self, call: QuickCall) -> None:
        if call.patience is not None:
            call.patience.cancel()
        assert call.leads_to is not None, "else it would not go this way"
        self._front.count(1)
        body = b"".join(call.pieces)
        call.pieces = []
        call.asked = self._model_app.answer_soon(call, call.leads_to, body, partial(self._reply, call))

    def _reply(self, call: QuickCall, answer: Answer, headers: Headers) -> None:
        self._front.count(-1)
        call.answered = None  # an idle connection keeps its last call, which is not to keep a model in memory
        if self._call is not call:
            return  # the connection is gone
        self._call = None
        call.response_complete, call.asked = True, None
        if self.transport.is_closing():
            return
        is_last = not call.keep_alive or CLOSE[0] in answer.headers
        self.transport.write(self._written(answer, headers, is_last))
        if is_last:
            self.transport.close()
        self.on_response_complete()

    def _written(self, answer: Answer, headers: Headers, is_last: bool) -> bytes:
        parts = [STATUS_LINE[answer.status], self._standing_headers(), b"content-type: ", answer.content_type]
        for name, value in (*headers, *answer.headers):
            parts += (b"\r\n", name, b": ", value)
        if is_last and CLOSE[0] not in answer.headers:
            parts.append(b"\r\nconnection: close")
        parts += (b"\r\ncontent-length: %d\r\n\r\n" % len(answer.body), answer.body)
        return b"".join(parts)

    def _standing_headers(self) -> bytes:
        """Those of the server itself, which it makes anew once a second."""
        headers = self.server_state.default_headers
        if self._standing[0] is not headers:
            self._standing = (headers, b"".join(b"%b: %b\r\n" % header for header in headers))
        return self._standing[1]

    # between two requests; one timer goes on from rest to rest, since a new one for each costs as much as a head

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._rests_since = self.loop.time()
        if self._rest is None:
            self._rest = self.loop.call_later(self.timeout_keep_alive, self._end_rest)
        self.timeout_keep_alive_task = self._rest

    def _unset_keepalive_if_required(self) -> None:
        self.timeout_keep_alive_task = None

    def _end_rest(self) -> None:
        self._rest = None
        if self.timeout_keep_alive_task is None:
            return  # there is a request; the next rest makes a timer
        left_s = self._rests_since + self.timeout_keep_alive - self.loop.time()
        if left_s > CLOCK_S:
            self._rest = self.timeout_keep_alive_task = self.loop.call_later(left_s, self._end_rest)
        else:
            self.timeout_keep_alive_handler()

    # from the short way to the other

    def _await_body(self, call: QuickCall) -> None:
        if max(content_length(call.headers), call.gathered_bytes) > HIGH_WATER_LIMIT:
            self._hand_over(call)
        elif call.patience is None:
            call.patience = self.loop.call_later(PATIENCE_S, self._hand_over, call)

    def _hand_over(self, call: QuickCall) -> None:
        """Let the ASGI way go on with a request, from as much as has come of its body."""
        if call.patience is not None:
            call.patience.cancel()
        self._call = self.cycle = None  # type: ignore[assignment]
        self._take_asgi_way()
        cycle = self.cycle
        cycle.keep_alive = cycle.keep_alive and call.keep_alive
        for piece in call.pieces:
            super().on_body(piece)

    def _take_asgi_way(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers  # the list that is in the scope
        super().on_headers_complete()
