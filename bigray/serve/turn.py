"""Whose turn it is to hand Serve its applications (driver).

Serve takes all applications of a cluster at once, so whoever adds one reads the others first and hands them in again.
Of two who do so at the same time, one would undo what the other has done.

    serve/turn/<number>     who has this turn, or that it has been given back

A turn is taken by making the key of the next number, which of several deployers one can do. The newest key stays, and
older ones are removed, so a deployer who was slow between looking and taking finds a newer one, and has lost.
"""

from __future__ import annotations

import random
import time
import uuid
from types import TracebackType

from bigray.serve.release.registry import KeyValue, shared_store

PREFIX = b"serve/turn/"
GIVEN_BACK = b"given back"
POLL_S = 0.05
SILENT_S = 20.0
"""A turn takes about a second. One that takes so long is a deployer's that is gone, and the next one takes it over."""


class Turn:
    """Waits for this process's turn, and holds it while the block runs.

    Raises:
        ClusterError: the store does not answer.
    """

    def __init__(self, store: KeyValue | None = None) -> None:
        self._store = shared_store() if store is None else store
        self._token = uuid.uuid4().hex.encode()
        self._number = 0

    def __enter__(self) -> Turn:
        seen, seen_since = (0, b""), time.monotonic()
        while True:
            number = max(self._numbers(), default=0)
            holder = (self._store.get(_key(number)) if number else GIVEN_BACK) or b""
            if (number, holder) != seen:
                seen, seen_since = (number, holder), time.monotonic()
            is_free = holder == GIVEN_BACK or time.monotonic() - seen_since > SILENT_S
            if is_free and self._take(number + 1):
                return self
            time.sleep(random.uniform(0, POLL_S))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._store.put(_key(self._number), GIVEN_BACK, overwrite=True)

    def _take(self, number: int) -> bool:
        key = _key(number)
        if not self._store.put(key, self._token, overwrite=False) and self._store.get(key) != self._token:
            return False  # where it is our own, an answer was lost and the put was sent twice
        numbers = self._numbers()
        if max(numbers) > number:
            return False  # the key was another's before, and removed
        for earlier in numbers:
            if earlier < number:
                self._store.delete(_key(earlier))
        self._number = number
        return True

    def _numbers(self) -> list[int]:
        names = (key.removeprefix(PREFIX) for key in self._store.keys(PREFIX))
        return [int(name) for name in names if name.isdigit()]


def _key(number: int) -> bytes:
    return PREFIX + f"{number:012d}".encode()
