"""S3 and what speaks its protocol (MinIO, Ceph, R2): the filesystem of a URI, with timeouts and retries of our own.

    s3://bucket/runs?region=eu-west-1
    s3://bucket/runs?endpoint_override=10.0.0.7:9000&scheme=http

Credentials come from the environment, the AWS configuration files or the machine's role, never from the URI. The
endpoint of a URI without one is that of `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import fs

from bigray.errors import did_you_mean

CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 15.0
"""A connection over which no byte has come or gone for this long is given up."""
ATTEMPTS = 5
"""Of each request, by the client itself, over about ten seconds."""

_WORDS = ("endpoint_override", "region", "scheme", "tls_ca_file_path")
_FLAGS = ("allow_bucket_creation", "allow_bucket_deletion", "allow_delayed_open", "force_virtual_addressing")
_OF_URIS_ONLY = ("smart_defaults", "tls_ca_dir_path", "tls_verify_certificates")
"""Options that pyarrow takes in a URI alone: with them its own timeouts hold."""
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_FIXED = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "request_timeout": STALL_TIMEOUT_S,
    # in the background any number of parts would wait in memory while the server stalls
    "background_writes": False,
    # what is small goes up in one request, at once or not at all
    "allow_delayed_open": True,
}


def open_s3(uri: str, environment: Mapping[str, str] = os.environ) -> tuple[fs.FileSystem, str]:
    """The filesystem of an `s3://` URI, and the path in it. Asks for the bucket's region where nothing tells it.

    Raises:
        ValueError: the URI holds an option that is not one, or no bucket.
        OSError: the bucket's region cannot be found out.
    """
    parts = urlsplit(uri)
    asked = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not parts.netloc:
        raise ValueError("expected s3://bucket/path, got no bucket")
    if any(name in asked for name in _OF_URIS_ONLY):
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path
    options = s3_options(asked, environment)
    if "region" not in options:
        options["region"] = fs.resolve_s3_region(parts.netloc)
    return reopen_s3(options), parts.netloc + unquote(parts.path)


def needs_uri(uri: str) -> bool:
    """Whether the filesystem has options that only a URI gives it: another process has to open the URI again."""
    return any(name in dict(parse_qsl(urlsplit(uri).query)) for name in _OF_URIS_ONLY)


def s3_options(asked: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What `pyarrow.fs.S3FileSystem` is made with, from the parameters of a URI; holds no secret.

    Raises:
        ValueError: a parameter is not one, or has no meaning.
    """
    for name in asked:
        if name not in (*_WORDS, *_FLAGS):
            raise ValueError(f"unknown option '{name}'{did_you_mean(name, [*_WORDS, *_FLAGS, *_OF_URIS_ONLY])}")
    options: dict[str, Any] = {name: asked[name] for name in _WORDS if asked.get(name)}
    options |= {name: _truth(name, asked[name]) for name in _FLAGS if name in asked}
    endpoint = options.get("endpoint_override") or _endpoint_of(environment)
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or options.get("scheme", "https")}
        # else the client asks the metadata service of EC2, which is nowhere near
        region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
        options.setdefault("region", region)
    return options


def reopen_s3(options: Mapping[str, Any]) -> fs.S3FileSystem:
    """The filesystem of `s3_options`, or of what another one was pickled as, which leaves out how often it tries."""
    return fs.S3FileSystem(**{**options, **_FIXED}, retry_strategy=fs.AwsStandardS3RetryStrategy(ATTEMPTS))


def options_of(filesystem: fs.S3FileSystem) -> dict[str, Any]:
    """What `reopen_s3` takes to make its like in another process, which looks for credentials itself."""
    _, (options,) = filesystem.__reduce__()
    return dict(options)


def _endpoint_of(environment: Mapping[str, str]) -> str:
    if environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return ""
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""


def _truth(name: str, text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise ValueError(f"{name}: expected true or false, got '{text}'")
    return _TRUTH[text.lower()]
