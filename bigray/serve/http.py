"""One HTTP request and its answer, as the handlers of an endpoint see them; no server, no Ray."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping
from typing import NamedTuple

Headers = tuple[tuple[bytes, bytes], ...]

JSON = b"application/json"


def try_again_in(seconds: float) -> Headers:
    """What a refusal that will pass says: whole seconds, at least one."""
    return ((b"retry-after", str(max(1, math.ceil(seconds))).encode()),)


TRY_AGAIN = try_again_in(1)


class Refusal(Exception):
    """An answer other than 200; `message` is sent to the caller, so it holds no path, module name or traceback."""

    def __init__(self, status: int, message: str, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class Request(NamedTuple):
    """A request whose body has been read (replica)."""

    method: str
    path: str
    """Below the application's prefix, `/` at least."""
    headers: Mapping[bytes, bytes]
    """Names in lower case; of one that came twice, the last."""
    body: bytes

    def header(self, name: bytes) -> str:
        """The header as text, empty where there is none."""
        return self.headers.get(name, b"").decode("latin-1")


class Answer(NamedTuple):
    """What goes back, but for the headers that every answer has."""

    body: bytes
    content_type: bytes = JSON
    status: int = 200
    headers: Headers = ()


class Streamed(NamedTuple):
    """An answer that is sent while it is made."""

    pieces: AsyncIterator[bytes]
    """What fails before the first of them is answered as in any other request."""
    encode_fault: Callable[[str], bytes]
    """The last piece where a later one fails: it is too late for another status."""
    content_type: bytes
    status: int = 200
    headers: Headers = ()
