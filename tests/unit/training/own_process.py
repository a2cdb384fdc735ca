"""Memory that is measured where nothing else happens."""

from __future__ import annotations

import subprocess
import sys


def printed_by(code: str) -> int:
    """The number that a process of its own prints: in this one, what other tests have left would count, threads of
    Ray's among it."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)
