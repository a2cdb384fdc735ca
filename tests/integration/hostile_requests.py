"""Hostile requests as data: the bytes of each, and what is a fine answer to it.

For an endpoint whose model takes one tensor column `image` of shape (4, 5). Whatever comes, the process that answers
must answer the next good request; `GOOD_BODY` is one. Sent over a raw socket, since no HTTP library would send them.
"""

from __future__ import annotations

import gzip
import http.client
import io
import json
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import numpy as np
import pyarrow as pa

SHAPE = (4, 5)
IMAGE = np.ones(SHAPE).tolist()
FLAT = np.ones(SHAPE).reshape(-1).tolist()
GOOD_BODY = json.dumps({"records": [{"image": IMAGE}]}).encode()

ANY_4XX = frozenset(range(400, 500))
FINE = frozenset({200})
TELLTALES = (b"Traceback", b'File "', b"site-packages", b"bigray/", b"bigray.", b"/home/", b"root:x:")
"""What no answer may hold: it would tell about the code, or about the machine."""


@dataclass(frozen=True)
class Send:
    data: bytes
    times: int = 1
    pause_s: float = 0.0
    """After each time; an answer that comes early ends it all."""


@dataclass(frozen=True)
class HalfClose:
    """Say that no more comes, and go on reading."""


@dataclass(frozen=True)
class Leave:
    """Close the connection without reading an answer; by a reset, as a process that dies does."""

    by_reset: bool = False


Step = Send | HalfClose | Leave


@dataclass(frozen=True)
class HostileAnswer:
    """What came back."""

    status: int | None
    """None where no answer came."""
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    """Names in lower case."""
    ending: Literal["answered", "closed", "waiting", "left", "not HTTP"] = "answered"
    """How it ended; `waiting`: the endpoint had said nothing when our patience ended."""


@dataclass(frozen=True)
class HostileCase:
    """One hostile connection."""

    name: str
    steps: tuple[Step, ...]
    statuses: frozenset[int] = ANY_4XX
    may_close: bool = False
    """No answer but a closed connection is fine too."""
    may_wait: bool = False
    """No answer at all is fine while the request is not complete: we leave before the endpoint's patience ends."""
    may_differ: bool = False
    """An answer in another protocol than HTTP/1 is fine too."""
    is_json: bool = True
    """A refusal is the application's own: `{"error": "one line"}`. False where the HTTP server may answer by itself."""
    method: str = "POST"
    patience_s: float = 20.0
    times: int = 1
    """Connections to make, one after another."""
    forbidden: tuple[bytes, ...] = ()
    """What the answer must not hold besides `TELLTALES`."""

    def fault(self, answer: HostileAnswer) -> str:
        """What is wrong with this answer; empty where it is fine."""
        if answer.ending == "closed":
            return "" if self.may_close else "closed without an answer"
        if answer.ending == "waiting":
            return "" if self.may_wait else f"no answer within {self.patience_s:g} s"
        if answer.ending == "left" or (answer.ending == "not HTTP" and self.may_differ):
            return ""
        if answer.status not in self.statuses:
            told = answer.ending if answer.status is None else f"answered {answer.status}"
            return f"{told} {answer.body[:200]!r}"
        return self._content_fault(answer)

    def _content_fault(self, answer: HostileAnswer) -> str:
        text = answer.body + repr(answer.headers).encode()
        if told := [word for word in (*TELLTALES, *self.forbidden) if word in text]:
            return f"the answer holds {told[0]!r}: {text[:300]!r}"
        if self.is_json and answer.status != 200 and not _is_error_document(answer.body):
            return f"not an error in JSON: {answer.body[:200]!r}"
        return ""


@dataclass(frozen=True)
class Target:
    """The endpoint that the requests are made for."""

    prefix: str = ""
    """The application's route prefix, without a slash at the end."""
    model: str = "animals"
    secret: str = ""
    """A key of the endpoint, sent with each request; empty for an open one."""
    max_body_bytes: int = 8 * 2**20
    num_chunks: int = 20_000
    """Of six bytes each; half a million crashed a server of another make."""
    drip_pause_s: float = 1.0
    drips: int = 5
    canary_url: str = "http://127.0.0.1:9/canary"
    """Where a server that loads URLs would be seen."""


# ----- building requests


def request(target: Target, method: str, path: str, *headers: bytes, body: bytes | None = None) -> bytes:
    """A request below the target's prefix; a body brings its length with it."""
    length = () if body is None else (b"content-length: %d" % len(body),)
    key = (f"x-api-key: {target.secret}".encode(),) if target.secret else ()
    line = f"{method} {target.prefix}{path} HTTP/1.1".encode()
    return b"\r\n".join((line, b"host: localhost", *key, *headers, *length, b"", body or b""))


