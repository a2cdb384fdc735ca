from __future__ import annotations

import io
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from bigray.data.sources import check_source, given_split, read_table
from bigray.errors import SpecError

TABLE = pa.table({"width": [1.5, 2.0, 3.0], "label": ["a", "b", "a"]})


class Bucket(BaseHTTPRequestHandler):
    """What `pyarrow.fs` asks of S3 to read: HEAD and GET of an object, and ListObjectsV2."""

    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._object(with_body=False)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list(query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
        else:
            self._object(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _object(self, *, with_body: bool) -> None:
        content = self.objects.get(urlsplit(self.path).path.removeprefix("/bucket/"))
        if content is None:
            self._answer(403 if "/denied" in self.path else 404, b"")
            return
        status, asked = 200, self.headers.get("Range")
        if asked and with_body:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            status, content = 206, content[int(first) : int(last) + 1]
        self._answer(status, content, with_body=with_body)

    def _list(self, prefix: str, delimiter: str) -> None:
        if prefix.startswith("denied"):
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            return
        names = [name for name in sorted(self.objects) if name.startswith(prefix)]
        folders: set[str] = set()
        if delimiter:
            folders = {prefix + name[len(prefix) :].split("/")[0] + "/" for name in names if "/" in name[len(prefix) :]}
            names = [name for name in names if "/" not in name[len(prefix) :]]
        contents = "".join(
            f"<Contents><Key>{name}</Key><Size>{len(self.objects[name])}</Size></Contents>" for name in names
        )
        prefixes = "".join(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in sorted(folders))
        count = len(names) + len(folders)
        self._answer(
            200, f"<ListBucketResult><KeyCount>{count}</KeyCount>{contents}{prefixes}</ListBucketResult>".encode()
        )

    def _answer(self, status: int, content: bytes, *, with_body: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def _parquet() -> bytes:
    stream = io.BytesIO()
    parquet.write_table(TABLE, stream)
    return stream.getvalue()


def _png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    bucket = type("Bucket", (Bucket,), {"objects": {}})
    bucket.objects = {
        "table/part-1.parquet": _parquet(),
        "table/part-2.parquet": _parquet(),
        "table/_SUCCESS": b"",
        "rows.csv": b"a,b\n1,x\n2\n",
        **{f"images/{name}.png": _png(1) for name in ("train/cat/1", "train/dog/2", "test/cat/3")},
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), bucket) as listener:
        Thread(target=listener.serve_forever, daemon=True).start()
        yield f"endpoint_override=127.0.0.1:{listener.server_port}&scheme=http&region=eu-west-1"
        listener.shutdown()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("path", ["table", "table/", "table/*.parquet", "tab*/part-[12].parquet"])
def test_a_folder_and_a_pattern_in_a_bucket_are_read_in_order_of_name(server: str, path: str) -> None:
    check_source(f"s3://bucket/{path}?{server}")

    assert read_table(f"s3://bucket/{path}?{server}").equals(pa.concat_tables([TABLE, TABLE]))


def test_an_object_is_read_and_its_fault_told_without_the_options(server: str) -> None:
    assert read_table(f"s3://bucket/table/part-1.parquet?{server}").equals(TABLE)
    with pytest.raises(SpecError, match=r"^'s3://bucket/rows\.csv': line 3 has 1 values, the header has 2$"):
        read_table(f"s3://bucket/rows.csv?{server}")


def test_a_tree_of_images_in_a_bucket_has_its_classes_and_its_split(server: str) -> None:
    train, test = given_split(f"s3://bucket/images?{server}") or ("", "")

    assert read_table(train).select(["label", "path"]).to_pydict() == {
        "label": ["cat", "dog"],
        "path": ["cat/1.png", "dog/2.png"],
    }
    assert read_table(test).column("image").to_pylist() == [_png(1)]


@pytest.mark.parametrize("path", ["denied/rows.csv", "denied", "denied/*.csv"])
def test_what_may_not_be_read_is_told_without_the_options(server: str, path: str) -> None:
    with pytest.raises(SpecError, match=r"^'s3://bucket/denied.*': cannot be reached: .*ACCESS_DENIED") as caught:
        check_source(f"s3://bucket/{path}?{server}")

    assert server not in str(caught.value)


@pytest.mark.parametrize("path", ["nothing.csv", "nothing/*.csv"])
def test_what_is_not_in_the_bucket_is_told(server: str, path: str) -> None:
    with pytest.raises(SpecError, match=r"no such file or folder$"):
        check_source(f"s3://bucket/{path}?{server}")
