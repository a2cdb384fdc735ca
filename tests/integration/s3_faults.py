"""A real S3 server (moto's) on loopback, and in front of it a proxy that fails as object stores do.

with moto_server() as upstream, FaultyProxy(upstream) as proxy:
    proxy.faults.busy_share = 0.2
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

START_TIMEOUT_S = 60.0
BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
_AS_S3_HAS_IT = (
    (b"<CompleteMultipartUploadResponse ", b"<CompleteMultipartUploadResult "),
    (b"</CompleteMultipartUploadResponse>", b"</CompleteMultipartUploadResult>"),
)
"""moto (5.2.1) names the root of this one answer in its own way, which Arrow takes for an error."""
_PER_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "server", "date"}


@dataclass
class Faults:
    """What goes wrong from now on; may be changed while requests are under way."""

    busy_share: float = 0.0
    """Of the requests that get a 503 and do nothing."""
    lost_share: float = 0.0
    """Of the requests that are carried out, though the connection closes before the answer."""
    cut_share: float = 0.0
    """Of the answers with a body, of which half arrives before the connection closes."""
    stalled_until: float = 0.0
    """On the monotonic clock: until then no byte is answered."""
    bytes_per_s: float = 0.0
    """Of bodies both ways; 0: as fast as they come."""
    draws: random.Random = field(default_factory=lambda: random.Random(7))

    def stall(self, seconds: float) -> None:
        self.stalled_until = time.monotonic() + seconds

    def strikes(self, share: float) -> bool:
        return share > 0 and self.draws.random() < share


class FaultyProxy:
    """Listens on a port of its own and passes requests on, one connection to the server for each."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.faults = Faults()
        self.num_requests = 0
        self.num_struck = 0
        self._handler = type("Handler", (_Handler,), {"proxy": self, "upstream": upstream})
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self._timers: list[threading.Timer] = []
        self.connections: set[socket.socket] = set()

    @property
    def options(self) -> str:
        """The end of a URI that leads here."""
        return f"?endpoint_override=127.0.0.1:{self._port}&scheme=http&region=us-east-1"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FaultyProxy:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
        self.down()

    def up(self) -> None:
        if self._server is None:
            self._server = _Server(("127.0.0.1", self._port), self._handler)
            self._port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Connections are refused, and those that are open end."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def outage(self, seconds: float) -> None:
        self.down()
        self._timers.append(threading.Timer(seconds, self.up))
        self._timers[-1].start()

    def heal(self) -> None:
        self.faults = Faults()
        self.up()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    upstream: tuple[str, int]
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.proxy.connections.add(self.connection)

    def finish(self) -> None:
        self.proxy.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        faults = self.proxy.faults
        self.proxy.num_requests += 1
        self._wait()
        body = self._read()
        if faults.strikes(faults.busy_share):
            self._answer(503, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else BUSY)
            self.proxy.num_struck += 1
            return
        status, headers, answer = self._ask(body)
        self._wait()
        if faults.strikes(faults.lost_share):
            self.proxy.num_struck += 1
            self._hang_up()
            return
        self._answer(status, headers, answer, is_cut=len(answer) > 1 and faults.strikes(faults.cut_share))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815  # the names http.server looks for

    def _wait(self) -> None:
        while time.monotonic() < self.proxy.faults.stalled_until:
            time.sleep(0.05)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        left = int(self.headers.get("Content-Length") or 0)
        pieces = []
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                break
            self._dawdle(len(piece))
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.upstream, timeout=120)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.putheader("Connection", "close")
            connection.endheaders(body)
            response = connection.getresponse()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in _PER_HOP}
            if self.command == "HEAD":
                headers["Content-Length"] = response.getheader("Content-Length") or "0"
            return response.status, headers, response.read().replace(*_AS_S3_HAS_IT[0]).replace(*_AS_S3_HAS_IT[1])
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, is_cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" or "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if is_cut:
            self.proxy.num_struck += 1
            self.wfile.write(body[: len(body) // 2])
            self._hang_up()
            return
        for start in range(0, len(body), 1 << 16):
            piece = body[start : start + (1 << 16)]
            self._dawdle(len(piece))
            self.wfile.write(piece)

    def _dawdle(self, num_bytes: int) -> None:
        if self.proxy.faults.bytes_per_s:
            time.sleep(num_bytes / self.proxy.faults.bytes_per_s)

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def moto_server(bucket: str = "bucket") -> Iterator[tuple[str, int]]:
    """Host and port of a running server that has one bucket. Skips the test where there is no moto for any Python."""
    python = _python_with_moto()
    if python is None:
        pytest.skip("moto is not installed: pip install 'moto[server,s3]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, env=_clean(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(port, bucket, process)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(10)


def _python_with_moto() -> str | None:
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    candidates = [sys.executable, *(shutil.which("python3", path=folder) for folder in folders)]
    for python in dict.fromkeys(filter(None, candidates)):
        look = [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('moto') is None)"]
        if subprocess.run(look, env=_clean(), capture_output=True, check=False).returncode == 0:
            return python
    return None


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PYTHONPATH"))}


def _make_bucket(port: int, bucket: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("PUT", f"/{bucket}")
            assert connection.getresponse().status == 200
            return
        except OSError:
            assert process.poll() is None, "moto's server has ended"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.1)
        finally:
            connection.close()