def predict(target: Target, body: bytes, *headers: bytes) -> tuple[Step, ...]:
    return (Send(request(target, "POST", "/predict", *(headers or (b"content-type: application/json",)), body=body)),)


def infer(target: Target, document: object, *headers: bytes) -> tuple[Step, ...]:
    path = f"/v2/models/{target.model}/infer"
    return (Send(request(target, "POST", path, *headers, body=json.dumps(document).encode())),)


def good_requests(target: Target) -> tuple[HostileCase, ...]:
    """To see that the tool works, and to send after each hostile one."""
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, *SHAPE], "data": FLAT}
    return (
        HostileCase("good /predict", predict(target, GOOD_BODY), FINE),
        HostileCase("good infer", infer(target, {"inputs": [tensor]}), FINE),
    )


def hostile_cases(target: Target) -> tuple[HostileCase, ...]:
    """All that need no keys at the endpoint."""
    return (
        *json_cases(target),
        *shape_cases(target),
        *binary_cases(target),
        *size_cases(target),
        *framing_cases(target),
        *slow_cases(target),
        *header_cases(target),
        *path_cases(target),
        *identifier_cases(target),
        *method_cases(target),
        *leaving_cases(target),
        *url_cases(target),
    )


def by_name(cases: Iterable[HostileCase]) -> dict[str, HostileCase]:
    """For tests that are named after cases which can be built only once an endpoint is there."""
    named = {}
    for case in cases:
        assert case.name not in named, f"two cases are called {case.name}"
        named[case.name] = case
    return named


def damaged_cases(target: Target, count: int, seed: int = 0) -> Iterator[HostileCase]:
    """Good bodies of every kind with a few bytes changed, cut out or added; answering them as they are is fine too."""
    generator = np.random.default_rng(seed)
    for kind, body in good_bodies().items():
        for number in range(count):
            steps = predict(target, _damaged(body, generator), b"content-type: " + kind.encode())
            yield HostileCase(f"damaged: {kind} {number}", steps, ANY_4XX | FINE)


def good_bodies() -> dict[str, bytes]:
    """One for each content type that takes the model's tensor."""
    return {
        "application/json": GOOD_BODY,
        "application/x-npy": _npy(np.ones((2, *SHAPE), np.float32)),
        "application/vnd.apache.arrow.stream": _arrow_stream(),
    }


def json_cases(target: Target) -> Iterator[HostileCase]:
    """Row 35: what is not JSON, or no more than JSON."""
    record = b'{"records": [{"image": %s}]}'
    rows = json.dumps([[1.0] * 5] * 3).encode()[1:-1]
    bodies = {
        "not JSON": b"not json",
        "empty": b"",
        "no object": b"[1, 2]",
        "null": b"null",
        "cut off": GOOD_BODY[:-3],
        "two documents": GOOD_BODY * 2,
        "comments": b"/* */" + GOOD_BODY,
        "UTF-16": GOOD_BODY.decode().encode("utf-16"),
        "not UTF-8": b'{"records": [{"image": "\xff\xfe"}]}',
        "lone surrogate": rb'{"records": [{"\ud800": 1}]}',
        "NUL in a name": rb'{"records": [{"image\u0000": 1}]}',
        "100,000 lists in each other": b"[" * 100_000 + b"]" * 100_000,
        "100,000 lists that never close": b"[" * 100_000,
        "100,000 objects in each other": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a record of 100,000 lists": record % (b"[" * 100_000 + b"]" * 100_000),
        "a record of 900 lists": record % (b"[" * 900 + b"]" * 900),
        "NaN": record % (b"[[NaN,0,0,0,0]," + rows + b"]"),
        "Infinity": record % (b"[[Infinity,0,0,0,0]," + rows + b"]"),
        "-Infinity": record % (b"[[-Infinity,0,0,0,0]," + rows + b"]"),
        "null for a number": record % (b"[[null,0,0,0,0]," + rows + b"]"),
        "1e999": record % (b"[[1e999,0,0,0,0]," + rows + b"]"),
        "an integer of 31 digits": record % (b"[[1" + b"0" * 30 + b",0,0,0,0]," + rows + b"]"),
        "an integer of 100,000 digits": record % (b"[[" + b"9" * 100_000 + b",0,0,0,0]," + rows + b"]"),
        "100,000 columns": json.dumps({"records": [{f"c{number}": 1 for number in range(100_000)}]}).encode(),
    }
    for name, body in bodies.items():
        # a number that a double holds but a float32 does not may be refused or may count as it is
        statuses = ANY_4XX | FINE if name == "an integer of 31 digits" else ANY_4XX
        yield HostileCase(f"JSON: {name}", predict(target, body), statuses)
    for name, value in {"NaN": float("nan"), "Infinity": float("inf"), "huge": 10**400}.items():
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, *SHAPE], "data": [value, *FLAT[1:]]}
        yield HostileCase(f"JSON: {name} in a tensor", infer(target, {"inputs": [tensor]}))
    # JSON itself leaves it open which of two equal names counts; that one does, whichever, is all that matters
    twice = b'{"records": [], ' + GOOD_BODY[1:]
    yield HostileCase("JSON: one name twice", predict(target, twice), ANY_4XX | FINE)


