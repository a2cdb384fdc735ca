"""Where the time of a command goes: every moment is some phase's, so the parts add up to the whole (worker). Pure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bigray.results import Ledger

PARTS = {
    "start": "start_s",
    "loading": "start_s",
    "data": "data_s",
    "forward": "compute_s",
    "backward": "compute_s",
    "step": "compute_s",
    "loop": "compute_s",
    "validation": "evaluation_s",
    "save": "checkpoint_s",
    "report": "reporting_s",
}
"""Phase, as the loop marks it -> part of the ledger. Any other phase is `other_s`; "loop" is a loop of one's own."""


class Stopwatch:
    """Attributes the time since the last mark to the phase that is being left."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent_s: dict[str, float] = {}
        self._phase, self._since = "other", clock()

    def mark(self, phase: str) -> None:
        """A phase begins: well under a microsecond, the loop calls it several times a step."""
        now = self._clock()
        self._spent_s[self._phase] = self._spent_s.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def restart(self, phase: str) -> None:
        """Forget what was measured: another command begins."""
        self._spent_s.clear()
        self._phase, self._since = phase, self._clock()

    def read(self) -> Ledger:
        """The seconds of each part up to now; they sum to the time since the start or `restart`."""
        self.mark(self._phase)
        whole = Ledger()
        for phase, spent_s in self._spent_s.items():
            part: dict[str, Any] = {PARTS.get(phase, "other_s"): spent_s}
            whole = whole.plus(Ledger(**part))
        return whole
