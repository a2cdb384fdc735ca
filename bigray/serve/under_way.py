"""The requests that are being answered: looked after a few times a second, which costs less than a timer for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bigray.serve.http import Refusal

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

CLOSE = ((b"connection", b"close"),)
GONE = "the caller has gone away"
GIVEN_UP_AT_ONCE = 20
"""Late bodies that are answered at one look; hundreds would hold up everybody else for as long as that takes."""
WATCHED_AFTER_S = 0.2
"""A request that is answered sooner is not worth a look at whether its caller is still there."""


class Attended:
    """One request, while it is under way (event loop)."""

    __slots__ = ("fault", "is_reading", "receive", "since", "task", "watcher")

    def __init__(self, receive: Receive) -> None:
        self.task = asyncio.current_task()
        self.since = time.monotonic()
        self.receive = receive
        self.is_reading = True
        """Whether its body is still to come."""
        self.fault: Refusal | None = None
        """Why it was given up: what to answer, where anybody is there to read it."""
        self.watcher: asyncio.Task[None] | None = None

    def give_up(self, fault: Refusal) -> None:
        if self.task is not None and self.fault is None:
            self.fault = fault
            self.task.cancel()


class UnderWay:
    """All requests of one application that are under way (event loop)."""

    def __init__(self, body_timeout_s: float) -> None:
        self._body_timeout_s = body_timeout_s
        self._attended: set[Attended] = set()

    def begin(self, receive: Receive) -> Attended:
        attended = Attended(receive)
        self._attended.add(attended)
        return attended

    def end(self, attended: Attended) -> None:
        self._attended.discard(attended)
        if attended.watcher is not None:
            attended.watcher.cancel()

    def look_after(self) -> None:
        """Give up bodies that do not come, with a 408, and callers that have gone; called several times a second."""
        now, given_up = time.monotonic(), 0
        for attended in tuple(self._attended):
            age_s = now - attended.since
            if attended.is_reading:
                if age_s > self._body_timeout_s and given_up < GIVEN_UP_AT_ONCE:
                    given_up += attended.fault is None
                    attended.give_up(Refusal(408, f"body: not complete within {self._body_timeout_s:g} s", CLOSE))
            elif age_s > WATCHED_AFTER_S and attended.watcher is None:
                attended.watcher = asyncio.get_running_loop().create_task(_watch(attended))


async def _watch(attended: Attended) -> None:
    """Cancel the work for a caller that goes away; a server tells of it where a body is over."""
    while (await attended.receive())["type"] != "http.disconnect":
        pass
    attended.give_up(Refusal(499, GONE))
