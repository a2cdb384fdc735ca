"""Ask an endpoint: single requests for `bigray predict`, and whole tables in chunks to compare with offline answers."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
import orjson
import pyarrow as pa

from bigray.data.features import FeatureSchema, table_to_records
from bigray.errors import DeployError, SpecError
from bigray.inference import Predictions

TIMEOUT_S = 30.0
ROWS_PER_REQUEST = 256
BYTES_PER_REQUEST = 4_000_000
"""Half of what an endpoint takes by default (`max_body_mb: 8`)."""


class Endpoint:
    """One keep-alive connection to a deployed model."""

    def __init__(self, url: str, connection: http.client.HTTPConnection) -> None:
        self._url, self._connection = url, connection

    def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`POST /predict`, in one request: one prediction for each record, in order."""
        return self.predict_body(_body([_row(record) for record in records]))

    def predict_body(self, body: bytes) -> list[dict[str, Any]]:
        """`POST /predict` with records that are JSON already."""
        predictions: list[dict[str, Any]] = self.request("POST", "/predict", body)["predictions"]
        return predictions

    def request(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The parsed JSON answer.

        Raises:
            DeployError: nothing answers, the answer is not JSON, or it is an error, whose text is passed on.
        """
        target = urlsplit(self._url).path.rstrip("/") + path
        try:
            self._connection.request(method, target, body, {"content-type": "application/json"} if body else {})
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise DeployError(f"{self._url}: no answer: {error}") from error
        try:
            document = json.loads(content)
        except ValueError:
            start = content[:80].decode(errors="replace")
            raise DeployError(
                f"{self._url}{path}: answered {answer.status} with something else than JSON: {start}"
            ) from None
        if answer.status != 200:
            text = document.get("error", document) if isinstance(document, dict) else document
            raise DeployError(f"{self._url}{path}: answered {answer.status}: {text}")
        return document


@contextmanager
def open_endpoint(url: str) -> Iterator[Endpoint]:
    """Connect to the root of an endpoint, such as `http://127.0.0.1:8000`."""
    parts = urlsplit(url)
    connection = _connection(url, parts)
    try:
        yield Endpoint(url.rstrip("/"), connection)
    finally:
        connection.close()


def fetch_json(url: str) -> Any:
    """`GET` one address."""
    parts = urlsplit(url)
    root = f"{parts.scheme}://{parts.netloc}"
    with open_endpoint(root) as endpoint:
        return endpoint.request("GET", parts.path or "/")


def predict_records(url: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One prediction for each record, in order, sent in chunks."""
    with open_endpoint(url) as endpoint:
        return [answer for body in request_bodies(records) for answer in endpoint.predict_body(body)]


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
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY)


def _body(rows: Sequence[bytes]) -> bytes:
    return b'{"records":[' + b",".join(rows) + b"]}"


def predict_file(url: str, path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Predictions for the first `limit` rows of a file: JSON records, Parquet, CSV or Arrow.

    Raises:
        SpecError: the file cannot be read as its suffix says.
        DeployError: the endpoint does not answer, or refuses the rows.
    """
    return predict_records(url, read_records(path)[:limit])


def predict_table(url: str, table: pa.Table, schema: FeatureSchema) -> Predictions:
    """What the endpoint says about every row of a table, as `Predictor.run_table` returns it offline."""
    answers = predict_records(url, table_to_records(table, [column.name for column in schema.columns]))
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


def _connection(url: str, parts: SplitResult) -> http.client.HTTPConnection:
    kinds: dict[str, type[http.client.HTTPConnection]] = {
        "http": http.client.HTTPConnection,
        "https": http.client.HTTPSConnection,
    }
    if parts.scheme not in kinds or not parts.hostname:
        raise SpecError(f"{url}: expected the address of an endpoint, such as http://127.0.0.1:8000")
    try:
        return kinds[parts.scheme](parts.hostname, parts.port, timeout=TIMEOUT_S)
    except ValueError as error:
        raise SpecError(f"{url}: {error}") from None
