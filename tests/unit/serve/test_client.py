from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from bigray import Client
from bigray.data.features import Column, FeatureSchema
from bigray.errors import DeployError, SpecError
from bigray.serve import client as client_module
from bigray.serve.client import (
    BYTES_PER_REQUEST,
    MOST_RETRY_AFTER_S,
    PROXY_STARTS_S,
    RETRY_AFTER_S,
    ROWS_PER_REQUEST,
    fetch_json,
    predict_file,
    predict_table,
    read_records,
    request_bodies,
)


def rows_of(body: bytes) -> list[dict]:
    return json.loads(body)["records"]


# ----- requests cut out of many records


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


def test_dates_pictures_and_exact_numbers_are_sent_as_json_has_them():
    record = {
        "born": date(2024, 5, 31),
        "picture": b"\x89PNG",
        "price": Decimal("1.5"),
        "age": np.float32(3),
        "no": None,
    }
    (body,) = request_bodies([record])
    assert rows_of(body) == [{"born": "2024-05-31", "picture": "iVBORw==", "price": 1.5, "age": 3, "no": None}]


def test_arrays_are_sent_as_lists():
    (body,) = request_bodies([{"x": np.ones((1, 2), dtype=np.float32)}])
    assert rows_of(body) == [{"x": [[1.0, 1.0]]}]


# ----- a server that does as it is told


class Server:
    """Answers with the predictions it is asked for, after what `script` says; keeps what it got."""

    RESET, HANG_UP, GARBAGE = "reset", "hang up", "garbage"

    def __init__(self) -> None:
        self.script: list[object] = []
        """In place of the next answers: a status, a status with headers, or a way to fail."""
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.connections: set[object] = set()

    @property
    def sizes(self) -> list[int]:
        return [len(body) for *_, body in self.requests]

    def answer(self, headers: dict[str, str], body: bytes) -> bytes:
        if headers.get("accept") == "application/x-npy":
            rows = np.load(io.BytesIO(body))
            buffer = io.BytesIO()
            np.save(buffer, 2 * rows.reshape(len(rows), -1)[:, :1])
            return buffer.getvalue()
        if not body:
            return b'{"name": "animals"}'
        records = rows_of(body) if headers["content-type"] == "application/json" else [{"label": "cat"}]
        return json.dumps({"predictions": records}).encode()