def shape_cases(target: Target) -> Iterator[HostileCase]:
    """Row 36: JSON that does not fit the model."""
    records: dict[str, object] = {
        "no rows": [],
        "an object": {"image": IMAGE},
        "a row that is a number": [1],
        "a column that is unknown": [{"picture": IMAGE}],
        "a flat image": [{"image": FLAT}],
        "an image too small": [{"image": [[1]]}],
        "an image of another rank": [{"image": [IMAGE]}],
        "a ragged image": [{"image": [[1, 2], [3]]}],
        "text": [{"image": "x"}],
        "numbers as text": [{"image": [["1"] * 5] * 4}],
        "booleans": [{"image": [[True] * 5] * 4}],
        "an object for a number": [{"image": [[{}] * 5] * 4}],
        "a bad row behind good ones": [{"image": IMAGE}] * 50 + [{"image": [[1]]}],
        "100,000 rows of nothing": [{}] * 100_000,
    }
    for name, value in records.items():
        yield HostileCase(f"records: {name}", predict(target, json.dumps({"records": value}).encode()))
    shapes: dict[str, object] = {
        "10 million rows claimed": [10_000_000, *SHAPE],
        "2^63 rows claimed": [2**63, *SHAPE],
        "rows that overflow": [2**62, 4, 5],
        "no rows": [0, *SHAPE],
        "negative rows": [-1, *SHAPE],
        "half a row": [0.5, *SHAPE],
        "true rows": [True, *SHAPE],
        "another shape": [1, 5, 4],
        "no shape": None,
        "100,000 axes": [1] * 100_000,
    }
    for name, shape in shapes.items():
        tensor = {"name": "image", "datatype": "FP32", "shape": shape, "data": FLAT}
        yield HostileCase(f"tensor: {name}", infer(target, {"inputs": [tensor]}))
    tensors = {
        "unknown datatype": {"datatype": "COMPLEX64"},
        "datatype of text": {"datatype": "BYTES", "data": ["x"] * 20},
        "datatype that is a list": {"datatype": ["FP32"]},
        "fractions as integers": {"datatype": "INT32", "data": [0.5] * 20},
        "no data": {"data": None},
        "data that is text": {"data": "x"},
        "another name": {"name": "../../image"},
    }
    for name, change in tensors.items():
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, *SHAPE], "data": FLAT} | change
        yield HostileCase(f"tensor: {name}", infer(target, {"inputs": [tensor]}))
    yield HostileCase("tensor: 10,000 of them", infer(target, {"inputs": [{"name": "image"}] * 10_000}))
    yield HostileCase("tensor: none", infer(target, {"inputs": []}))


def binary_cases(target: Target) -> Iterator[HostileCase]:
    """Row 36 again, for bodies that are not JSON."""
    claimed = {"name": "image", "datatype": "FP32", "shape": [10_000_000, *SHAPE]}
    for name, size in {"10^12 bytes": 10**12, "-1 bytes": -1, "text": "80", "none": None}.items():
        header = {"inputs": [claimed | {"parameters": {"binary_data_size": size}}]}
        length = b"inference-header-content-length: %d" % len(json.dumps(header))
        yield HostileCase(f"binary tensor: {name} claimed", infer(target, header, length))
    for length in (b"-1", b"999999999999", b"x", b"0"):
        header = b"inference-header-content-length: " + length
        yield HostileCase(f"binary tensor: header of {length.decode()} bytes", infer(target, {"inputs": []}, header))
    bodies = {
        "application/x-npy": {
            "junk": b"\x93NUMPY" + b"\xff" * 100,
            "cut off": _npy(np.ones((1, *SHAPE), np.float32))[:-8],
            "10 million rows claimed": _npy_header((10_000_000, *SHAPE), "<f4") + bytes(80),
            "objects": _npy(np.array([{}, []], dtype=object)),
            "text": _npy(np.array(["x"] * 20)),
            "NaN": _npy(np.full((1, *SHAPE), np.nan, np.float32)),
            "a header that is code": _npy_header("__import__('os').system('true')", "<f4"),
            "a header that does not end": _npy_header("(1, 4", "<f4"),
            "a header of 1,000 brackets": _npy_header("(" * 1000, "<f4"),
        },
        "application/vnd.apache.arrow.stream": {
            "junk": b"\xff\xff\xff\xff" + b"\x7f" * 100,
            "cut off": _arrow_stream()[:-100],
            "a message of 2 GB": b"\xff\xff\xff\xff" + struct.pack("<i", 2**31 - 1),
            "a column with another name": _arrow_stream("picture"),
        },
        "application/vnd.apache.arrow.file": {"junk": b"ARROW1\0\0" + b"\x7f" * 100 + b"ARROW1"},
        "text/csv": {"junk": b"\0\xff" * 1000, "ragged": b"image\n1,2,3\n4\n", "one field": b'"' + b"x" * 1_000_000},
        "image/png": {"junk": b"\x89PNG\r\n\x1a\n" + b"\xff" * 100, "2^31 pixels wide": _png_claiming(2**31 - 1, 1)},
        "image/jpeg": {"junk": b"\xff\xd8\xff\xe0" + b"\xff" * 100},
        "image/svg+xml": {"any": b"<svg/>"},
        "application/x-python-pickle": {"any": b"cos\nsystem\n(S'true'\ntR."},
        "multipart/form-data; boundary=x": {"any": b"--x\r\n\r\n--x--"},
        "\x7f": {"any": b"x"},
    }
    for kind, contents in bodies.items():
        for name, body in contents.items():
            header = b"content-type: " + kind.encode()
            # a server may take DEL in a header for a fault of its own
            yield HostileCase(f"{kind!a}: {name}", predict(target, body, header), is_json=kind != "\x7f")


