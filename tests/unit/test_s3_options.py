from __future__ import annotations

import pytest
from pyarrow import fs

from bigray.errors import StorageError
from bigray.s3 import options_of, reopen_s3, s3_options
from bigray.storage import Storage, open_storage

HERE = {"endpoint_override": "127.0.0.1:9000", "scheme": "http", "region": "us-east-1"}


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        ({"region": "eu-west-1"}, {}, {"region": "eu-west-1"}),
        (HERE, {"AWS_ENDPOINT_URL": "https://elsewhere"}, HERE),
        ({"endpoint_override": "http://127.0.0.1:9000/"}, {}, HERE),
        ({}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, HERE),
        ({}, {"AWS_ENDPOINT_URL": "https://elsewhere", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000"}, HERE),
        ({}, {"AWS_ENDPOINT_URL": "http://x", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, {}),
        ({}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "AWS_REGION": "here"}, {**HERE, "region": "here"}),
        ({}, {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something"}, {}),
        ({"allow_bucket_creation": "True"}, {}, {"allow_bucket_creation": True}),
    ],
)
def test_the_uri_comes_before_the_environment(
    asked: dict[str, str], environment: dict[str, str], expected: dict[str, object]
) -> None:
    assert s3_options(asked, environment) == expected


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("s3://bucket/x?regoin=eu-west-1", "unknown option 'regoin', did you mean 'region'?"),
        ("s3://bucket/x?allow_bucket_creation=yes", "allow_bucket_creation: expected true or false, got 'yes'"),
        ("s3:///x?region=eu-west-1", "expected s3://bucket/path, got no bucket"),
    ],
)
def test_an_option_that_is_not_one_is_refused(uri: str, text: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_storage(uri)
    assert str(caught.value) == f"{uri}: cannot open storage: {text}"


def test_what_is_opened_again_is_the_same_and_tells_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    filesystem = reopen_s3(HERE)

    options = options_of(filesystem)

    assert "something" not in str(options)
    assert reopen_s3(options) == filesystem


STORE = fs.LocalFileSystem()


@pytest.mark.parametrize(
    ("uri", "child", "parent", "beside"),
    [
        ("s3://b/runs/a?region=eu", "s3://b/runs/a/x/y?region=eu", "s3://b/runs?region=eu", "s3://b/runs/z?region=eu"),
        ("gs://b/runs/a", "gs://b/runs/a/x/y", "gs://b/runs", "gs://b/runs/z"),
        ("runs/what?", "runs/what?/x/y", "runs", "runs/z"),
        ("runs", "runs/x/y", ".", "z"),
        ("/runs", "/runs/x/y", "/", "/z"),
    ],
)
def test_how_a_store_is_reached_stays_at_the_end_of_its_uris(uri: str, child: str, parent: str, beside: str) -> None:
    storage = Storage(STORE, "b/runs/a", uri)

    assert storage.child("x", "y").uri == child
    assert storage.parent.uri == parent
    assert (storage.parent.root, storage.child("x", "y").root) == ("b/runs", "b/runs/a/x/y")
    assert storage.uri_beside("z") == beside


def test_an_opened_uri_keeps_its_options_at_the_end() -> None:
    storage = open_storage("s3://bucket/runs/?region=eu-west-1")

    assert (storage.root, storage.uri) == ("bucket/runs", "s3://bucket/runs?region=eu-west-1")
