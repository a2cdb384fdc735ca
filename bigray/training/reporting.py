"""Reports on their way out of a worker: the training loop hands them over and goes on at once.

A thread sends what has gathered, one call for a batch, so thousands of reports a second cost the loop an append each.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from bigray.training.commands import Event

LARGEST_BATCH = 2000
"""Events of one call: a few hundred kB, so that a long queue does not hold up the receiver for everybody else."""


class Reporter:
    """Sends events in the order they were pushed, each exactly once (worker).

    `send` returns once a batch was received; one batch is under way at a time, and what comes in the meantime makes
    the next one. The queue has no bound: a slow receiver delays `flush`, never `push`. Any thread may call `push`;
    `flush` and `close` belong to one.
    """

    def __init__(self, send: Callable[[list[Event]], None], max_wait_s: float = 0.05) -> None:
        """`max_wait_s`: how long an event may wait for company. One that comes after a pause goes at once."""
        self._send, self._max_wait_s = send, max_wait_s
        # one queue for both, so that a flush is answered after the events before it; appending is atomic
        self._queue: deque[Event | threading.Event] = deque()
        self._has_news, self._is_urged = threading.Event(), threading.Event()
        self._is_closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._send_until_closed, name="reporter", daemon=True)
        self._thread.start()

    def push(self, event: Event) -> None:
        """Hand an event over; takes about a microsecond and raises nothing. Do not change the event after."""
        self._queue.append(event)
        if not self._has_news.is_set():  # setting it takes a lock, looking does not
            self._has_news.set()

    def flush(self) -> None:
        """Wait until everything pushed before was received.

        Raises:
            Exception: what `send` raised since the last flush, the first of it; events of that batch may be lost.
        """
        if self._thread.is_alive():
            received = threading.Event()
            self._queue.append(received)
            self._wake()
            received.wait()
        while self._queue:  # pushed after close
            self._send_batch()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Send what is left and end the thread; raises like `flush`."""
        self._is_closed = True
        self._wake()
        self._thread.join()
        self.flush()

    def _wake(self) -> None:
        self._is_urged.set()
        self._has_news.set()

    def _send_until_closed(self) -> None:
        while self._queue or not self._is_closed:
            self._has_news.wait()
            # cleared before the queue is read: what is pushed from here on either is read below or sets them again
            self._has_news.clear()
            self._is_urged.clear()
            started = time.monotonic()
            for _ in range(math.ceil(len(self._queue) / LARGEST_BATCH)):  # what comes meanwhile gathers
                self._send_batch()
            if not self._is_closed:
                self._is_urged.wait(max(0.0, started + self._max_wait_s - time.monotonic()))

    def _send_batch(self) -> None:
        taken = [self._queue.popleft() for _ in range(min(len(self._queue), LARGEST_BATCH))]
        events = [item for item in taken if isinstance(item, Event)]
        try:
            if events:
                self._send(events)
        except Exception as error:  # raised by the next flush: the loop must not end in the middle of a step
            self._error = self._error or error
        for item in taken:
            if isinstance(item, threading.Event):
                item.set()
