"""Batches without a timer: while the model works, requests gather; when it is free, it takes what is there.

A lone request never waits for company, and under load batches grow by themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from bigray.inference import Predictions

FloatArray = NDArray[np.float32]
Run = Callable[[FloatArray], Predictions]
Answer = Predictions | Exception
Waiting = tuple[FloatArray, "asyncio.Future[Predictions]"]

SLOW_BATCH_S = 0.002
"""A model slower than this runs in its own thread, so that the event loop can accept requests meanwhile and Serve's
autoscaler sees them wait. A faster one runs on the loop: handing the interpreter lock to and fro costs more than that
(784-256-10 MLP, two cores: 1,850 requests/s in a thread, 2,700 on the loop)."""


class Batcher:
    """Runs `run` on batches of up to `max_rows` rows (replica, one event loop).

    A request is never split: one with more rows than `max_rows` runs by itself. `run` must treat rows independently.
    """

    def __init__(self, run: Run, max_rows: int, *, use_thread: bool) -> None:
        self._run = run
        self._max_rows = max_rows
        self._queue: deque[Waiting] = deque()
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bigray-model") if use_thread else None

    async def submit(self, rows: FloatArray) -> Predictions:
        """Predictions for these rows, which have passed validation; raises what `run` raises for them alone."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Predictions] = loop.create_future()
        self._queue.append((rows, future))
        if not self._busy:
            self._busy = True
            # not at once: requests that arrived in this same turn of the loop should share the batch
            loop.call_soon(self._start_batch, loop)
        return await future

    def _start_batch(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._take_batch()
        if not batch:
            self._busy = False
        elif self._thread is not None:
            self._thread.submit(self._work, loop, batch)
        else:
            deliver(batch, answer_batch(self._run, [rows for rows, _ in batch]))
            loop.call_soon(self._start_batch, loop)

    def _take_batch(self) -> list[Waiting]:
        batch: list[Waiting] = []
        num_rows = 0
        while self._queue:
            rows, future = self._queue[0]
            if future.done():  # the caller has gone away
                self._queue.popleft()
                continue
            if batch and num_rows + len(rows) > self._max_rows:
                break
            batch.append(self._queue.popleft())
            num_rows += len(rows)
        return batch

    def _work(self, loop: asyncio.AbstractEventLoop, batch: list[Waiting]) -> None:
        answers = answer_batch(self._run, [rows for rows, _ in batch])
        loop.call_soon_threadsafe(self._finish_batch, loop, batch, answers)

    def _finish_batch(self, loop: asyncio.AbstractEventLoop, batch: list[Waiting], answers: list[Answer]) -> None:
        # first the next batch, so that the model works while the answers are written
        self._start_batch(loop)
        deliver(batch, answers)


def deliver(batch: list[Waiting], answers: list[Answer]) -> None:
    """Hand each caller its answer, except those that have gone away (event loop only)."""
    for (_, future), answer in zip(batch, answers, strict=True):
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


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


def is_slow(run: Run, row: FloatArray, max_rows: int) -> bool:
    """Whether a full batch takes longer than `SLOW_BATCH_S`; warms the model up as well."""
    batch = np.repeat(row, max_rows, axis=0)
    run(row)
    run(batch)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - start)
    return min(seconds) > SLOW_BATCH_S


def _split(predictions: Predictions, lengths: list[int]) -> list[Predictions]:
    parts = []
    start = 0
    for length in lengths:
        parts.append(_rows(predictions, start, start + length))
        start += length
    return parts


def _rows(predictions: Predictions, start: int, stop: int) -> Predictions:
    labels, probabilities, values = predictions.labels, predictions.probabilities, predictions.values
    return Predictions(
        labels=None if labels is None else labels[start:stop],
        probabilities=None if probabilities is None else probabilities[start:stop],
        values=None if values is None else values[start:stop],
    )
