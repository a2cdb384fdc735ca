"""Ask an endpoint: `bigray.Client`, and whole tables in chunks to compare with offline answers."""

from __future__ import annotations

import base64
import http.client
import io
import json
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from bigray.data.features import FeatureSchema, table_to_records
from bigray.errors import DeployError, SpecError
from bigray.inference import Predictions

T = TypeVar("T")

TIMEOUT_S = 30.0
ROWS_PER_REQUEST = 256
BYTES_PER_REQUEST = 4_000_000
"""Half of what an endpoint takes by default (`max_body_mb: 8`)."""
RETRY_AFTER_S = 0.2
"""What is waited before the one retry, time enough for another replica to be chosen."""
MOST_RETRY_AFTER_S = 5.0
PROXY_STARTS_S = 2.0
"""Time for a proxy that has just started to hear of the replicas."""
NOT_HERE = 501
"""What the endpoint cannot do, it cannot do a moment later either."""
DATA = b"data: "
"""How a line of server-sent events begins that is no comment."""
MOST_ABSENT_S = 15.0
"""How long an endpoint that has answered before may take no connections, as when its proxy is replaced."""


@dataclass(frozen=True)
class Response:
    """An answer with status 200."""

    body: bytes
    version: str
    """The model version that made it (`x-bigray-version`)."""
    request_id: str
    headers: Mapping[str, str]
    """Names in lower case."""