@pytest.fixture
def server() -> Iterator[tuple[str, Server]]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            state.requests.append((self.command, self.path, headers, body))
            state.connections.add(self.connection)
            step = state.script.pop(0) if state.script else 200
            if step == Server.RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            elif step == Server.HANG_UP:
                self.close_connection = True
            elif step == Server.GARBAGE:
                self.wfile.write(b"not HTTP at all\r\n\r\n")
                self.close_connection = True
            else:
                status, more = step if isinstance(step, tuple) else (step, {})
                content = state.answer(headers, body) if status == 200 else b'{"error": "told so"}'
                self.send(status, more, content)

        def do_POST(self) -> None:
            self.do_GET()

        def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            sent = {"content-length": str(len(content)), "x-bigray-version": "a" * 12, "x-request-id": "id-1"}
            for name, value in (sent | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *_: None  # of connections that it was told to break
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client waited, or would have."""
    waited: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", waited.append)
    return waited


def test_answers_of_all_requests_come_back_in_order(server):
    url, state = server
    records = [{"row": row, "x": "a" * 1_500_000} for row in range(5)]
    with Client(url) as client:
        assert client.predict_many(records) == records
    assert len(state.sizes) == 3
    assert len(state.connections) == 1, "it is kept open"


def test_predict_is_one_request_however_many_records(server):
    url, state = server
    records = [{"x": row} for row in range(3 * ROWS_PER_REQUEST)]
    with Client(url) as client:
        assert client.predict(records) == records
        assert client.predict([]) == []  # that none is too few is for the endpoint to say
    assert len(state.requests) == 2
    assert [(method, path) for method, path, *_ in state.requests] == [("POST", "/predict")] * 2


def test_arrays_go_both_ways_in_binary(server):
    url, state = server
    with Client(url) as client:
        answer = client.predict_array([[1, 2], [3, 4]])
    assert answer.tolist() == [[2.0], [6.0]]
    assert answer.dtype == np.float32
    headers = state.requests[0][2]
    assert (headers["content-type"], headers["accept"]) == ("application/x-npy", "application/x-npy")


@pytest.mark.parametrize(
    ("content", "kind"), [(b"\x89PNG\r\n\x1a\n...", "image/png"), (b"\xff\xd8\xff...", "image/jpeg")]
)
def test_an_image_is_sent_as_what_it_is(server, tmp_path, content, kind):
    url, state = server
    file = tmp_path / "image"
    file.write_bytes(content)
    with Client(url) as client:
        for image in (content, file, str(file)):
            assert client.predict_image(image) == {"label": "cat"}
    for _, path, headers, body in state.requests:
        assert (path, headers["content-type"], body) == ("/predict", kind, content)


def test_a_key_is_sent_with_every_request_and_in_no_other_place(server):
    url, state = server
    with Client(url, key="bgr_secret") as client:
        client.predict([{"x": 1}])
        client.card()
        client.predict_array([[1.0]])
    with Client(url) as client:
        client.stats()
    assert [headers.get("authorization") for *_, headers, _ in state.requests] == ["Bearer bgr_secret"] * 3 + [None]
    assert [path for _, path, *_ in state.requests] == ["/predict", "/card", "/predict", "/stats"]


def test_a_sticky_text_is_sent_for_the_canary(server):
    url, state = server
    with Client(url) as client:
        client.predict([{"x": 1}], sticky="user 7")
        client.predict([{"x": 1}])
    assert [headers.get("x-bigray-key") for *_, headers, _ in state.requests] == ["user 7", None]


def test_an_answer_tells_its_version_and_id(server):
    url, _ = server
    with Client(url) as client:
        answer = client.send("GET", "/")
    assert (answer.version, answer.request_id) == ("a" * 12, "id-1")


def test_an_endpoint_below_a_prefix_is_asked_there(server):
    url, state = server
    with Client(f"{url}/models/") as client:
        client.card()
    assert fetch_json(f"{url}/models/card?x") == {"name": "animals"}
    assert [path for _, path, *_ in state.requests] == ["/models/card", "/models/card"]


# ----- asked once more


@pytest.mark.parametrize("failure", [Server.RESET, Server.HANG_UP, Server.GARBAGE])
def test_a_connection_that_breaks_is_made_anew_once(server, waits, failure):
    url, state = server
    with Client(url) as client:
        assert client.predict([{"x": 0}]) == [{"x": 0}]
        state.script = [failure]
        assert client.predict([{"x": 1}]) == [{"x": 1}]
    assert len(state.requests) == 3
    assert waits == [RETRY_AFTER_S]


@pytest.mark.parametrize("failure", [Server.RESET, Server.HANG_UP, Server.GARBAGE])
def test_one_that_breaks_again_is_no_answer(server, failure):
    url, state = server
    state.script = [failure] * 2
    with Client(url) as client, pytest.raises(DeployError, match=f"{url}: no answer: ") as told:
        client.predict([{"x": 1}])
    assert len(state.requests) == 2
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_fault_of_the_endpoint_is_asked_once_more(server, waits, status):
    url, state = server
    state.script = [status]
    with Client(url) as client:
        assert client.predict([{"x": 1}]) == [{"x": 1}]
    assert waits == [RETRY_AFTER_S]
    state.script = [status, status]
    with Client(url) as client, pytest.raises(DeployError, match=f"{url}/predict: answered {status}: told so"):
        client.predict([{"x": 1}])


@pytest.mark.parametrize(
    ("said", "waited"),
    [("2", 2.0), ("3600", MOST_RETRY_AFTER_S), ("soon", RETRY_AFTER_S), ("-1", RETRY_AFTER_S), ("0", 0.0)],
)
def test_the_endpoint_says_when_to_come_back(server, waits, said, waited):
    url, state = server
    state.script = [(503, {"retry-after": said})]
    with Client(url) as client:
        client.predict([{"x": 1}])
    assert waits == [waited]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429])
def test_a_fault_of_the_caller_is_told_at_once(server, waits, status):
    url, state = server
    state.script = [(status, {"retry-after": "1"})]
    with Client(url) as client, pytest.raises(DeployError, match=f"{url}/predict: answered {status}: told so"):
        client.predict([{"x": 1}])
    assert (len(state.requests), waits) == (1, [])


def test_a_proxy_that_has_just_started_is_asked_once_more(server, waits):
    url, state = server
    state.script = [(404, {"content-type": "text/plain"})]
    with Client(url) as client:
        assert client.predict([{"x": 1}]) == [{"x": 1}]
    assert waits == [PROXY_STARTS_S]


@pytest.mark.parametrize(("retries", "asked"), [(0, 1), (3, 4)])
def test_how_often_it_asks_can_be_said(server, retries, asked):
    url, state = server
    state.script = [503] * 10
    with Client(url, retries=retries) as client, pytest.raises(DeployError, match="answered 503"):
        client.predict([{"x": 1}])
    assert len(state.requests) == asked


def test_where_nothing_listens_there_is_no_answer():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with Client(url) as client, pytest.raises(DeployError, match=f"{url}: no answer: .*refused"):
            client.card()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "https:///x", "http://host:port", ""])
def test_what_is_no_address_is_a_fault_of_the_user(url):
    with pytest.raises(SpecError) as caught:
        Client(url)
    assert len(caught.value.faults) == 1


def test_an_answer_that_is_no_json_is_told_with_its_beginning(server, monkeypatch):
    url, state = server
    monkeypatch.setattr(state, "answer", lambda headers, body: b"<html>" + b"x" * 1000)
    with Client(url) as client, pytest.raises(DeployError, match="answered 200 with something else than JSON") as told:
        client.card()
    assert len(str(told.value)) < 250


# ----- tables and files


@pytest.mark.parametrize(
    ("answers", "labels", "values"),
    [
        ([{"value": 1.5}, {"value": 2.5}], None, [1.5, 2.5]),
        ([{"label": "a", "probabilities": [1, 0]}, {"label": "b", "probabilities": [0, 1]}], ["a", "b"], None),
    ],
)
def test_a_table_comes_back_as_offline(server, monkeypatch, answers, labels, values):
    url, state = server
    monkeypatch.setattr(state, "answer", lambda headers, body: json.dumps({"predictions": answers}).encode())
    schema = FeatureSchema(columns=(Column(name="x"),))
    found = predict_table(url, pa.table({"y": ["no", "no"], "x": [1.0, 2.0]}), schema, key="bgr_secret")
    assert found.labels == labels
    assert (None if found.values is None else found.values.tolist()) == values
    assert rows_of(state.requests[0][3]) == [{"x": 1.0}, {"x": 2.0}]
    assert state.requests[0][2]["authorization"] == "Bearer bgr_secret"


TABLE = pa.table({"x": [1.0, 2.0], "y": ["a", "b"]})
RECORDS = TABLE.to_pylist()


def write_arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)


WRITERS = {
    "rows.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "whole.JSON": lambda path: path.write_text(json.dumps({"records": RECORDS})),
    "rows.csv": lambda path: pyarrow.csv.write_csv(TABLE, path),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(TABLE, path),
    "rows.arrow": write_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_read_by_its_suffix(tmp_path, server, name):
    url, _ = server
    WRITERS[name](tmp_path / name)
    assert read_records(tmp_path / name) == RECORDS
    assert predict_file(url, tmp_path / name, limit=1) == RECORDS[:1]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("rows.txt", b"", "cannot tell what it holds; known: .json, .parquet, .csv, .arrow"),
        ("rows.json", None, "no such file"),
        ("rows.json", b"{", "cannot be read"),
        ("rows.json", b"5", "expected a list of objects"),
        ("rows.parquet", b"no", "cannot be read"),
        ("rows.arrow", b"no", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, fault):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=fault) as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value)


# ----- why, and text


def events(*documents: dict) -> bytes:
    return b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in documents)


PIECES = ({"text": "to"}, {"text": " be\n\n"}, {"text": "é"})
DONE = {"done": True, "tokens": 3}


def test_rows_are_explained_in_one_request_in_order(server, monkeypatch):
    url, state = server
    monkeypatch.setattr(state, "answer", lambda headers, body: json.dumps({"explanations": rows_of(body)}).encode())
    with Client(url) as client:
        assert client.explain([{"x": 1}, {"x": date(2024, 5, 31)}], sticky="user 7") == [{"x": 1}, {"x": "2024-05-31"}]
    (method, path, headers, _) = state.requests[0]
    assert (method, path, headers["x-bigray-key"]) == ("POST", "/explain", "user 7")


def test_what_cannot_be_explained_there_is_told_at_once(server, waits):
    url, state = server
    state.script = [501]
    with Client(url) as client, pytest.raises(DeployError, match=f"{url}/explain: answered 501: told so"):
        client.explain([{"x": 1}])
    assert (len(state.requests), waits) == (1, [])


def test_text_comes_piece_by_piece_and_the_connection_goes_on(server, monkeypatch):
    url, state = server
    with Client(url, key="bgr_secret") as client:
        with monkeypatch.context() as patch:
            patch.setattr(state, "answer", lambda headers, body: b": comment\n\n" + events(*PIECES, DONE))
            pieces = client.generate("or not", max_tokens=3, temperature=0.0, stop="!")
            assert not state.requests, "it is asked for when the first piece is"
            assert list(pieces) == ["to", " be\n\n", "é"]
        assert client.predict([{"x": 1}]) == [{"x": 1}]
    (_, path, headers, body), _ = state.requests
    assert (path, headers["authorization"]) == ("/generate", "Bearer bgr_secret")
    assert json.loads(body) == {"prompt": "or not", "max_tokens": 3, "temperature": 0.0, "stop": "!"}
    assert len(state.connections) == 1


def test_a_text_that_is_left_closes_its_connection(server, monkeypatch):
    url, state = server
    with Client(url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(state, "answer", lambda headers, body: events(*PIECES, DONE))
            pieces = client.generate("or not")
            assert next(pieces) == "to"
            pieces.close()
        assert client.predict([{"x": 1}]) == [{"x": 1}]
    assert len(state.connections) == 2


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (events(*PIECES, {"error": "internal error"}), "internal error"),
        (events(*PIECES), "the connection ended in it"),
        (events(*PIECES) + b"data: {", "an event is not JSON"),
        (events(*PIECES) + b"data: []", "an event is no object"),
    ],
)
def test_once_a_piece_was_handed_out_nothing_is_asked_again(server, monkeypatch, sent, told):
    url, state = server
    monkeypatch.setattr(state, "answer", lambda headers, body: sent)
    found = []
    with Client(url) as client, pytest.raises(DeployError, match=f"{url}/generate: the text broke off: {told}"):
        found.extend(iter(client.generate("a")))
    assert len(state.requests) == 1


@pytest.mark.parametrize("failure", [Server.RESET, Server.HANG_UP, 503, "nothing"])
def test_before_the_first_piece_it_is_asked_once_more(server, monkeypatch, failure):
    url, state = server
    bodies = [b""] if failure == "nothing" else []
    state.script = [] if failure == "nothing" else [failure]
    monkeypatch.setattr(state, "answer", lambda headers, body: bodies.pop() if bodies else events(*PIECES, DONE))
    with Client(url) as client:
        assert "".join(client.generate("a")) == "to be\n\né"
    assert len(state.requests) == 2
