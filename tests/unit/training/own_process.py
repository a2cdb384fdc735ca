"""What a process of its own finds: in this one, what other tests have imported, held or started would count."""

from __future__ import annotations

import subprocess
import sys


def printed_by(code: str) -> str:
    """What it prints, without the blanks around it."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def number_printed_by(code: str) -> int:
    return int(printed_by(code))
