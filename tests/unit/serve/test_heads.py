"""A real server of uvicorn's, and clients that never come to the end of a request's head."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import uvicorn

from bigray.serve import heads
from bigray.serve.heads import MOST_HEAD_BYTES, bound_heads

HOST = "127.0.0.1"
CHUNKED = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


async def app(scope, receive, send) -> None:
    """Answers with the size of the body; at /early before it has read one, at /slow after a while."""
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def running() -> Iterator[int]:
    server = uvicorn.Server(
        uvicorn.Config(app, host=HOST, port=0, lifespan="off", access_log=False, log_config=None, timeout_keep_alive=20)
    )

    async def serve() -> None:
        serving = asyncio.create_task(server.serve())
        bound_heads(server, serving)
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running() as port:
        yield port


@pytest.fixture
def hasty_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server that waits for a head for a twentieth of a second."""
    monkeypatch.setattr(heads, "HEAD_TIMEOUT_S", 0.05)
    monkeypatch.setattr(heads, "SWEEP_S", 0.01)
    with running() as port:
        yield port


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection((HOST, port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes, which it has to."""
    received = b""
    while part := connection.recv(65_536):
        received += part
    return received


def read_answer(connection: socket.socket) -> bytes:
    """The body of one answer of a digit or more."""
    received = b""
    while b"\r\n\r\n" not in received or received.endswith(b"\r\n\r\n"):
        part = connection.recv(65_536)
        assert part, "closed"
        received += part
    assert received.startswith(b"HTTP/1.1 200")
    return received.partition(b"\r\n\r\n")[2]


def send_too_much(connection: socket.socket, start: bytes, piece: bytes) -> None:
    """A little more than a head may have, the last of it by itself: of what is not read, a client hears nothing."""
    connection.sendall(start + piece * ((MOST_HEAD_BYTES - len(start)) // len(piece)))
    time.sleep(0.03)
    connection.sendall(piece * 3)


def ask(connection: socket.socket, path: bytes = b"/", body: bytes = b"") -> bytes:
    connection.sendall(b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (path, len(body)) + body)
    return read_answer(connection)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", b"x"),
        (b"GET /?", b"x"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx-long: ", b"x"),
        (b"GET / HTTP/1.1\r\nhost: a\r\n", b"x"),
        (b"GET / HTTP/1.1\r\nhost: a\r\n", b"x: y\r\n"),
        (b"", b"\r\n"),
    ],
    ids=["path", "query", "value", "name", "many headers", "empty lines"],
)
def test_a_head_without_end_is_refused_and_its_connection_closed(port, start, piece):
    with connected(port) as connection:
        send_too_much(connection, start, piece)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"connection: close" in head
    assert "64 kB" in json.loads(body)["error"]
    with connected(port) as connection:
        assert ask(connection) == b"0"


@pytest.mark.parametrize("start", [b"1;", b"1\r\nx\r\n0\r\nx-long: "], ids=["beside a chunk's size", "behind the body"])
def test_what_never_ends_in_a_body_in_chunks_closes_the_connection_without_a_word(port, start):
    with connected(port) as connection:
        connection.sendall(CHUNKED + start)
        time.sleep(0.02)
        send_too_much(connection, b"", b"x")
        assert read_all(connection) == b""


def test_bodies_of_any_size_and_requests_in_a_row_are_no_heads(port):
    with connected(port) as connection:
        for size in (0, 100, 10 * MOST_HEAD_BYTES, 5):
            assert ask(connection, body=b"x" * size) == str(size).encode()
        connection.sendall(CHUNKED + b"1\r\nx\r\n" * MOST_HEAD_BYTES + b"0\r\n\r\n")
        assert read_answer(connection) == str(MOST_HEAD_BYTES).encode()
        long = b"GET / HTTP/1.1\r\nhost: a\r\nx-long: " + b"x" * (MOST_HEAD_BYTES // 2)
        connection.sendall(long)
        time.sleep(0.02)
        connection.sendall(b"\r\n\r\n")
        assert read_answer(connection) == b"0"


@pytest.mark.parametrize(
    ("start", "drop", "status"),
    [(b"GET /x", b"x", b"408"), (b"GET / HTTP/1.1\r\nx: ", b"x", b"408"), (b"\r\n", b"\r\n", b"408"), (b"", b"", b"")],
    ids=["first line", "header", "empty lines", "nothing"],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_head_that_does_not_come_is_given_up(hasty_port, start, drop, status, is_first):
    if not is_first and not start:
        return  # a connection that rests
    with connected(hasty_port) as connection:
        if not is_first:
            assert ask(connection) == b"0"
        connection.sendall(start)
        connection.settimeout(0.01)
        received = b""
        for _ in range(1000):
            try:
                part = connection.recv(65_536)
            except TimeoutError:
                with suppress(ConnectionError):
                    connection.sendall(drop)
                continue
            except ConnectionError:
                break
            received += part
            if not part:
                break
        else:
            pytest.fail("never closed")
    assert received.startswith(b"HTTP/1.1 " + status if status else b"")
    assert bool(received) == bool(status)


def test_a_body_that_nobody_waits_for_any_more_is_given_up(hasty_port):
    with connected(hasty_port) as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nx")
        assert read_answer(connection) == b"0"
        connection.sendall(b"x")
        assert read_all(connection) == b""


def test_neither_a_slow_answer_nor_a_slow_body_nor_a_rest_between_requests_is_a_head(hasty_port):
    with connected(hasty_port) as connection:
        assert ask(connection, b"/slow") == b"0"
        time.sleep(0.2)
        connection.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nx")
        time.sleep(0.2)
        connection.sendall(b"x")
        assert read_answer(connection) == b"2"


@pytest.mark.parametrize("protocol", [b"x", b"h2c", b"websocket"])
@pytest.mark.parametrize("is_at_once", [True, False])
def test_the_body_of_a_request_for_another_protocol_is_never_taken_for_a_request(port, protocol, is_at_once):
    smuggled = b"GET /early HTTP/1.1\r\nhost: a\r\n\r\n"
    head = (
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: %b\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\ncontent-length: %d\r\n\r\n" % (protocol, len(smuggled))
    )
    with connected(port) as connection:
        connection.sendall(head + smuggled if is_at_once else head)
        received = read_all(connection)
        with suppress(ConnectionError):
            connection.sendall(smuggled)
            received += read_all(connection)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in received
    assert received.count(b"HTTP/1.1 4") == received.count(b"\r\n\r\n") == 1
    assert "Upgrade" in json.loads(received.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize("is_loaded", [True, False])
def test_the_server_speaks_no_websocket_whatever_its_configuration_said(is_loaded):
    async def story() -> uvicorn.Config:
        config = uvicorn.Config(app, ws="websockets-sansio", log_config=None)
        if is_loaded:
            config.load()
        serving = asyncio.create_task(asyncio.sleep(0))
        bound_heads(uvicorn.Server(config), serving)
        await serving
        if not is_loaded:
            config.load()
        return config

    config = asyncio.run(story())
    assert (config.http_protocol_class, config.ws_protocol_class) == (heads.BoundedHttp, None)