class Client:
    """A keep-alive connection to a deployed model; for one thread at a time.

        with bigray.Client("http://127.0.0.1:8000", key="bgr_...") as client:
            client.predict([{"x": 1.0}])

    A question changes nothing, so what fails by the connection or by a 5xx is asked once more, of whichever replica
    answers then. Where the endpoint says when to come back (`Retry-After`), that is waited for, up to 5 s; where it
    takes no connections and has before, up to 15 s.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = 1,
        verify: bool | str = True,
    ) -> None:
        """`url` is the root of the endpoint; `key` is needed where it asks for one.

        `verify` may be a file of certificates to trust, for an endpoint with one of its own; False trusts any.

        Raises:
            SpecError: `url` is not an http or https address.
        """
        self.url = url.rstrip("/")
        self._parts = urlsplit(self.url)
        self._connection = _connection(url, self._parts, timeout_s, verify)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._retries = retries
        self._has_answered = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def predict(self, records: Sequence[Mapping[str, Any]], *, sticky: str | None = None) -> list[dict[str, Any]]:
        """`POST /predict`, in one request: one prediction for each record, in order.

        Values may be dates, numpy numbers and arrays, and the bytes of a PNG or JPEG; None is a missing one.
        Callers that send the same `sticky` text are on the same side of a canary.
        """
        return self.predict_body(_body([_row(record) for record in records]), sticky=sticky)

    def predict_body(self, body: bytes, *, sticky: str | None = None) -> list[dict[str, Any]]:
        """`POST /predict` with records that are JSON already."""
        headers = {"x-bigray-key": sticky} if sticky else {}
        predictions: list[dict[str, Any]] = self.request("POST", "/predict", body, headers)["predictions"]
        return predictions

    def predict_array(self, rows: ArrayLike) -> NDArray[np.float32]:
        """(rows, *input_shape) -> probabilities (rows, classes) or values (rows,): binary both ways, the fast way.

        For tensors, and for columns that are all numbers.
        """
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(rows, dtype=np.float32), allow_pickle=False)
        npy = {"content-type": "application/x-npy", "accept": "application/x-npy"}
        answer = self.send("POST", "/predict", buffer.getvalue(), npy)
        return np.load(io.BytesIO(answer.body), allow_pickle=False)  # type: ignore[no-any-return]

    def predict_many(self, records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One prediction for each record, in order, sent in as many requests as it takes."""
        return [answer for body in request_bodies(records) for answer in self.predict_body(body)]

    def predict_image(self, image: bytes | str | Path) -> dict[str, Any]:
        """The prediction for one PNG or JPEG, given as bytes or as a file."""
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        kind = "image/png" if content.startswith(b"\x89PNG") else "image/jpeg"
        prediction: dict[str, Any] = self.request("POST", "/predict", content, {"content-type": kind})["predictions"][0]
        return prediction

    def explain(self, records: Sequence[Mapping[str, Any]], *, sticky: str | None = None) -> list[dict[str, Any]]:
        """`POST /explain`, in one request: what each column or pixel adds to the answer, for a few records, in order.

        Each has `attributions`, by column or in the shape of the picture, which add up to `output - base`.
        """
        headers = {"x-bigray-key": sticky} if sticky else {}
        body = _body([_row(record) for record in records])
        explanations: list[dict[str, Any]] = self.request("POST", "/explain", body, headers)["explanations"]
        return explanations

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | None = None,
        sticky: str | None = None,
    ) -> Iterator[str]:
        """`POST /generate`: the text after a prompt, piece by piece as it comes; what is None, the endpoint chooses.

        It is asked for when the first piece is, and again as `predict` is until that is here; never after it. To leave
        the iterator ends the text, and the connection with it.

        Raises:
            DeployError: nothing answers, it is an error, or the text broke off.
        """
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "seed": seed, "stop": stop}
        asked = {"prompt": prompt, **{name: value for name, value in options.items() if value is not None}}
        headers = {"content-type": "application/json", **({"x-bigray-key": sticky} if sticky else {})}
        stream = self._ask("POST", "/generate", orjson.dumps(asked), headers, _TextStream)
        try:
            yield from self._text(stream)
        finally:
            if not stream.is_done:
                self._connection.close()  # what is left of it would be taken for the next answer

    def _text(self, stream: _TextStream) -> Iterator[str]:
        path = f"{self.url}/generate"
        try:
            yield from stream.pieces()
        except (OSError, http.client.HTTPException) as error:
            raise DeployError(f"{path}: the text broke off: {' '.join(str(error).split())[:200]}") from error
        if stream.fault is not None:
            raise DeployError(f"{path}: the text broke off: {stream.fault}")

    def card(self) -> dict[str, Any]:
        """The live version's model card: metrics, data, lineage, schema."""
        card: dict[str, Any] = self.request("GET", "/card")
        return card

    def stats(self) -> dict[str, Any]:
        """Rates, latencies and versions, of each replica and of all."""
        stats: dict[str, Any] = self.request("GET", "/stats")
        return stats

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        """The parsed JSON answer; raises as `send` does, and where the answer is not JSON."""
        answer = self.send(method, path, body, {"content-type": "application/json", **(headers or {})})
        return self._parsed(answer.body, path, 200)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """The answer as it came.

        Raises:
            DeployError: nothing answers, or it is an error, whose text is passed on.
        """
        return self._ask(method, path, body, headers or {}, _read)

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        receive: Callable[[http.client.HTTPResponse], T],
    ) -> T:
        """What `receive` makes of an answer with status 200; where it cannot read it, that is asked once more."""
        for attempt in range(self._retries + 1):
            is_last = attempt == self._retries
            try:
                self._connection.request(method, self._parts.path + path, body, {**self._headers, **headers})
                answer = self._connection.getresponse()
                status = answer.status
                if status == 200:
                    received = receive(answer)
                    self._has_answered = True
                    return received
                refused = _read(answer)
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if is_last:
                    # what is no HTTP is repeated by the error, as it came
                    raise DeployError(f"{self.url}: no answer: {' '.join(str(error).split())[:200]}") from error
                self._wait_for_listener()
                continue
            self._has_answered = True
            is_final = status < 500 or status == NOT_HERE
            if is_last or (is_final and not _is_of_a_proxy(status, refused)):
                text = self._error_text(refused.body, path, status)
                raise DeployError(f"{self.url}{path}: answered {status}: {text}")
            time.sleep(PROXY_STARTS_S if status == 404 else _wait_s(refused.headers))
        raise AssertionError("the last attempt returns or raises")

    def _wait_for_listener(self) -> None:
        """Before the retry: until the endpoint takes connections again, where it has answered before."""
        time.sleep(RETRY_AFTER_S)
        deadline = time.monotonic() + (MOST_ABSENT_S if self._has_answered else 0)
        while time.monotonic() < deadline:
            try:
                self._connection.connect()
            except OSError:
                time.sleep(RETRY_AFTER_S)
            else:
                return

    def _error_text(self, content: bytes, path: str, status: int) -> Any:
        document = self._parsed(content, path, status)
        return document.get("error", document) if isinstance(document, dict) else document

    def _parsed(self, content: bytes, path: str, status: int) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            start = content[:80].decode(errors="replace")
            raise DeployError(f"{self.url}{path}: answered {status} with something else than JSON: {start}") from None


