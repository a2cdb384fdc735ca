"""A line of JSON for each request, written beside the event loop (replica).

The loop only puts the facts into a queue; a thread makes the lines and writes them a few times a second. The log never
stops serving: where the disk is full or the queue runs over, lines are dropped and their number is told.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii
from pathlib import Path

from bigray.errors import SpecError

WRITE_INTERVAL_S = 0.2
MOST_WAITING = 50_000
"""Lines in the queue, some 20 MB; at 4,000 requests/s the disk may stand still for twelve seconds."""
LONGEST_TEXT = 256
"""Characters kept of what the caller has chosen, such as the path."""

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")

Facts = tuple[float, str, str, str, int, float, int, int, str, str, str, str]


class AccessLog:
    """The log of one replica, in a local file that the others of its machine may share; `path` None keeps no log.

    `sample` is the share of the good answers that gets a line; errors (400 and above) always do. A file that has
    reached `max_bytes` becomes `path.1`, and so on up to `path.<num_kept>`.

    Raises:
        SpecError: the path is not one of a local file.
    """

    def __init__(
        self,
        path: str | None,
        sample: float = 1.0,
        *,
        max_bytes: int = 64 * 2**20,
        num_kept: int = 3,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        if path is not None and "://" in path:
            raise SpecError(f"access log: '{path}' is not a local file; name one, such as /var/log/bigray/access.jsonl")
        self._path = None if path is None else Path(path)
        self._sample, self._most_waiting = sample, most_waiting
        self._max_bytes, self._num_kept = max_bytes, num_kept
        self._waiting: deque[Facts] = deque()
        # each has one writer: the event loop, the thread, the thread
        self._num_refused = self._num_unwritten = self._num_told = 0
        self._is_torn = self._is_failing = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if self._path is not None:
            self._thread = threading.Thread(target=self._work, name="bigray-access-log", daemon=True)
            self._thread.start()

    @property
    def num_lost(self) -> int:
        """Lines dropped so far."""
        return self._num_refused + self._num_unwritten

    def write(
        self,
        *,
        id: str,
        method: str,
        path: str,
        status: int,
        seconds: float,
        rows: int,
        body_bytes: int,
        model: str,
        version: str,
        key_id: str,
        client: str,
    ) -> None:
        """Note one request (event loop); `path` is without its query, `key_id` never the secret."""
        if self._thread is None or (status < 400 and self._sample < 1 and random.random() >= self._sample):
            return
        if len(self._waiting) >= self._most_waiting:
            self._num_refused += 1
            return
        facts = (time.time(), id, method, path, status, seconds, rows, body_bytes, model, version, key_id, client)
        self._waiting.append(facts)

    def close(self) -> None:
        """Write what waits, and end; what is noted later is lost."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _work(self) -> None:
        while not self._closing.wait(WRITE_INTERVAL_S):
            self._write_waiting()
        self._write_waiting()

    def _write_waiting(self) -> None:
        facts = [self._waiting.popleft() for _ in range(len(self._waiting))]
        num_lost = self.num_lost
        if not facts and num_lost == self._num_told:
            return
        lines = [_line(one) for one in facts]
        if num_lost > self._num_told:
            lines.append(f'{{"time":"{_iso(time.time())}","lost":{num_lost - self._num_told}}}')
        try:
            written = self._append(lines)
        except OSError as error:
            self._num_unwritten += len(facts)
            self._warn("cannot be written; lines are dropped until it can", error)
        else:
            self._num_told, self._is_failing = num_lost, False
            self._rotate(written)

    def _append(self, lines: Iterable[str]) -> os.stat_result:
        """Opened each time, so that a log that somebody has moved or deleted goes on in a new file."""
        assert self._path is not None
        # what a full disk has cut off must not swallow the next line
        data = memoryview((("\n" if self._is_torn else "") + "".join(f"{line}\n" for line in lines)).encode())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            while data:
                num_written = file.write(data)
                self._is_torn = num_written < len(data)
                data = data[num_written:]
            return os.fstat(file.fileno())

    def _rotate(self, written: os.stat_result) -> None:
        if self._path is None or written.st_size < self._max_bytes:
            return
        try:
            if self._path.stat().st_ino == written.st_ino:  # else another replica has just done it
                rotate(self._path, self._num_kept)
        except OSError as error:
            self._warn("cannot be renamed and grows on", error)

    def _warn(self, what: str, error: OSError) -> None:
        if not self._is_failing:
            _logger.warning("bigray: the access log %s (%s)", what, error)
        self._is_failing = True


def rotate(path: Path, num_kept: int) -> None:
    """`path` becomes `path.1`, that `path.2` and so on; the oldest goes."""
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, num_kept + 1))]
    for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
        if newer.exists():
            newer.replace(older)
    if num_kept == 0:
        path.unlink(missing_ok=True)


def _line(facts: Facts) -> str:
    """Put together by hand: a third of the time that the JSON encoder takes for a dictionary."""
    at, id_, method, path, status, seconds, rows, body_bytes, model, version, key_id, client = facts
    return (
        f'{{"time":"{_iso(at)}","id":{_text(id_)},"method":{_text(method)},"path":{_text(path)},"status":{status:d},'
        f'"ms":{seconds * 1e3:.3f},"rows":{rows:d},"bytes":{body_bytes:d},"model":{_text(model)},'
        f'"version":{_text(version)},"key":{_text(key_id)},"client":{_text(client)}}}'
    )


def _text(value: str) -> str:
    """ASCII alone: also what a terminal would take for a command arrives as an escape."""
    return encode_basestring_ascii(value[:LONGEST_TEXT]).replace("\x7f", "\\u007f")


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
