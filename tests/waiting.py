"""What a test waits for that comes at a time of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK_AGAIN_S = 0.02


def wait_until(is_so: Callable[[], object], otherwise: str = "it did not become so", timeout_s: float = 15.0) -> None:
    """Ask again and again.

    Raises:
        TimeoutError: with `otherwise`.
    """
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(LOOK_AGAIN_S)