class _TextStream:
    """The server-sent events of a text, read up to the first of them."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer
        self.is_done = False
        """The answer is read to its end."""
        self.fault: str | None = None
        self._first = self._next()

    def pieces(self) -> Iterator[str]:
        """Until the event that is the last one, which may tell a fault."""
        event = self._first
        while "text" in event:
            yield str(event["text"])
            event = self._next()
        self.fault = event.get("error")
        self._answer.read()
        self.is_done = True

    def _next(self) -> dict[str, Any]:
        while line := self._answer.readline():
            if line.startswith(DATA):
                return self._parsed(line.removeprefix(DATA))
        raise http.client.HTTPException("the connection ended in it")

    def _parsed(self, data: bytes) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError as error:
            raise http.client.HTTPException(f"an event is not JSON: {error}") from None
        if not isinstance(event, dict):
            raise http.client.HTTPException("an event is no object")
        return event


def _read(answer: http.client.HTTPResponse) -> Response:
    content = answer.read()
    found = {name.lower(): value for name, value in answer.getheaders()}
    return Response(content, found.get("x-bigray-version", ""), found.get("x-request-id", ""), found)


def fetch_json(url: str, *, verify: bool | str = True) -> Any:
    """`GET` one address."""
    parts = urlsplit(url)
    with Client(f"{parts.scheme}://{parts.netloc}", verify=verify) as client:
        return client.request("GET", parts.path or "/")


def request_bodies(records: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Bodies for `POST /predict`, cut by rows and by bytes; a record larger than a whole request goes alone."""
    rows: list[bytes] = []
    size = 0
    for row in map(_row, records):
        if rows and (len(rows) == ROWS_PER_REQUEST or size + len(row) > BYTES_PER_REQUEST):
            yield _body(rows)
            rows, size = [], 0
        rows.append(row)
        size += len(row) + 1  # and its comma
    if rows:
        yield _body(rows)


def _row(record: Mapping[str, Any]) -> bytes:
    return orjson.dumps(record, _for_json, orjson.OPT_SERIALIZE_NUMPY)


def _for_json(value: Any) -> Any:
    """What JSON has no way to write and a record may hold: a picture's bytes, an exact number."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _body(rows: Sequence[bytes]) -> bytes:
    return b'{"records":[' + b",".join(rows) + b"]}"


def predict_file(url: str, path: str | Path, limit: int | None = None, key: str | None = None) -> list[dict[str, Any]]:
    """Predictions for the first `limit` rows of a file: JSON records, Parquet, CSV or Arrow.

    Raises:
        SpecError: the file cannot be read as its suffix says.
        DeployError: the endpoint does not answer, or refuses the rows.
    """
    with Client(url, key=key) as client:
        return client.predict_many(read_records(path)[:limit])


def predict_table(url: str, table: pa.Table, schema: FeatureSchema, key: str | None = None) -> Predictions:
    """What the endpoint says about every row of a table, as `Predictor.run_table` returns it offline."""
    with Client(url, key=key) as client:
        answers = client.predict_many(table_to_records(table, [column.name for column in schema.columns]))
    if answers and "value" in answers[0]:
        values = np.asarray([answer["value"] for answer in answers], dtype=np.float32)
        return Predictions(labels=None, probabilities=None, values=values)
    labels = [answer["label"] for answer in answers]
    probabilities = np.asarray([answer["probabilities"] for answer in answers], dtype=np.float32)
    return Predictions(labels=labels, probabilities=probabilities, values=None)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a file as JSON records."""
    file = Path(path)
    readers = {".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv, ".arrow": _read_arrow}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise SpecError(f"{path}: cannot tell what it holds; known: {', '.join(readers)}")
    try:
        return reader(file)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise SpecError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def _read_json(file: Path) -> list[dict[str, Any]]:
    document = json.loads(file.read_bytes())
    if isinstance(document, dict):
        document = document.get("records", [document])
    if not isinstance(document, list):
        raise ValueError("expected a list of objects, or an object with 'records'")
    return document


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return table_to_records(pyarrow.parquet.read_table(file))


def _read_csv(file: Path) -> list[dict[str, Any]]:
    import pyarrow.csv

    return table_to_records(pyarrow.csv.read_csv(file))


def _read_arrow(file: Path) -> list[dict[str, Any]]:
    with pa.ipc.open_file(file) as reader:
        return table_to_records(reader.read_all())


def _is_of_a_proxy(status: int, answer: Response) -> bool:
    """Whether a proxy that has just started says that there is nothing: an endpoint's own answers are JSON."""
    return status == 404 and answer.headers.get("content-type", "").startswith("text/plain")


def _wait_s(headers: Mapping[str, str]) -> float:
    text = headers.get("retry-after", "")
    return min(float(text), MOST_RETRY_AFTER_S) if text.isdigit() else RETRY_AFTER_S


def _connection(url: str, parts: SplitResult, timeout_s: float, verify: bool | str) -> http.client.HTTPConnection:
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SpecError(f"{url}: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise SpecError(f"{url}: expected the address of an endpoint, such as http://127.0.0.1:8000")
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
    return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=_tls_context(verify))


def _tls_context(verify: bool | str) -> ssl.SSLContext:
    if isinstance(verify, str):
        try:
            return ssl.create_default_context(cafile=verify)
        except OSError as error:
            raise SpecError(f"{verify}: not a file of certificates: {error}") from None
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
