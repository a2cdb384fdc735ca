"""SIGTERM as an exception, so that a run that is told to end leaves by the same doors as an interrupted one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(BaseException):
    """The process was told to end: by `ray job stop`, Slurm, Kubernetes or a person."""


@contextlib.contextmanager
def terminated_by_signal() -> Iterator[None]:
    """Raise `Terminated` in the block when SIGTERM arrives (main thread; elsewhere nothing changes).

    Enter it once Ray is connected: Ray sets a handler of its own then, which ends the process on the spot.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the first one's checkpoint short
        raise Terminated

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
