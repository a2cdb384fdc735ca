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
        self._got_on = self._is_in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._got_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._got_on, self._is_in_body = True, False
        super().on_message_complete()

    def look_after(self, now: float) -> None:
        """Close a connection on which nobody is answered, and that does not rest between two requests, for too long.

        It waits for the rest of a head then, or for a body whose request has its answer already. Bodies of requests
        that are being answered are the application's to give up.
        """
        if not self.is_answered() or self.timeout_keep_alive_task is not None:
            self._awaited_since = None
        elif self._awaited_since is None:
            self._awaited_since = now
        elif now - self._awaited_since > HEAD_TIMEOUT_S:
            self._give_up(408, f"headers: not complete within {HEAD_TIMEOUT_S:g} s")

    def is_answered(self) -> bool:
        """Whether no request of this connection waits for its answer."""
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        # beside the answer to another request, or to nothing, it would be taken for what it is not
        if self.is_answered() and not self._is_in_body and self._idle_bytes:
            self.transport.write(_answer(status, message))
        self.transport.close()


def bound_heads(server: uvicorn.Server, serving: asyncio.Task[Any]) -> None:
    """Have `server` use `BoundedHttp`, and look after its connections until `serving`, its task, ends.

    To be called before that task begins.
    """
    server.config.http = BoundedHttp
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
