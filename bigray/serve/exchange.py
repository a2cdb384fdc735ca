"""One request on its way through the application: what becomes known of it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from bigray.serve.http import Headers, Refusal
from bigray.serve.loaded import LoadedModel
from bigray.serve.under_way import CLOSE

ID_BITS = 64
LONGEST_ID = 128
MOST_HEADERS, MOST_HEADER_BYTES = 128, 64 * 1024

# not the shared one, which a model's code may seed; to ask the system each time takes longer than all else of an id
_ids = random.Random()

RawHeaders = Sequence[tuple[bytes, bytes]]
"""As they came, names in lower case."""


class Exchange:
    """A request, and what is learnt of it until it is answered."""

    __slots__ = (
        "_client",
        "_id",
        "answered",
        "body_bytes",
        "headers",
        "held_bytes",
        "is_begun",
        "is_model_route",
        "key_id",
        "method",
        "model",
        "path",
        "raw_headers",
        "route",
        "rows",
        "started",
    )

    def __init__(self, method: str, path: str, headers: RawHeaders, client: Any) -> None:
        """`path` is below the application's prefix; `client` is the peer's address and port, if it has one."""
        self.started = time.perf_counter()
        self.method, self.path = method, path
        self.raw_headers, self.headers, self._client = headers, dict(headers), client
        self.route, self.key_id, self.rows, self.body_bytes, self.held_bytes = "other", "", 0, 0, 0
        self.is_model_route, self.is_begun, self.model = False, False, ""  # begun: the head of its answer is sent
        self.answered: LoadedModel | None = None
        self._id = ""

    def check_headers(self) -> None:
        """HAProxy has limits of its own; a replica can be reached without it, and its HTTP parser has none."""
        headers = self.raw_headers
        if len(headers) > MOST_HEADERS or sum(map(len, chain.from_iterable(headers))) > MOST_HEADER_BYTES:
            raise Refusal(431, f"headers: more than {MOST_HEADERS}, or {MOST_HEADER_BYTES // 1024} kB of them", CLOSE)

    def request_id(self) -> str:
        """The caller's own where it is harmless to repeat, else one of ours."""
        if not self._id:
            given = self.headers.get(b"x-request-id", b"")[:LONGEST_ID].decode("ascii", "ignore")
            self._id = given if given and given.isprintable() else f"{_ids.getrandbits(ID_BITS):016x}"
        return self._id

    def sticky(self) -> str:
        """What stays the same from one request of a caller to the next, where the caller says so.

        Else each request is a caller of its own: behind a proxy all have one address, and one API key may stand for
        all users of a service, so either would put the whole traffic on one side of a canary.
        """
        given = self.headers.get(b"x-bigray-key") or self.headers.get(b"x-forwarded-for")
        return given.decode("latin-1") if given else self.request_id()

    def client(self) -> str:
        forwarded = self.headers.get(b"x-forwarded-for")
        if forwarded:
            return forwarded.decode("latin-1")
        return str(self._client[0]) if self._client else ""

    def answer_headers(self, live_version: str) -> Headers:
        """What every answer says; of one that no model gave, `live_version`."""
        version = self.answered.version if self.answered is not None else live_version
        return ((b"x-bigray-version", version.encode()), (b"x-request-id", self.request_id().encode()))


def content_length(headers: Mapping[bytes, bytes]) -> int:
    """Bytes of the body as announced; 0 where they are not."""
    text = headers.get(b"content-length", b"").strip(b" \t")  # blanks behind a value are left to it by the parser
    return int(text) if text.isdigit() else 0
