from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from bigray.cluster.doctor.ports import AGENT, DASHBOARD, Door, ask, door, knock, listening, listening_here

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2049 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0
   1: 00000000:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0
   2: 0100007F:9C40 0100007F:2049 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0
  sl  local_address                         remote_address                        st tx_queue
   0: 00000000000000000000000001000000:2049 00000000000000000000000000000000:0000 0A 00000000:00000000 00
   1: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00
   2: 0000000000000000FFFF00000100007F:1F91 00000000000000000000000000000000:0000 0A 00000000:00000000 00
"""


def test_who_listens_is_read_from_the_kernels_tables() -> None:
    assert listening(TABLE) == {
        8265: {"127.0.0.1", "::1"},
        6379: {"0.0.0.0"},
        8080: {"::"},
        8081: {"127.0.0.1"},
    }


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:8265", "127.0.0.1", 8265),
        ("http://10.0.0.1:8265/", "10.0.0.1", 8265),
        ("[::1]:8265", "::1", 8265),
    ],
)
def test_an_address_is_a_door(address: str, host: str, port: int) -> None:
    assert door("dashboard", address, DASHBOARD) == Door("dashboard", host, port, DASHBOARD)


@pytest.mark.parametrize("address", ["", "None", "10.0.0.1", "10.0.0.1:"])
def test_no_address_is_no_door(address: str) -> None:
    assert door("dashboard", address, DASHBOARD) is None


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(401)

    def do_POST(self) -> None:
        assert self.headers.get("Authorization") is None
        assert self.rfile.read(int(self.headers["Content-Length"])) == b"{}"
        self._answer(400)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_door_tells_what_it_answers_without_a_token(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (found,) = knock([Door("dashboard", "127.0.0.1", server.server_port, DASHBOARD)], "10.0.0.1")

    assert found.answers == {"GET /api/jobs/": 401, "POST /api/jobs/": 400, "GET /api/serve/applications/": 401}
    assert (found.is_public, found.node) == (False, "10.0.0.1")
    assert listening_here()[server.server_port] == {"127.0.0.1"}


def test_where_nothing_listens_there_is_no_answer() -> None:
    assert ask("127.0.0.1", 1, AGENT[0]) is None
