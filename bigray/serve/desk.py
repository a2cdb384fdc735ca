"""Work that takes long is done beside the event loop, so that other requests go on meanwhile (replica)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from bigray.serve.http import Refusal, try_again_in

T = TypeVar("T")

SMOOTHING = 0.2
"""Share of a new job in the running measure of seconds a job."""


class Desk:
    """One thread, one job after the other: what a job takes of memory, it takes once (event loop).

    A job of a few kB can take seconds, long after its body has been counted: so what waits is bounded in time, by what
    jobs have taken so far.
    """

    def __init__(self, who_waits: str, timeout_s: float, max_queue_s: float, most_waiting: int) -> None:
        """`who_waits` is part of a refusal, "pictures wait to be decoded"; `timeout_s` is for one job, its wait
        included; `max_queue_s` of work and `most_waiting` jobs may be there before another."""
        self._who_waits, self._timeout_s, self._max_queue_s = who_waits, timeout_s, max_queue_s
        self._most_waiting = most_waiting
        self._jobs: list[Future[Any]] = []
        """Those that wait and the one in the thread, whether or not somebody waits for them still."""
        self._seconds_each: float | None = None
        self._began: float | None = None
        """The job in the thread. The thread writes both, the event loop only reads them."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"bigray-{who_waits.split()[0]}")

    def check_room(self) -> None:
        """Raise a 503 where a job would wait too long; asked before its body is read. An idle desk has room."""
        self._forget_done()
        waiting, backlog_s = len(self._jobs), self._backlog_s()
        if waiting and (waiting >= self._most_waiting or backlog_s > self._max_queue_s):
            raise Refusal(
                503,
                f"overloaded: {waiting} {self._who_waits}, about {backlog_s:.1f} s of work; try again later",
                try_again_in(backlog_s),
            )

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """`work(*arguments)` in the thread.

        Raises:
            Refusal: 503, too many wait already; 504, it was not done in time. One that has begun goes on in the
                thread, which nothing can stop, but nobody waits for it any more.
        """
        self.check_room()
        job = self._thread.submit(self._timed, work, *arguments)
        self._jobs.append(job)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(job)  # to cancel this takes a job out that has not begun
        except TimeoutError:
            raise Refusal(504, f"no answer within {self._timeout_s:g} s") from None
        finally:
            self._forget_done()

    def _timed(self, work: Callable[..., T], *arguments: object) -> T:
        began = self._began = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            seconds, before = time.perf_counter() - began, self._seconds_each
            self._seconds_each = seconds if before is None else before + SMOOTHING * (seconds - before)
            self._began = None

    def _backlog_s(self) -> float:
        """Of the jobs; the one in the thread counts for what it has taken already, where that is more than usual."""
        began, each_s = self._began, self._seconds_each or 0.0
        taken_s = 0.0 if began is None else time.perf_counter() - began
        return len(self._jobs) * each_s + max(taken_s - each_s, 0.0)

    def _forget_done(self) -> None:
        self._jobs = [job for job in self._jobs if not job.done()]
