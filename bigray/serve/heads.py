"""What may come to a replica's own port before it is a request: bounded in bytes and in time.

In front of the replicas HAProxy bounds both, but a replica's port can be reached without it, and the parser of its
HTTP server gathers an endless URL or header for as long as it comes (replica, event loop).
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 64 * 1024
"""Received without an end of a head, a part of a body or an end of a message among them."""
HEAD_TIMEOUT_S = 10.0
UNREAD_TIMEOUT_S = 60.0
"""A client that takes nothing of its answer for so long is let go; its answer may be many MB."""
SWEEP_S = 1.0
"""All connections are looked at so often: a timer for each request would cost more than many an answer."""


class BoundedHttp(HttpToolsProtocol):
    """One connection of uvicorn's, closed when what comes makes no request.

    Bytes are counted from one piece that got the parser on to the next. So the measure holds for a request's first
    line, its headers, the headers behind a body in chunks, and whatever is written beside the size of a chunk.
    """

    _got_on = False
    _idle_bytes = 0
    _is_in_body = False
    _awaited_since: float | None = None
    """When the rest of this head was first seen to be awaited."""
    _unread_bytes = 0
    _unread_since = 0.0
    """When the client was last seen to take some of what is written."""
    _fault = ""

    def data_received(self, data: bytes) -> None:
        self._got_on = False
        super().data_received(data)
        if self._got_on:
            self._idle_bytes = 0
            if not self._is_in_body:
                self._awaited_since = None
            return
        self._idle_bytes += len(data)
        if self._idle_bytes > MOST_HEAD_BYTES:
            self._give_up(431, f"headers: more than {MOST_HEAD_BYTES // 1024} kB of them, the URL included")

    def on_headers_complete(self) -> None:
        self.refuse_upgrade()
        self._got_on = self._is_in_body = True
        super().on_headers_complete()

    def refuse_upgrade(self) -> None:
        """Have a request for another protocol answered with a 400, and its connection closed.

        Its body begins another protocol to the parser, whatever length the head gives: to go on behind it would be to
        take the body for the next request. A proxy in front would hand that one's answer to somebody else.

        Raises:
            ValueError: to the parser, which ends there.
        """
        if self.parser.should_upgrade():
            self._fault = "connection: only HTTP/1.1 is spoken here; send the request without 'Upgrade'"
            raise ValueError(self._fault)

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_answer(400, self._fault or msg))
        self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._got_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._got_on, self._is_in_body = True, False
        super().on_message_complete()

    def look_after(self, now: float) -> None:
        """Close a connection on which nobody is answered, and that does not rest between two requests, for too long.

        It waits for the rest of a head then, or for a body whose request has its answer already. Bodies of requests
        that are being answered are the application's to give up. A connection whose answer nobody reads is cut, one
        that is being closed too: it closes only once all is written.
        """
        if self._stays_unread(now):
            self.transport.abort()
        elif not self.is_answered() or self.timeout_keep_alive_task is not None:
            self._awaited_since = None
        elif self._awaited_since is None:
            self._awaited_since = now
        elif now - self._awaited_since > HEAD_TIMEOUT_S:
            self._give_up(408, f"headers: not complete within {HEAD_TIMEOUT_S:g} s")

    def is_answered(self) -> bool:
        """Whether no request of this connection waits for its answer."""
        return self.cycle is None or self.cycle.response_complete

    def _stays_unread(self, now: float) -> bool:
        before, self._unread_bytes = self._unread_bytes, self.transport.get_write_buffer_size()
        if not before or self._unread_bytes < before:
            self._unread_since = now
        return self._unread_bytes > 0 and now - self._unread_since > UNREAD_TIMEOUT_S

    def _give_up(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        # beside the answer to another request, or to nothing, it would be taken for what it is not
        if self.is_answered() and not self._is_in_body and self._idle_bytes:
            self.transport.write(_answer(status, message))
        self.transport.close()


def bound_heads(server: uvicorn.Server, serving: asyncio.Task[Any]) -> None:
    """Have `server` use `BoundedHttp`, and look after its connections until `serving`, its task, ends.

    To be called before that task begins. The server speaks no WebSocket then: nothing here counts or ends its
    connections.
    """
    config = server.config
    config.http, config.ws = BoundedHttp, "none"
    if config.loaded:
        config.http_protocol_class, config.ws_protocol_class = BoundedHttp, None
    sweeping = serving.get_loop().create_task(_keep_sweeping(server))
    serving.add_done_callback(lambda _: sweeping.cancel())


async def _keep_sweeping(server: uvicorn.Server) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        now = time.monotonic()
        for connection in tuple(server.server_state.connections):
            if isinstance(connection, BoundedHttp):
                connection.look_after(now)


def _answer(status: int, message: str) -> bytes:
    body = orjson.dumps({"error": message})
    lines = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    )
    return "\r\n".join((*lines, "", "")).encode() + body
