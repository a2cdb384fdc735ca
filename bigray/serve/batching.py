"""Batches without a timer: while the model works, requests gather; when it is free, it takes what is there.

A lone request never waits for company, and under load batches grow by themselves. The queue is bounded in time: work
that could not be begun within `max_queue_s` is refused at once, so that what is accepted is answered while it matters.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigray.inference import Predictions
from bigray.serve.http import Refusal, try_again_in

FloatArray = NDArray[np.float32]
Run = Callable[[FloatArray], Predictions]
Answer = Predictions | Exception
OnBatch = Callable[[int, float, float], None]
"""Told of each batch: rows, seconds in the model, seconds its oldest request had waited."""

SLOW_BATCH_S = 0.002
"""A model slower than this runs in its own thread, so that the event loop can accept requests meanwhile and Serve's
autoscaler sees them wait. A faster one runs on the loop: handing the interpreter lock to and fro costs more than that
(784-256-10 MLP, two cores: 1,850 requests/s in a thread, 2,700 on the loop)."""

WARM_UP_S = 2.0
"""What measuring a model may take before no larger batch is tried."""

SMOOTHING = 0.1
"""Share of a new full batch in the running measure of seconds a row."""


@dataclass(frozen=True)
class Capacity:
    """What one replica's model can do, measured when it was warmed up."""

    max_rows: int
    """Rows of the largest batch that keeps within the SLO."""
    seconds_per_row: float
    """In batches of that size."""
    is_slow: bool
    """Whether such a batch takes longer than `SLOW_BATCH_S`."""


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait."""

    max_queue_s: float = 1.0
    """Work, in seconds of the model, that may wait; a request beyond it is refused with 503."""
    max_requests: int = 1024
    """Requests that may wait, however small."""


class _Waiting(NamedTuple):
    rows: FloatArray
    future: asyncio.Future[Predictions]
    since: float


class Batcher:
    """Runs `run` on batches of up to `capacity.max_rows` rows (replica, one event loop).

    A request is never split: one with more rows than that runs by itself. `run` must treat rows independently.
    """

    def __init__(
        self,
        run: Run,
        capacity: Capacity,
        limits: QueueLimits | None = None,
        on_batch: OnBatch | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._max_rows = capacity.max_rows
        self._limits = limits or QueueLimits()
        self._on_batch, self._on_begin = on_batch, on_begin
        self._seconds_per_row = capacity.seconds_per_row
        self._queue: deque[_Waiting] = deque()
        self._queued_rows = 0
        self._in_model: list[_Waiting] = []
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bigray-model") if capacity.is_slow else None

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self._busy

    @property
    def seconds_per_row(self) -> float:
        """As last measured, in whatever batches came."""
        return self._seconds_per_row

    def oldest_age_s(self) -> float:
        """How long the request has waited that waits longest; 0 for an empty queue."""
        return time.monotonic() - self._queue[0].since if self._queue else 0.0

    def check_room(self) -> None:
        """Raise a 503 where a request would wait longer than allowed; asked before its body is read or decoded."""
        if self.has_room():
            return
        backlog_s = self._backlog_s()
        raise Refusal(
            503,
            f"overloaded: {len(self._queue)} requests wait, about {backlog_s:.1f} s of work; try again later",
            try_again_in(backlog_s),
        )

    def has_room(self) -> bool:
        """Whether another request would be answered in the time allowed; an empty queue always has room."""
        is_short = len(self._queue) < self._limits.max_requests and self._backlog_s() <= self._limits.max_queue_s
        return is_short or not self._queue

    def _backlog_s(self) -> float:
        return self._queued_rows * self._seconds_per_row

    async def submit(self, rows: FloatArray) -> Predictions:
        """Predictions for these rows, which have passed validation; raises what `run` raises for them alone.

        Raises:
            Refusal: 503, the queue is full.
        """
        return await self.enqueue(rows)

    def enqueue(self, rows: FloatArray) -> asyncio.Future[Predictions]:
        """What `submit` waits for; a caller that goes away cancels it."""
        self.check_room()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Predictions] = loop.create_future()
        self._queue.append(_Waiting(rows, future, time.monotonic()))
        self._queued_rows += len(rows)
        if not self._busy:
            self._busy = True
            # not at once: requests that arrived in this same turn of the loop should share the batch
            loop.call_soon(self._start_batch, loop)
        return future

    def expire(self, timeout_s: float) -> None:
        """Answer with a 504 whoever has waited longer, in the queue or for a model that hangs; called now and then.

        A timer for each request would cost more than many a model.
        """
        since = time.monotonic() - timeout_s
        for waiting in (*self._in_model, *self._queue):
            if waiting.since > since:
                return  # they are in the order they came
            if not waiting.future.done():
                waiting.future.set_exception(Refusal(504, f"no answer within {timeout_s:g} s"))

    def close(self) -> None:
        """Let the model's thread end once its batches are answered; any thread may call it."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def _start_batch(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._take_batch()
        if not batch:
            self._busy = False
        elif self._thread is not None:
            self._begin(batch)
            self._hand_over(self._thread, loop, batch)
        else:
            deliver(batch, self._timed(batch))
            loop.call_soon(self._start_batch, loop)

    def _take_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        num_rows = 0
        while self._queue:
            waiting = self._queue[0]
            if waiting.future.done():  # the caller has gone away
                self._forget_first()
                continue
            if batch and num_rows + len(waiting.rows) > self._max_rows:
                break
            batch.append(waiting)
            num_rows += len(waiting.rows)
            self._forget_first()
        return batch

    def _forget_first(self) -> None:
        self._queued_rows -= len(self._queue.popleft().rows)

    def _begin(self, batch: list[_Waiting]) -> None:
        self._in_model = batch
        if self._on_begin is not None:
            self._on_begin()

    def _hand_over(self, pool: ThreadPoolExecutor, loop: asyncio.AbstractEventLoop, batch: list[_Waiting]) -> None:
        try:
            pool.submit(self._work, loop, batch)
        except RuntimeError:  # closed meanwhile; whoever had found this model before is answered all the same
            threading.Thread(target=self._work, args=(loop, batch), name="bigray-model-last", daemon=True).start()

    def _work(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting]) -> None:
        answers = self._timed(batch)
        loop.call_soon_threadsafe(self._finish_batch, loop, batch, answers)

    def _finish_batch(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting], answers: list[Answer]) -> None:
        # first the next batch, so that the model works while the answers are written
        self._in_model = []
        self._start_batch(loop)
        deliver(batch, answers)

    def _timed(self, batch: list[_Waiting]) -> list[Answer]:
        start = time.monotonic()
        answers = answer_batch(self._run, [waiting.rows for waiting in batch])
        seconds = time.monotonic() - start
        num_rows = sum(len(waiting.rows) for waiting in batch)
        # a small batch says little about a row's share of a full one, in which a backlog is worked off: by its own
        # measure, one row that met a busy processor would have the next hundred refused
        weight = SMOOTHING * min(1.0, num_rows / self._max_rows)
        self._seconds_per_row += weight * (seconds / num_rows - self._seconds_per_row)
        if self._on_batch is not None:
            self._on_batch(num_rows, seconds, start - batch[0].since)
        return answers


