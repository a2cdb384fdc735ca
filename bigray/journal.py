"""Append-only record of a run: what every table, leaderboard and resume is read from (driver).

One JSON line for each event, one file for each attempt, so that no two processes write the same file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bigray.paths import JOURNAL, RunPaths


@dataclass
class Journal:
    """The open journal of one attempt. On an object store, which cannot append, the attempt's file is rewritten."""

    paths: RunPaths
    attempt: int
    _lines: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, paths: RunPaths) -> Journal:
        """Start the next attempt's file."""
        attempt = len(paths.storage.list_names(JOURNAL)) + 1
        journal = cls(paths, attempt)
        paths.storage.write_bytes(paths.journal_file(attempt), b"")
        return journal

    def append(self, kind: str, trial_id: str = "", **values: Any) -> None:
        """Record one event; on a local disk it is written before this returns."""
        record = {"time": round(time.time(), 3), "attempt": self.attempt, "kind": kind, "trial": trial_id, **values}
        line = json.dumps(record) + "\n"
        if self.paths.storage.is_local:
            with open(f"{self.paths.storage.root}/{self.paths.journal_file(self.attempt)}", "a") as file:
                file.write(line)
        else:
            self._lines.append(line)

    def flush(self) -> None:
        """Bring an object store up to date."""
        if self._lines:
            self.paths.storage.write_bytes(self.paths.journal_file(self.attempt), "".join(self._lines).encode())


def read_journal(paths: RunPaths) -> Iterator[dict[str, Any]]:
    """Every event of every attempt, oldest first. A line cut short by a crash is left out."""
    for name in paths.storage.list_names(JOURNAL):
        for line in paths.storage.read_bytes(f"{JOURNAL}/{name}").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # only the last line of a killed attempt can be incomplete, or zeros
                continue
