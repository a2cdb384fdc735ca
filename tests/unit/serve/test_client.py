from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest

from bigray.serve.client import BYTES_PER_REQUEST, ROWS_PER_REQUEST, predict_records, request_bodies


def rows_of(body: bytes) -> list[dict]:
    return json.loads(body)["records"]


def test_many_small_records_are_cut_by_rows():
    records = [{"x": row} for row in range(2 * ROWS_PER_REQUEST + 1)]
    bodies = [rows_of(body) for body in request_bodies(records)]
    assert [len(rows) for rows in bodies] == [ROWS_PER_REQUEST, ROWS_PER_REQUEST, 1]
    assert [row for rows in bodies for row in rows] == records


def test_large_records_are_cut_by_bytes():
    records = [{"x": str(row) * 100_000} for row in range(10)] * 10
    bodies = list(request_bodies(records))
    assert len(bodies) == 3
    assert max(map(len, bodies)) < BYTES_PER_REQUEST + 100
    assert [row for body in bodies for row in rows_of(body)] == records


def test_a_record_larger_than_a_request_goes_alone():
    huge = {"x": "a" * (BYTES_PER_REQUEST + 1)}
    assert [len(rows_of(body)) for body in request_bodies([{"x": ""}, huge, {"x": ""}])] == [1, 1, 1]


def test_no_records_are_no_request():
    assert list(request_bodies([])) == []


def test_arrays_are_sent_as_lists():
    (body,) = request_bodies([{"x": np.ones((1, 2), dtype=np.float32)}])
    assert rows_of(body) == [{"x": [[1.0, 1.0]]}]


@pytest.fixture
def echo() -> Iterator[tuple[str, list[int]]]:
    """A server whose predictions are the records, and the sizes of the bodies it got."""
    sizes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            sizes.append(len(body))
            answer = json.dumps({"predictions": rows_of(body)}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", sizes
    server.shutdown()
    thread.join()
    server.server_close()


def test_answers_of_all_requests_come_back_in_order(echo: tuple[str, list[int]]):
    url, sizes = echo
    records = [{"row": row, "x": "a" * 1_500_000} for row in range(5)]
    assert predict_records(url, records) == records
    assert len(sizes) == 3