def deliver(batch: list[_Waiting], answers: list[Answer]) -> None:
    """Hand each caller its answer, except those that have gone away (event loop only)."""
    for waiting, answer in zip(batch, answers, strict=True):
        if waiting.future.done():
            continue
        if isinstance(answer, Exception):
            waiting.future.set_exception(answer)
        else:
            waiting.future.set_result(answer)


def answer_batch(run: Run, requests: list[FloatArray]) -> list[Answer]:
    """One answer a request, in order; where the batch fails, each request is tried alone and fails alone."""
    try:
        if len(requests) == 1:
            return [run(requests[0])]
        return list(_split(run(np.concatenate(requests)), [len(rows) for rows in requests]))
    except Exception as error:
        if len(requests) == 1:
            return [error]
        return [answer for rows in requests for answer in answer_batch(run, [rows])]


def measure_capacity(run: Run, row: FloatArray, max_rows: int, slo_ms: float | None = None) -> Capacity:
    """Time batches of growing size, which warms the model up as well, and choose the largest that suits the SLO.

    A request may find a batch just begun and then has to wait for its own: so a batch may take half of `slo_ms`. `row`
    is one sample (1, *input_shape).
    """
    started = time.perf_counter()
    chosen, seconds = 1, _fastest(run, row)
    for rows in _batch_sizes(max_rows):
        if time.perf_counter() - started > WARM_UP_S:
            break
        taken = _fastest(run, np.repeat(row, rows, axis=0))
        if slo_ms is not None and taken > slo_ms / 2_000:
            break
        chosen, seconds = rows, taken
    return Capacity(chosen, seconds / chosen, seconds > SLOW_BATCH_S)


def _batch_sizes(max_rows: int) -> list[int]:
    sizes = [2**power for power in range(2, 20, 2) if 2**power < max_rows]
    return [*sizes, max_rows] if max_rows > 1 else []


def _fastest(run: Run, batch: FloatArray) -> float:
    run(batch)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _split(predictions: Predictions, lengths: list[int]) -> list[Predictions]:
    parts = []
    labels, probabilities, values = predictions.labels, predictions.probabilities, predictions.values
    start = 0
    for length in lengths:
        stop = start + length
        if labels is not None and probabilities is not None:
            parts.append(Predictions(labels[start:stop], probabilities[start:stop], None))
        else:
            assert values is not None, "a regression has them"
            parts.append(Predictions(None, None, values[start:stop]))
        start = stop
    return parts
