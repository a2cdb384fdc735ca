"""Who may ask this endpoint: finds the key of a request and what it is allowed (replica)."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping

from bigray.errors import last_line
from bigray.serve.http import Refusal, try_again_in
from bigray.serve.protect.keys import Key, KeyRing, open_key_file, read_ring
from bigray.serve.protect.limits import RateLimits

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")

_CHALLENGE = ((b"www-authenticate", b'Bearer realm="bigray"'),)
_NO_KEY = "no valid key: send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'"


class Guard:
    """Lets requests through by the keys of a file, or all of them where there is none.

    Raises:
        StorageError: the file cannot be read when the replica starts, which then must not start: fail closed.
    """

    def __init__(
        self, location: str | os.PathLike[str] | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = None if location is None else open_key_file(location)
        self._ring: KeyRing | None = None if self._file is None else read_ring(self._file)
        self._limits = RateLimits()
        self._clock = clock
        self.problem = ""
        """Why the file could not be read again, in one line; empty when all is well."""

    @property
    def is_open(self) -> bool:
        return self._ring is None

    def authorize(self, headers: Mapping[bytes, bytes], scope: str) -> Key | None:
        """The request's key, None where anybody may ask; header names are in lower case. Takes one of its tokens.

        A key counts in a header only: what is in a URL ends up in logs and histories.

        Raises:
            Refusal: 401 without a valid key, 403 with one that lacks the scope, 429 where it asks too often.
        """
        ring = self._ring
        if ring is None:
            return None
        key = ring.authenticate(presented_secret(headers))
        if key is None:
            # the same for none, unknown, revoked and malformed: which of them it was helps only those who guess
            raise Refusal(401, _NO_KEY, _CHALLENGE)
        if not key.allows(scope):
            raise Refusal(403, f"this key may not do that: it lacks the scope '{scope}'")
        if wait_s := self._limits.take(key, self._clock()):
            raise _too_often(key, wait_s)
        return key

    def reload(self) -> bool:
        """Read the file again; True where its keys changed. Never raises: one that is broken or gone changes nothing.

        Called every few seconds by a thread beside the event loop, which sees the old keys or the new ones.
        """
        if self._file is None or self._ring is None:
            return False
        try:
            ring = read_ring(self._file)
        except Exception as error:  # the keys that counted until now are better than a dead thread
            self._tell(last_line(error))
            return False
        self._tell("")
        if ring.keys == self._ring.keys:
            return False
        self._ring = ring
        self._limits.keep(key.id for key in ring.live)
        return True

    def set_replicas(self, replicas: int) -> None:
        """How many replicas share each key's rate."""
        self._limits.set_replicas(replicas)

    def _tell(self, problem: str) -> None:
        if problem and problem != self.problem:
            _logger.warning("bigray: keys stay as they were: %s", problem)
        elif self.problem and not problem:
            _logger.warning("bigray: the key file can be read again")
        self.problem = problem


def presented_secret(headers: Mapping[bytes, bytes]) -> str:
    """The key that a request shows, empty where it shows none."""
    scheme, _, credentials = headers.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials.strip().decode("latin-1")
    return headers.get(b"x-api-key", b"").strip().decode("latin-1")


def _too_often(key: Key, wait_s: float) -> Refusal:
    seconds = max(1, math.ceil(wait_s))
    message = f"too many requests with this key, which may send {key.rate_per_s:g} a second; retry in {seconds} s"
    return Refusal(429, message, try_again_in(seconds))