def size_cases(target: Target) -> Iterator[HostileCase]:
    """Row 37: bodies that are too large, or grow when unpacked."""
    over = target.max_body_bytes + 2**20

    def head(length: int) -> Send:
        return Send(request(target, "POST", "/predict", b"content-length: %d" % length))

    chunked = request(target, "POST", "/predict", b"transfer-encoding: chunked")
    large_chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    yield HostileCase(
        "size: over the limit",
        (head(over), Send(b" " * 65_536, over // 65_536)),
        frozenset({413}),
    )
    yield HostileCase(
        "size: over the limit, length not told",
        (Send(chunked), Send(large_chunk, over // 65_536 + 1), Send(b"0\r\n\r\n")),
        frozenset({413}),
    )
    yield HostileCase(
        "size: 10 GB told, nothing sent",
        (head(10**10),),
        frozenset({413, 408}),
        may_close=True,
        may_wait=True,
        patience_s=1.0,
    )
    yield HostileCase(
        "size: 10 GB told, 100 MB sent",
        (head(10**10), Send(b" " * 2**20, 100)),
        frozenset({413, 408}),
        may_close=True,
    )
    yield HostileCase(
        "size: many chunks of six bytes",
        (Send(chunked), Send(b'6\r\n"abcd"\r\n', target.num_chunks), Send(b"0\r\n\r\n")),
    )
    yield HostileCase(
        "size: many chunks of one byte, at once",
        (Send(chunked), Send(b"1\r\nx\r\n" * target.num_chunks), Send(b"0\r\n\r\n")),
    )
    for name, bomb in _bombs().items():
        headers = (b"content-type: application/json", b"content-encoding: " + name.encode())
        yield HostileCase(f"size: a {name} bomb", predict(target, bomb, *headers))
    for encoding in (b"gzip", b"br", b"gzip, gzip", b"\x7f"):
        headers = (b"content-type: application/json", b"content-encoding: " + encoding)
        yield HostileCase(
            f"size: not {encoding.decode()!a}", predict(target, b"{}", *headers), is_json=encoding != b"\x7f"
        )


def framing_cases(target: Target) -> Iterator[HostileCase]:
    """Row 37 again: lengths that are none, or two that differ, as in request smuggling."""
    post = ("POST", "/predict")
    both = (b"transfer-encoding: chunked", b"content-length: 4")
    requests = {
        "negative length": request(target, *post, b"content-length: -1"),
        "a length that is text": request(target, *post, b"content-length: four"),
        "a length of 100 digits": request(target, *post, b"content-length: " + b"9" * 100),
        "two lengths": request(target, *post, b"content-length: 2", b"content-length: 4") + b"{}{}",
        "length and chunks": request(target, *post, *both) + b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        "chunk size that is text": request(target, *post, b"transfer-encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n",
        "negative chunk": request(target, *post, b"transfer-encoding: chunked") + b"-2\r\n{}\r\n0\r\n\r\n",
        "chunk of 2^68 bytes": request(target, *post, b"transfer-encoding: chunked") + b"fffffffffffffffff\r\n{}",
        "chunk longer than told": request(target, *post, b"transfer-encoding: chunked") + b"1\r\n{}\r\n0\r\n\r\n",
        "unknown transfer encoding": request(target, *post, b"transfer-encoding: sdch") + b"{}",
        "no length": request(target, *post) + GOOD_BODY,
    }
    for name, data in requests.items():
        yield HostileCase(f"framing: {name}", (Send(data),), may_close=True, is_json=False)
    smuggled = request(target, "POST", "/predict", *both) + b"0\r\n\r\n"
    yield HostileCase("framing: length and chunks alone", (Send(smuggled),), may_close=True, is_json=False)


def slow_cases(target: Target) -> Iterator[HostileCase]:
    """Row 38: clients that take their time, and sockets that are half closed."""
    good = request(target, "POST", "/predict", body=GOOD_BODY)
    head, body = good[: -len(GOOD_BODY)], good[-len(GOOD_BODY) :]
    leaving = {"may_close": True, "may_wait": True, "is_json": False, "patience_s": 0.2}
    drip = target.drip_pause_s
    for name, sent in {"head": head[:20], "body": head + body[:5]}.items():
        drips = tuple(Send(b"x", 1, drip) for _ in range(target.drips))
        yield HostileCase(f"slow: the {name} drips", (Send(sent), *drips), **leaving)
    yield HostileCase("slow: nothing at all", (Send(b"", pause_s=drip),), **leaving)
    yield HostileCase("slow: only empty lines", (Send(b"\r\n", target.drips, drip),), **leaving)
    yield HostileCase(
        "half closed: after a good request", (Send(good), HalfClose()), FINE | ANY_4XX, may_close=True, is_json=False
    )
    for name, sent in {"head": head[:20], "body": head + body[:5], "start": b""}.items():
        yield HostileCase(f"half closed: in the {name}", (Send(sent), HalfClose()), may_close=True, is_json=False)


def header_cases(target: Target) -> Iterator[HostileCase]:
    """Row 39, headers. The HTTP server answers most of these by itself."""

    def get(*headers: bytes) -> bytes:
        return request(target, "GET", "/v2/health/live", *headers)

    refused = {
        "one of 1 MB": get(b"x-large: " + b"x" * 2**20),
        "a name of 1 MB": get(b"x" * 2**20 + b": 1"),
        "10,000 of them": get(*(b"x-%d: 1" % number for number in range(10_000))),
        "a bare CR": get(b"x-a: 1\rx-injected: 2"),
        "NUL": get(b"x-a: 1\x002"),
        "no colon": get(b"nonsense"),
        "a blank before the colon": get(b"x-a : 1"),
        "an empty name": get(b": 1"),
        "a path of 1 MB": request(target, "GET", "/" + "x" * 2**20),
        "a path of 1 MB in a query": request(target, "GET", "/v2?" + "x" * 2**20),
        "a version that is none": get().replace(b"HTTP/1.1", b"HTTQ/1.1"),
        "no request line": b"\r\n\r\n\r\n: \r\n\r\n",
        "random bytes": bytes(range(256)) * 64,
        "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    }
    for name, data in refused.items():
        # what is not HTTP may look incomplete to the server for ever, so it is told that no more comes
        end = (HalfClose(),) if name in ("random bytes", "TLS", "no request line") else ()
        yield HostileCase(
            f"header: {name}", (Send(data), *end), ANY_4XX | {505}, may_close=True, is_json=False, method="GET"
        )
    preface = Send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    yield HostileCase(
        "header: HTTP/2 without asking", (preface,), may_close=True, may_differ=True, is_json=False, method="GET"
    )
    harmless = {
        "no such version of HTTP": get().replace(b"HTTP/1.1", b"HTTP/9.9"),
        "no version of HTTP": b"GET /\r\n\r\n",
        "a line feed": get(b"x-a: 1\nset-cookie: injected=1"),
        "a folded line": get(b"x-a: 1\r\n set-cookie: injected=1"),
        "no host": get().replace(b"host: localhost\r\n", b""),
        "two hosts": get(b"host: example.org"),
        "a host that is none": get().replace(b"host: localhost", b"host: a b/../c"),
        "a websocket": get(
            b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-key: AAAA", b"sec-websocket-version: 13"
        ),
        "HTTP/2 in clear": get(b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AAMAAABk"),
        "a range": get(b"range: bytes=0-18446744073709551615"),
        "an expectation": get(b"expect: the-unexpected"),
    }
    for name, data in harmless.items():
        yield HostileCase(
            f"header: {name}",
            (Send(data),),
            ANY_4XX | FINE | {505},
            may_close=True,
            is_json=False,
            method="GET",
            forbidden=(b"injected",),
        )


def path_cases(target: Target) -> Iterator[HostileCase]:
    """Row 39, paths."""
    paths = {
        "out of the root": "/../../../../etc/passwd",
        "out of the root, escaped": "/%2e%2e/%2e%2e/etc/passwd",
        "out of the root, escaped twice": "/%252e%252e/etc/passwd",
        "out of the root by a backslash": "/..\\..\\etc\\passwd",
        "out of the models": f"/v2/models/{target.model}/../../../predict",
        "out of the model's name": "/v2/models/..%2f..%2fetc%2fpasswd",
        "NUL": "/%00",
        "NUL in a model's name": f"/v2/models/{target.model}%00",
        "line breaks": "/x%0d%0aset-cookie:%20injected=1",
        "half an escape": "/%",
        "not UTF-8": "/%ff%fe",
        "a version that is none": f"/v2/models/{target.model}/versions/..%2f../ready",
        "3,000 folders deep": "/x" * 3000,
        "markup": "/%3Cscript%3Ealert(1)%3C/script%3E",
    }
    for name, path in paths.items():
        yield HostileCase(
            f"path: {name}",
            (Send(request(target, "GET", path)),),
            is_json=False,
            may_close=True,
            method="GET",
            forbidden=(b"'set-cookie':",),
        )
    lines = {
        "to this host": f"GET http://localhost{target.prefix}/v2/health/live HTTP/1.1",
        "to another host": f"GET {target.canary_url} HTTP/1.1",
        "to a file": "GET file:///etc/passwd HTTP/1.1",
        "to this host, by number": "GET http://127.0.0.1:22/ HTTP/1.1",
        "to a tunnel": "CONNECT 127.0.0.1:22 HTTP/1.1",
        "to everything": "OPTIONS * HTTP/1.1",
    }
    for name, line in lines.items():
        data = f"{line}\r\nhost: localhost\r\n\r\n".encode()
        # a server has to take the absolute form of its own address, and may take any for its own
        statuses = ANY_4XX | FINE | {501, 505}
        yield HostileCase(
            f"request line: {name}", (Send(data),), statuses, may_close=True, is_json=False, method=line.split()[0]
        )


def identifier_cases(target: Target) -> Iterator[HostileCase]:
    """Row 41: names that end up in files, logs and headers."""
    headers = {
        "a model's id out of its folder": b"serve_multiplexed_model_id: ../../x",
        "a model's id out of its folder, with dashes": b"serve-multiplexed-model-id: ../../../../etc/passwd",
        "a request's id with line breaks": b"x-request-id: a\r\n level: ERROR injected",
        "a request's id with a line feed": b"x-request-id: a\nx-b: injected",
        "a request's id with escaped line breaks": b"x-request-id: a%0d%0aset-cookie: injected=1",
        "a request's id for a terminal": b"x-request-id: \x1b[2J",
        "a request's id of 10 kB": b"x-request-id: " + b"x" * 10_000,
        "a sticky key out of its folder": b"x-bigray-key: ../../x",
        "a time-out that is none": b"x-request-timeout-seconds: nan",
        "a time-out of minus one": b"x-request-timeout-seconds: -1",
        "another address": b"x-forwarded-for: 127.0.0.1, <script>",
    }
    for name, header in headers.items():
        steps = predict(target, GOOD_BODY, b"content-type: application/json", header)
        yield HostileCase(
            f"id: {name}", steps, ANY_4XX | FINE, may_close=True, is_json=False, forbidden=(b"set-cookie'", b"\x1b")
        )
    # Ray decodes these before the application sees them, and a 500 is its answer
    for name in ("x-request-id", "serve_multiplexed_model_id"):
        steps = predict(target, GOOD_BODY, name.encode() + b": \xff\xfe")
        yield HostileCase(f"id: {name} that is not UTF-8", steps, ANY_4XX | FINE | {500}, is_json=False, may_close=True)


ROUTES: dict[str, str] = {
    "/": "GET",
    "/card": "GET",
    "/stats": "GET",
    "/metrics": "GET",
    "/predict": "POST",
    "/openapi.json": "GET",
    "/v2": "GET",
    "/v2/health/live": "GET",
    "/v2/health/ready": "GET",
    "/v2/models/{model}": "GET",
    "/v2/models/{model}/ready": "GET",
    "/v2/models/{model}/infer": "POST",
    "/v2/repository/index": "POST",
}
"""Path -> its method."""
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def method_cases(target: Target) -> Iterator[HostileCase]:
    """Row 42: methods that a route has not, and routes that only administrators elsewhere have."""
    for route, right in ROUTES.items():
        path = route.format(model=target.model)
        for method in METHODS:
            if method != right:
                data = request(target, method, path, body=b"{}")
                yield HostileCase(f"method: {method} {route}", (Send(data),), frozenset({405}), method=method)
    for method in ("TRACE", "PROPFIND", "GETS", "get", "G\tET"):
        data = request(target, method, "/v2/health/live")
        yield HostileCase(
            f"method: {method!a}", (Send(data),), ANY_4XX | {501}, may_close=True, is_json=False, method=method
        )
    administrators = (
        ("DELETE", f"/v2/models/{target.model}"),
        ("DELETE", f"/v2/repository/models/{target.model}"),
        ("POST", f"/v2/repository/models/{target.model}/load"),
        ("POST", f"/v2/repository/models/{target.model}/unload"),
        ("POST", "/v2/systemsharedmemory/region/x/register"),
        ("POST", "/v2/logging"),
        ("PUT", "/api/serve/applications/"),
        ("DELETE", "/api/serve/applications/"),
        ("POST", "/api/jobs/"),
        ("DELETE", "/api/jobs/1"),
        ("POST", "/-/shutdown"),
        ("DELETE", "/"),
    )
    for method, path in administrators:
        data = request(target, method, path, body=b"{}")
        yield HostileCase(f"administration: {method} {path}", (Send(data),), is_json=False, method=method)


def leaving_cases(target: Target) -> Iterator[HostileCase]:
    """Row 43: the client goes away."""
    good = request(target, "POST", "/predict", body=GOOD_BODY)
    rows = json.dumps({"records": [{"image": IMAGE}] * 2000}).encode()
    large = request(target, "POST", "/predict", body=rows)
    parts = {"in the head": good[:30], "in the body": good[:-20], "before the answer": good, "of 2,000 rows": large}
    for name, data in parts.items():
        for by_reset in (False, True):
            steps = (Send(data), Leave(by_reset))
            yield HostileCase(f"leaves: {name}{', by a reset' if by_reset else ''}", steps, times=20)
    # a hundred requests down one connection, and none of the answers read
    yield HostileCase("leaves: a hundred requests at once", (Send(good, 100), Leave()))


def url_cases(target: Target) -> Iterator[HostileCase]:
    """Row 44: requests that name something to load. It must not be loaded: the canary is the witness."""
    url = target.canary_url
    svg = f'<svg xmlns:x="http://www.w3.org/1999/xlink"><image x:href="{url}"/></svg>'
    documents: dict[str, object] = {
        "for an image": {"records": [{"image": url}]},
        "for an image, as an object": {"records": [{"image": {"url": url}}]},
        "of a file": {"records": [{"image": "file:///etc/passwd"}]},
        "for the records": {"records": url},
        "beside the records": {"url": url, "image_url": url, "source": url},
    }
    for name, document in documents.items():
        yield HostileCase(f"URL: {name}", predict(target, json.dumps(document).encode()))
    for kind, body in {"text/uri-list": url, "image/png": url, "image/svg+xml": svg, "text/html": svg}.items():
        yield HostileCase(
            f"URL: as {kind}", predict(target, body.encode(), b"content-type: " + kind.encode()), is_json=True
        )
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, *SHAPE]}
    for parameter in ("shared_memory_region", "url", "uri"):
        inputs = [tensor | {"parameters": {parameter: url}}]
        yield HostileCase(f"URL: a tensor's {parameter}", infer(target, {"inputs": inputs}))
    load = request(
        target,
        "POST",
        "/v2/repository/models/evil/load",
        body=json.dumps({"parameters": {"config": "{}", "url": url, "file:1/model.onnx": url}}).encode(),
    )
    yield HostileCase("URL: a model to load", (Send(load),), is_json=False)
    headers = (f"x-model-url: {url}", f"content-location: {url}", f"link: <{url}>; rel=preload", f"referer: {url}")
    steps = predict(target, GOOD_BODY, b"content-type: application/json", *(header.encode() for header in headers))
    yield HostileCase("URL: in headers", steps, FINE)


def auth_cases(target: Target, admin_only: tuple[str, ...] = ()) -> Iterator[HostileCase]:
    """Row 40, for an endpoint with keys; `target.secret` is one that may predict. All but its own are refused."""
    secret, bare = target.secret, replace(target, secret="")
    headers = {
        "no key": b"x-nothing: 1",
        "a wrong key": f"authorization: Bearer {secret[:-4]}AAAA".encode(),
        "an unknown key": b"authorization: Bearer bgr_00000000_" + b"A" * 43,
        "half a key": f"x-api-key: {secret[:20]}".encode(),
        "an empty key": b"authorization: Bearer ",
        "another scheme": f"authorization: Basic {secret}".encode(),
        "a cookie": f"cookie: key={secret}; authorization=Bearer {secret}".encode(),
        "a key that is not ASCII": b"x-api-key: \xff\xfe",
        "a key of 10 kB": b"x-api-key: " + b"x" * 10_000,
        "an SQL string": b"x-api-key: ' OR 1=1 --",
    }
    unauthorized = frozenset({401})
    for name, header in headers.items():
        steps = predict(bare, GOOD_BODY, b"content-type: application/json", header)
        yield HostileCase(f"key: {name}", steps, unauthorized, forbidden=(secret.encode(),))
    for query in (f"key={secret}", f"api_key={secret}", f"x-api-key={secret}", f"authorization=Bearer%20{secret}"):
        data = request(bare, "POST", f"/predict?{query}", body=GOOD_BODY)
        yield HostileCase(f"key: in the query as {query.split('=')[0]}", (Send(data),), unauthorized)
    for path, method in ROUTES.items():
        if path not in OPEN_ROUTES:
            data = request(bare, method, path.format(model=target.model), body=b"{}" if method == "POST" else None)
            yield HostileCase(f"key: none for {method} {path}", (Send(data),), unauthorized, method=method)
    for path in admin_only:
        yield HostileCase(f"key: no admin for {path}", (Send(request(target, "POST", path)),), frozenset({403}))
    over = target.max_body_bytes + 2**20
    head = request(bare, "POST", "/predict", b"content-length: %d" % over)
    # it may be refused before its body is read, and a client that is still sending may not see the answer
    yield HostileCase(
        "key: none for a large body",
        (Send(head), Send(b" " * 65_536, over // 65_536)),
        unauthorized | {413},
        may_close=True,
    )
    yield HostileCase("key: a right one", predict(target, GOOD_BODY), FINE)


OPEN_ROUTES = frozenset({"/", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{model}/ready"})
"""Answered without a key: they hold no data."""


# ----- sending them


def send(host: str, port: int, case: HostileCase) -> HostileAnswer:
    """Make the connection, go through the steps and read what comes back."""
    with socket.create_connection((host, port), timeout=case.patience_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # an endpoint that has answered may close while we still send: its answer counts
        with suppress(OSError):
            for step in case.steps:
                if isinstance(step, HalfClose):
                    connection.shutdown(socket.SHUT_WR)
                elif isinstance(step, Send) and not _send_all(connection, step):
                    break
        if isinstance(case.steps[-1], Leave):
            return _leave(connection, case.steps[-1])
        return _read_answer(connection, case.method)


def ask_again(host: str, port: int, target: Target) -> HostileAnswer:
    """A good request, as after each hostile one."""
    return send(host, port, good_requests(target)[0])


def _send_all(connection: socket.socket, step: Send) -> bool:
    """False where an answer came before all was sent."""
    for number in range(step.times):
        connection.sendall(step.data)
        is_due = step.pause_s > 0 or number % 64 == 63
        if is_due and select.select([connection], [], [], step.pause_s)[0]:
            return False
    return True


def _leave(connection: socket.socket, step: Leave) -> HostileAnswer:
    if step.by_reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return HostileAnswer(None, ending="left")


def _read_answer(connection: socket.socket, method: str) -> HostileAnswer:
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
        return HostileAnswer(None, ending="closed")
    except TimeoutError:
        return HostileAnswer(None, ending="waiting")
    except http.client.HTTPException as error:
        return HostileAnswer(None, body=repr(error).encode(), ending="not HTTP")
    headers = {name.lower(): value for name, value in response.getheaders()}
    try:
        body = response.read()
    except (http.client.HTTPException, OSError) as error:
        body = f"cut off: {error!r}".encode()
    return HostileAnswer(response.status, body, headers)


@contextmanager
def slow_connections(host: str, port: int, count: int, pause_s: float = 1.0) -> Iterator[list[socket.socket]]:
    """Hold `count` connections that each send a head one byte at a time, while the test asks good questions."""
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\nx-slow: "
    connections = [socket.create_connection((host, port), timeout=20) for _ in range(count)]
    stop = threading.Event()

    def drip() -> None:
        position = 0
        while not stop.wait(pause_s if position else 0):
            for connection in connections:
                with suppress(OSError):  # the endpoint may have had enough of it
                    connection.sendall(head[position : position + 1] or b"x")
            position += 1

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield connections
    finally:
        stop.set()
        thread.join()
        for connection in connections:
            connection.close()


class Canary:
    """A listener that nobody should ever reach."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/canary"

    def visits(self, wait_s: float = 0.0) -> int:
        """Connections since the last call."""
        time.sleep(wait_s)
        count = 0
        with suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()
                count += 1
        return count

    def close(self) -> None:
        self._listener.close()


# ----- contents


def _is_error_document(body: bytes) -> bool:
    try:
        document = json.loads(body)
    except ValueError:
        return False
    return isinstance(document, dict) and list(document) == ["error"] and "\n" not in document["error"]


@cache
def _bombs() -> dict[str, bytes]:
    """64 MB in 64 kB: more than any endpoint here takes."""
    content = bytes(64 * 2**20)
    return {"gzip": gzip.compress(content, 6), "deflate": zlib.compress(content, 6)}


def _damaged(body: bytes, generator: np.random.Generator) -> bytes:
    damaged = bytearray(body)
    for _ in range(generator.integers(1, 4)):
        position = int(generator.integers(len(damaged)))
        match generator.integers(4):
            case 0:
                damaged[position] = int(generator.integers(256))
            case 1:
                damaged[position : position + 4] = generator.bytes(4)
            case 2:
                del damaged[position + 1 : position + int(generator.integers(2, 20))]
            case 3:
                damaged[position:position] = generator.bytes(5)
    return bytes(damaged)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def _npy_header(shape: object, dtype: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (118 - len(text) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _arrow_stream(column: str = "image") -> bytes:
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((2, *SHAPE), np.float32))
    table = pa.table({column: images})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
