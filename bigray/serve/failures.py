"""From the tracebacks that Ray carries between processes to the one line a user needs."""

from __future__ import annotations

import re

# `ray.exceptions.RayTaskError: ...`, `bigray.errors.CorruptFile: ...`, `ValueError: ...`
_EXCEPTION = re.compile(r"^\s*(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Failed|File)\b[^:]*: (?P<message>.+)$")
_RAY_WRAPPER = re.compile(r"^\s*ray\.exceptions\.|ray::")


def first_error_line(text: str) -> str:
    """The exception that started it: the last one of a traceback, without Ray's wrapping; else the first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if _EXCEPTION.match(line) and not _RAY_WRAPPER.search(line)]
    if not own:
        return lines[0] if lines else ""
    return own[-1].removeprefix("bigray.errors.")
