"""A worker's sign of life: a thread that tells the switchboard every second where this process is, and brings back what
the switchboard wishes of it (worker).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray

from bigray.training.commands import Wish
from bigray.training.membership import Member

INTERVAL_S = 1.0
_FRAMES_TOLD = 6


@dataclass(frozen=True)
class Beat:
    """Where a worker is."""

    num_steps: int
    """Optimizer steps in this generation."""
    num_ticks: int
    """Progress marks since the last step, which all ranks take together: ranks may have unequal work within one."""
    phase: str
    """What it went into last: forward, backward, step, validation; idle without a command."""
    since_tick_s: float
    stack: str
    """The innermost frames of the training thread, outermost first, in one line."""
    command: int = 0
    """Serial of the command under way: a wish to rest is for that one alone."""


class Heartbeat:
    """Runs beside the training thread, which marks its progress with `tick`."""

    def __init__(self, switchboard: Any, group: int, member: Member, hang_up: Callable[[], None]) -> None:
        """`hang_up` is called once, in this thread, when the generation is broken."""
        self.wish = Wish()
        self._hang_up = hang_up
        self._command = 0
        self._switchboard, self._group, self._member = switchboard, group, member
        self._num_steps, self._num_ticks, self._phase, self._ticked_at = 0, 0, "idle", time.monotonic()
        self._training_thread = threading.get_ident()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def tick(self, phase: str) -> None:
        """Mark progress: well under a microsecond."""
        if phase == "step":
            self._num_steps, self._num_ticks = self._num_steps + 1, 0
        else:
            self._num_ticks += 1
        self._phase = phase
        self._ticked_at = time.monotonic()

    def begin(self, command: int) -> None:
        """A command begins, by its serial; what the last one was asked to do at its next epoch's end is over."""
        self._command = command
        self.wish = replace(self.wish, rest=False)

    def end(self) -> None:
        """Stop beating."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            with contextlib.suppress(ray.exceptions.RayError):  # the switchboard is gone: the run is being ended
                beat = self._beat()
                wish: Wish = ray.get(self._switchboard.beat.remote(self._group, self._member, beat))
                self.wish = replace(wish, rest=wish.rest and beat.command == self._command)
                if wish.leave:
                    self._hang_up()
                    return

    def _beat(self) -> Beat:
        waited_s = 0.0 if self._phase == "idle" else time.monotonic() - self._ticked_at
        return Beat(self._num_steps, self._num_ticks, self._phase, waited_s, self._stack(), self._command)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._training_thread)
        if frame is None:
            return "no training thread"
        frames = traceback.extract_stack(frame)[-_FRAMES_TOLD:]
        return " > ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in frames)
