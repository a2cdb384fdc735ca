"""Append-only record of a run: what every table, leaderboard and resume is read from (driver).

One JSON line for each event, one file for each attempt, so that no two processes write the same file.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from bigray.paths import RunPaths

SECONDS_BETWEEN_UPLOADS = 5.0


class Recordable(Protocol):
    """What the journal takes: `bigray.training.commands.Event` is one."""

    @property
    def kind(self) -> str: ...
    @property
    def trial_id(self) -> str: ...
    @property
    def values(self) -> Mapping[str, Any]: ...


@dataclass
class Journal:
    """The open journal of one attempt. On an object store, which cannot append, the attempt's file is rewritten."""

    paths: RunPaths
    attempt: int
    _lines: list[str] = field(default_factory=list)
    _num_uploaded: int = 0
    _uploaded_at: float = -math.inf

    @classmethod
    def open(cls, paths: RunPaths) -> Journal:
        """Start the next attempt's file, which on a local disk no other driver can get too."""
        attempt = max(paths.attempts(), default=0) + 1
        while not paths.storage.create(paths.journal_file(attempt)):
            attempt += 1
        return cls(paths, attempt)

    def append(self, kind: str, trial_id: str = "", **values: Any) -> None:
        """Record one event; on a local disk it is written before this returns, elsewhere `flush` does that.

        Raises:
            StorageError: the file cannot be written.
        """
        self._write([self._line(kind, trial_id, values)])

    def append_all(self, events: Iterable[Recordable]) -> None:
        """Record events, in order, with one write for all of them: thousands a second come in batches.

        A crash in the middle leaves the first of them whole, as many as reached the disk, and at most one cut line.

        Raises:
            StorageError: the file cannot be written; some of the events may be in it.
        """
        self._write([self._line(event.kind, event.trial_id, event.values) for event in events])

    def _line(self, kind: str, trial_id: str, values: Mapping[str, Any]) -> str:
        record = {"time": round(time.time(), 3), "attempt": self.attempt, "kind": kind, "trial": trial_id, **values}
        return json.dumps(record) + "\n"

    def _write(self, lines: list[str]) -> None:
        if not self.paths.storage.is_local:
            self._lines.extend(lines)
        elif lines:
            self.paths.storage.append_line(self.paths.journal_file(self.attempt), "".join(lines))

    def flush(self, *, force: bool = False) -> None:
        """Bring an object store up to date, at most every `SECONDS_BETWEEN_UPLOADS` unless forced.

        Who reads the journal next, or ends, has to force: what came since the last upload is in memory only.
        """
        is_early = time.monotonic() - self._uploaded_at < SECONDS_BETWEEN_UPLOADS
        lines = tuple(self._lines)  # another thread may append during the upload
        if len(lines) == self._num_uploaded or (is_early and not force):
            return
        self.paths.storage.write_bytes(self.paths.journal_file(self.attempt), "".join(lines).encode())
        self._num_uploaded, self._uploaded_at = len(lines), time.monotonic()


def read_journal(paths: RunPaths) -> Iterator[dict[str, Any]]:
    """Every event of every attempt, oldest first. A line cut short by a crash is left out."""
    for attempt in paths.attempts():
        for line in paths.storage.read_bytes(paths.journal_file(attempt)).splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # only the last line of a killed attempt can be incomplete, or zeros
                continue
